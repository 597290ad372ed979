"""The corpus stage on the shared cluster."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.artifacts import Manifest, read_manifest
from app.corpus import stage
from app.corpus.config import CorpusConfig
from app.corpus.sources import find_files

pytestmark = pytest.mark.ray

TEXTS = [f"话说天下大势，分久必合，合久必分，此乃第{number}回。" for number in range(60)]
RAW = [*TEXTS, *TEXTS[:25], *["短"] * 5, *["only english text in this document"] * 3]


def write_raw(folder: Path, num_files: int) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(num_files):
        lines = [json.dumps({"text": text}) for text in RAW[index::num_files]]
        lines += ["{broken"] if index == 0 else []
        (folder / f"{index}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def make(root: Path, **settings: object) -> Manifest:
    values = {"sources": [{"name": "novel", "uri": "raw/*.gz"}], "storage_uri": str(root), "held_out_fraction": 0.1}
    return stage.run(CorpusConfig.model_validate(values | settings))


def rows(root: Path, split: str) -> list[dict[str, str]]:
    return [
        row for file in sorted((root / "corpus" / split).glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def test_clean_and_rejected_are_raw(cluster: object, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", 3)
    figures = make(tmp_path).figures
    assert figures["raw"] == len(RAW) + 1
    assert figures["by_rule"] == {"duplicate": 25, "invalid_json": 1, "low_chinese_ratio": 3, "too_short": 5}
    clean = [row["text"] for split in ("train", "held_out") for row in rows(tmp_path, split)]
    assert sorted(clean) == sorted(TEXTS)
    assert Counter(row["rule"] for row in rows(tmp_path, "rejected")) == figures["by_rule"]
    assert 0 < figures["held_out"]["documents"] < 20


def test_the_output_does_not_depend_on_files_and_partitions(cluster: object, tmp_path: Path) -> None:
    outputs = []
    for index, (num_files, num_partitions) in enumerate([(1, 1), (5, 3)]):
        root = tmp_path / str(index)
        root.mkdir()
        write_raw(root / "raw", num_files)
        make(root, num_partitions=num_partitions)
        outputs.append({name: sorted(map(str, rows(root, name))) for name in ("train", "held_out", "rejected")})
    assert outputs[0] == outputs[1]


def test_an_interrupted_write_is_redone(cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path / "raw", 2)

    def killed(*_: object) -> Manifest:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # all data files written, no manifest
        patch.setattr(stage, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert rows(tmp_path, "train")
    with pytest.raises(ValueError, match="no complete corpus artifact"):
        read_manifest(str(tmp_path / "corpus"), "corpus")
    (tmp_path / "corpus" / "train" / "part-99999.parquet").write_bytes(b"half a file")
    done = make(tmp_path)
    assert "train/part-99999.parquet" not in done.files
    assert make(tmp_path) == done


def test_nothing_left_names_sources_and_rules(cluster: object, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    with pytest.raises(ValueError, match=r"sources novel: no document left of 1 \(rejected: {'too_short': 1}\)"):
        make(tmp_path)
    (tmp_path / "raw" / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"no document left of 0 \(rejected: none\)"):
        make(tmp_path)


def test_all_corrupt_files_are_named_and_nothing_is_published(cluster: object, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", 1)
    for name in ("x", "y"):
        (tmp_path / "raw" / f"{name}.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz: cannot be read .*\n.*y\.jsonl\.gz: cannot be read"):
        make(tmp_path)
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_a_document_lost_between_reading_and_writing_is_noticed(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", 1)
    config = CorpusConfig.model_validate(
        {"sources": [{"name": "novel", "uri": "raw/*.gz"}], "storage_uri": str(tmp_path), "num_partitions": 1}
    )
    (file,) = find_files(config)
    judged = pa.concat_tables(stage.judged_documents(file, config))
    for table, is_whole in ((judged, True), (judged.slice(1), False)):
        written = stage.write_partition(table, config)
        counts = Counter({row["counter"]: row["count"] for row in written.to_pylist()})
        assert counts["raw"] == len(RAW) + 1
        if is_whole:
            assert stage.summarize(counts, config)["clean"] == len(TEXTS)
        else:
            with pytest.raises(AssertionError, match="a document was lost"):
                stage.summarize(counts, config)
