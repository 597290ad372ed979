"""The augmentation stage: shards, lineage, restart and figures; on the cluster only where Ray is what is tested."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.artifacts import Manifest, publish, read_manifest
from app.augmentation import stage
from app.augmentation.config import AugmentConfig
from app.augmentation.similarity import TOO_DIFFERENT, UNCHANGED, SimilarityFloor
from app.config import RunConfig
from app.records import CLEAN_DOCUMENT
from tests.augmentation.fake_endpoint import completion, endpoint
from tests.augmentation.tiny_marian import write_tiny_marian

LEXICON = "Aa01A01= 酒店 旅馆\nBa01A01= 购买 采购 购置\nCa01A01= 便宜 低廉\nDa01A01= 今天 今日\nEa01A01= 孩子 孩儿\n"
TEXTS = [
    *(f"今天我在第{number}家酒店购买了早餐，价格便宜，孩子很喜欢吃。" for number in range(18)),
    *("天下大势，分久必合。", "刘备字玄德。"),
]


def write_corpus(root: Path, rows_per_group: int = 4) -> None:
    folder = root / "corpus" / "train"
    folder.mkdir(parents=True)
    for index in range(2):
        rows = [{"id": f"{TEXTS.index(text):032x}", "text": text, "source": "reviews"} for text in TEXTS[index::2]]
        table = pa.Table.from_pylist(rows, CLEAN_DOCUMENT)
        pq.write_table(table, folder / f"part-{index}.parquet", row_group_size=rows_per_group)
    publish(Manifest.draft("corpus", str(root / "corpus"), RunConfig(), {}), {"raw": len(TEXTS)})
    (root / "lexicon.txt").write_text(LEXICON, encoding="utf-8")


def configure(root: Path, **settings: object) -> AugmentConfig:
    values = {
        "storage_uri": str(root),
        "shard_documents": 3,
        "min_similarity": 0.6,
        "synonyms": {"replaced_share": 0.3},
    }
    values |= settings
    return AugmentConfig.model_validate(values)


class SharedCharacters(SimilarityFloor):
    """A floor without the encoder: the share of characters that both texts have stands for the cosine."""

    def judge(self, parents: Sequence[str], variants: Sequence[str]) -> list[tuple[float, str | None]]:
        pairs = list(zip(parents, variants, strict=True))
        shares = [len({*one} & {*other}) / len({*one} | {*other}) for one, other in pairs]
        return [(share, self._reason(*pair, share)) for share, pair in zip(shares, pairs, strict=True)]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stage with its actor in this process and a cheap floor; the names of the shards made."""
    made: list[str] = []

    def augment(pending: list[stage.Shard], work: stage.Work) -> None:
        augmenter = stage.Augmenter(work)
        for shard in pending:
            augmenter.make(shard)
            made.append(shard.name)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_augment", augment)
        patch.setattr(stage, "SimilarityFloor", SharedCharacters)
        patch.setattr(stage.cluster, "connect", lambda: "")
        yield made


def variants(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "augmented").glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_variant_names_its_parent_and_none_is_lost(tmp_path: Path, without_ray: list[str]) -> None:
    write_corpus(tmp_path)
    figures: dict[str, Any] = stage.run(configure(tmp_path, variants_per_method=2)).figures
    rows = variants(tmp_path)
    assert (figures["documents"], figures["tried"], figures["written"]) == (20, 40, len(rows))
    assert figures["written"] + figures["dropped"] == figures["tried"]
    assert figures["by_reason"][UNCHANGED] == 4  # two documents hold no word of the lexicon
    assert figures["by_method"] == {
        "synonyms.dropped": 40 - len(rows),
        "synonyms.tried": 40,
        "synonyms.written": len(rows),
    }
    for row in rows:
        parent = TEXTS[int(row["parent_id"], 16)]
        assert row["text"] != parent
        assert row["method"] == "synonyms"
        assert 0.6 <= row["similarity"] <= 1
    assert len({(row["parent_id"], row["text"]) for row in rows}) == len(rows)
    assert figures["diversity"]["different_2_grams_ratio"] > 1
    assert figures["diversity"]["self_bleu_after"] > 0


def test_the_output_does_not_depend_on_shards(tmp_path: Path, without_ray: list[str]) -> None:
    outputs = []
    for index, (rows_per_group, shard_documents) in enumerate([(4, 3), (100, 1), (1, 100)]):
        root = tmp_path / str(index)
        write_corpus(root, rows_per_group)
        figures = stage.run(configure(root, shard_documents=shard_documents)).figures
        outputs.append((sorted(map(str, variants(root))), figures))
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_restart_repeats_only_shards_without_counts(
    tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path)

    def killed(*_: object) -> Manifest:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.run(configure(tmp_path))
    assert len(without_ray) == 8  # 10 rows in each of two files, 3 in a shard
    whole = variants(tmp_path)
    (tmp_path / "augmented" / "done" / "part-00001-00002.json").unlink()
    (tmp_path / "augmented" / "part-00001-00002.jsonl").write_text("half a li")
    (tmp_path / "augmented" / "part-00000-00000.jsonl.0.partial").write_text("half a li")
    without_ray.clear()
    done = stage.run(configure(tmp_path, num_actors=1))
    assert without_ray == ["part-00001-00002"]
    assert variants(tmp_path) == whole
    assert not [name for name in done.files if name.endswith("partial")]
    assert read_manifest(str(tmp_path / "augmented"), "augmented") == done
    stage.run(configure(tmp_path, num_actors=1))
    assert len(without_ray) == 1  # complete: nothing is done
    stage.run(configure(tmp_path, num_actors=1, seed=1, overwrite=True))
    assert len(without_ray) == 9  # other work: all is done anew


