"""From what the served model was made, as far as it can still be told."""

from pathlib import Path

from app.artifacts import Input, Manifest, publish
from app.config import RunConfig
from app.serving.lineage import lineage


def published(folder: Path, kind: str, **inputs: Input) -> Manifest:
    folder.mkdir()
    return publish(Manifest.draft(kind, str(folder), RunConfig(), inputs), {})  # type: ignore[arg-type]


def test_inputs_are_walked_to_the_raw_files(tmp_path: Path) -> None:
    raw = Input(uri=str(tmp_path / "raw.txt"), digest="size-and-time")
    corpus = published(tmp_path / "corpus", "corpus", raw=raw)
    model = published(tmp_path / "model", "model", corpus=corpus.as_input())
    told = lineage(model, "m")
    assert (told["model"], told["kind"], told["digest"]) == ("m", "model", model.digest)
    assert told["inputs"]["corpus"]["digest"] == corpus.digest
    assert told["inputs"]["corpus"]["inputs"]["raw"] == {"name": "raw.txt", "digest": "size-and-time"}
    assert str(tmp_path) not in str(told)


def test_an_input_made_anew_or_lost_is_told_by_its_digest(tmp_path: Path) -> None:
    corpus = published(tmp_path / "corpus", "corpus")
    old = corpus.as_input().model_copy(update={"digest": "of before"})
    gone = Input(uri=str(tmp_path / "gone"), digest="g")
    told = lineage(published(tmp_path / "model", "model", corpus=old, gone=gone), "m")
    assert told["inputs"] == {
        "corpus": {"name": "corpus", "digest": "of before"},
        "gone": {"name": "gone", "digest": "g"},
    }


def test_a_broken_manifest_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    corpus = published(tmp_path / "corpus", "corpus")
    (tmp_path / "corpus" / "manifest.json").write_text("{")
    told = lineage(published(tmp_path / "model", "model", corpus=corpus.as_input()), "m")
    assert told["inputs"]["corpus"] == {"name": "corpus", "digest": corpus.digest}