def test_a_share_of_the_documents_is_chosen_by_hash(tmp_path: Path, without_ray: list[str]) -> None:
    write_corpus(tmp_path)
    few = stage.run(configure(tmp_path, document_fraction=0.5)).figures["documents"]
    chosen = {index for index in range(20) if stage.rank(f"{index:032x}", 0) < 0.5}
    assert few == len(chosen)
    assert {int(row["parent_id"], 16) for row in variants(tmp_path)} <= chosen


@pytest.mark.slow
def test_the_endpoint_gets_the_key_and_its_failures_are_counted(
    tmp_path: Path, without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path)
    monkeypatch.setenv("TEST_TRANSLATION_KEY", "secret")

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        text = body["messages"][1]["content"]
        if "刘备" in text:
            return 400, "{}"
        return completion("无关的句子。" if "第3家" in text else text.replace("酒店", "旅馆"))

    with endpoint(answer) as (base_url, requests):
        settings = {"base_url": base_url, "model": "m", "api_key_variable": "TEST_TRANSLATION_KEY", "max_retries": 0}
        config = configure(tmp_path, methods=["synonyms", "endpoint_translation"], endpoint_translation=settings)
        made = stage.run(config)
    figures: dict[str, Any] = made.figures
    assert figures["by_method"]["endpoint_translation.tried"] == 20
    assert figures["by_reason"]["endpoint_bad_request_error"] == 1
    assert figures["by_reason"][TOO_DIFFERENT] == 1
    assert {request["key"] for request in requests} == {"Bearer secret"}
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "augmented").rglob("*") if path.is_file())
    methods = Counter(row["method"] for row in variants(tmp_path))
    assert methods["endpoint_translation"] == figures["by_method"]["endpoint_translation.written"]
    monkeypatch.delenv("TEST_TRANSLATION_KEY")
    with pytest.raises(ValueError, match=r"endpoint_translation\.api_key_variable: TEST_TRANSLATION_KEY is not set"):
        stage.read_key(config)


def test_what_is_missing_is_named(tmp_path: Path, without_ray: list[str]) -> None:
    with pytest.raises(ValueError, match="no complete corpus artifact"):
        stage.run(configure(tmp_path))
    write_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"synonyms: no file at .*/none\.txt"):
        stage.run(configure(tmp_path, synonyms={"lexicon_uri": "none.txt"}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    models = {"to_english_uri": "model", "to_chinese_uri": "model"}
    with pytest.raises(ValueError, match=r"/model is no Marian model directory: it lacks source\.spm"):
        stage.run(configure(tmp_path, methods=["local_translation"], local_translation=models))
    (tmp_path / "bad.txt").write_text("not a lexicon")
    with pytest.raises(ValueError, match=r"synonyms\.lexicon_uri: .*bad\.txt: lexicon, line 1: expected"):
        stage.run(configure(tmp_path, synonyms={"lexicon_uri": "bad.txt"}))
    with pytest.raises(ValueError, match=r"no variant left of 20 tried \(dropped: {.*'too_different': 18"):
        stage.run(configure(tmp_path, min_similarity=1.0))


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match=r"endpoint_translation\.base_url: set it"):
        AugmentConfig(methods=["endpoint_translation"])
    with pytest.raises(ValueError, match="methods: each once"):
        AugmentConfig(methods=["synonyms", "synonyms"])
    plan = AugmentConfig(storage_uri="/data").plan()
    assert plan == [
        "read /data/corpus/train, 100% of its documents",
        "read /data/lexicon.txt",
        "write /data/augmented/part-*.jsonl",
    ]


def test_the_floor_tells_paraphrases_from_other_texts() -> None:
    parent = "话说天下大势，分久必合，合久必分。"
    others = ["天下大势就是分久必合。", "酒店的早餐很差，不会再来。", f" {parent}\n"]
    (near, reason), (far, reason_far), (_, reason_same) = SimilarityFloor(0.75).judge([parent] * 3, others)
    assert near > 0.75 > 0.3 > far
    assert (reason, reason_far, reason_same) == (None, TOO_DIFFERENT, UNCHANGED)
    assert SimilarityFloor(0.5).judge([], []) == []


@pytest.mark.slow
def test_local_models_translate_a_corpus(tmp_path: Path, without_ray: list[str]) -> None:
    write_corpus(tmp_path)
    for name in ("zh-en", "en-zh"):
        write_tiny_marian(tmp_path / name)
    models = {"to_english_uri": "zh-en", "to_chinese_uri": "en-zh", "num_beams": 1}
    settings = {"min_similarity": -1.0, "shard_documents": 10, "document_fraction": 0.3}
    config = configure(tmp_path, methods=["local_translation"], local_translation=models, **settings)
    figures: dict[str, Any] = stage.run(config).figures
    assert figures["tried"] == figures["documents"] == figures["written"] + figures["dropped"]
    assert {row["method"] for row in variants(tmp_path)} == {"local_translation"}


@pytest.mark.ray
def test_one_actor_and_two_write_the_same(cluster: object, tmp_path: Path) -> None:
    outputs = []
    for num_actors in (1, 2):
        root = tmp_path / str(num_actors)
        write_corpus(root)
        figures = stage.run(configure(root, num_actors=num_actors)).figures
        outputs.append((variants(root), figures))
    assert outputs[0] == outputs[1]
    assert outputs[0][0]
