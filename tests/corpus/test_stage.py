"""The corpus stage on the shared cluster."""

import bz2
import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.artifacts import Manifest, read_manifest
from app.cluster import LocalCluster
from app.corpus import stage
from app.corpus.config import CorpusConfig
from tests.corpus.killing import FLAG, TRIGGER

pytestmark = pytest.mark.ray

TEXTS = [f"话说天下大势，分久必合，合久必分，此乃第{number}回。" for number in range(60)]
RAW = [*TEXTS, *TEXTS[:25], *["短"] * 5, *["only english text in this document"] * 3]
SPLITS = ("train", "held_out", "rejected")
WORDS = [
    "曹操",
    "刘备",
    "孙权",
    "诸葛亮",
    "周瑜",
    "关羽",
    "张飞",
    "赵云",
    "荆州",
    "赤壁",
    "出兵",
    "归降",
    "大败",
    "火攻",
    "连环",
    "借箭",
    "空城",
    "入川",
    "北伐",
    "托孤",
]


def write_raw(folder: Path, num_files: int) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(num_files):
        lines = [json.dumps({"text": text}) for text in RAW[index::num_files]]
        lines += ["{broken"] if index == 0 else []
        (folder / f"{index}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def make(root: Path, **settings: object) -> Manifest:
    values = {"sources": [{"name": "novel", "uri": "raw/*.gz"}], "storage_uri": str(root), "held_out_fraction": 0.1}
    values |= {"dedup": {"near": False}} | settings
    return stage.run(CorpusConfig.model_validate(values))


def rows(root: Path, split: str) -> list[dict[str, str]]:
    return [
        row for file in sorted((root / "corpus" / split).glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def contents(root: Path) -> dict[str, list[str]]:
    return {name: sorted(map(str, rows(root, name))) for name in SPLITS}


def passage(generator: random.Random, num_words: int = 80) -> str:
    return "".join(generator.choice(WORDS) + generator.choice("，。而又之") for _ in range(num_words))


def variant(generator: random.Random, text: str, num_changes: int) -> str:
    characters = list(text)
    for place in generator.sample(range(len(text)), num_changes):
        characters[place] = generator.choice("天地玄黄宇宙洪荒")
    return "".join(characters)


def test_clean_and_rejected_are_raw(cluster: object, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", 3)
    figures = make(tmp_path).figures
    assert figures["raw"] == len(RAW) + 1
    assert figures["by_rule"] == {"duplicate": 25, "invalid_json": 1, "low_chinese_ratio": 3, "too_short": 5}
    clean = [row["text"] for split in ("train", "held_out") for row in rows(tmp_path, split)]
    assert sorted(clean) == sorted(TEXTS)
    assert Counter(row["rule"] for row in rows(tmp_path, "rejected")) == figures["by_rule"]
    assert 0 < figures["held_out"]["documents"] < 20
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert report["by_rule"] == figures["by_rule"]
    assert len(report["excerpts"]["duplicate"]) == 10
    page = (tmp_path / "corpus" / "report.html").read_text()
    assert "low_chinese_ratio" in page
    assert "only english text" in page


@pytest.mark.parametrize("seed", range(2))
def test_random_corpora_are_conserved_whatever_the_shards(cluster: object, tmp_path: Path, seed: int) -> None:
    """clean + rejected = raw on every source, and the output does not depend on shards, partitions or blocks."""
    generator = random.Random(seed)
    originals = [passage(generator, generator.randint(1, 90)) for _ in range(100)]
    texts = [variant(generator, text, min(len(text), generator.randint(0, 6))) for text in originals for _ in range(3)]
    texts += [*originals, "短", "", "１２３", "english only, nothing else", *originals[:20]]
    generator.shuffle(texts)
    outputs, figures = [], []
    settings = [(1 << 20, 1), (generator.randint(1024, 5000), generator.randint(2, 7)), (2048, 64)]
    for index, (shard_bytes, num_partitions) in enumerate(settings):
        root = tmp_path / str(index)
        write_lines(root / "raw" / "a.jsonl", texts[:200])
        write_lines(root / "raw" / "b.jsonl", texts[200:])
        (root / "raw" / "c.jsonl.bz2").write_bytes(bz2.compress(json.dumps({"text": texts[0]}).encode()))
        sources = [{"name": "one", "uri": "raw/a.jsonl"}, {"name": "two", "uri": "raw/[bc].*"}]
        dedup = {"near": True, "min_similarity": 0.7, "max_line_documents": 50}
        made = make(root, sources=sources, dedup=dedup, shard_bytes=shard_bytes, num_partitions=num_partitions)
        outputs.append(contents(root))
        figures.append(made.figures)
        report = json.loads((root / "corpus" / "report.json").read_text())["counters"]
        for name, raw in (("one", 200), ("two", len(texts) - 200 + 1)):
            rejected = sum(n for key, n in report.items() if key.startswith(f"source.{name}.rejected."))
            assert report[f"source.{name}.raw"] == raw
            kept = report.get(f"source.{name}.train", 0) + report.get(f"source.{name}.held_out", 0)
            assert kept + rejected == raw
    assert figures[0]["raw"] == len(texts) + 1 == figures[0]["clean"] + figures[0]["rejected"]
    assert figures[0]["by_rule"]["near_duplicate"] > 50
    assert figures[0] == figures[1] == figures[2]
    assert outputs[0] == outputs[1] == outputs[2]


def test_near_duplicates_fall_and_name_the_first(cluster: object, tmp_path: Path) -> None:
    generator = random.Random(0)
    first, other = passage(generator), passage(generator)
    write_lines(tmp_path / "raw" / "a.jsonl", [other, first])
    write_lines(tmp_path / "raw" / "b.jsonl", [variant(generator, first, 2), first, passage(generator)])
    sources = [{"name": "books", "uri": "raw/a.jsonl"}, {"name": "web", "uri": "raw/b.jsonl"}]
    figures = make(tmp_path, sources=sources, dedup={"near": True}).figures
    assert figures["by_rule"] == {"duplicate": 1, "near_duplicate": 1}
    place = f"a.jsonl:{len(json.dumps({'text': other}, ensure_ascii=False).encode()) + 1}"
    assert {row["detail"] for row in rows(tmp_path, "rejected")} == {place}
    assert {row["source"] for row in rows(tmp_path, "rejected")} == {"web"}


def test_a_new_shard_is_compared_with_an_existing_corpus(cluster: object, tmp_path: Path) -> None:
    generator = random.Random(0)
    old = [passage(generator) for _ in range(20)]
    new = [passage(generator) for _ in range(5)]
    write_lines(tmp_path / "raw" / "old.jsonl", old)
    write_lines(tmp_path / "raw" / "new.jsonl", [old[3], variant(generator, old[4], 2), *new, new[0]])
    make(tmp_path, sources=[{"name": "old", "uri": "raw/old.jsonl"}], dedup={"near": True})
    dedup = {"near": True, "index_uri": "corpus"}
    sources = [{"name": "new", "uri": "raw/new.jsonl"}]
    made = make(tmp_path, sources=sources, dedup=dedup, output_uri="more")
    assert made.figures["by_rule"] == {"duplicate": 2, "near_duplicate": 1}
    assert made.figures["clean"] == 5
    assert "index" in made.inputs


def test_boilerplate_personal_data_and_evaluation_items_go(cluster: object, tmp_path: Path) -> None:
    generator = random.Random(0)
    footer = "本站所有内容版权归原作者所有，转载请注明出处"
    question = "三国时期，赤壁之战中提出火攻之计并诈降曹操的东吴将领是哪一位"
    texts = [f"{passage(generator)}\n{footer}" for _ in range(6)]
    texts += [f"{passage(generator)}联系电话13812345678", f"{question}？黄盖。{passage(generator, 5)}"]
    write_lines(tmp_path / "raw" / "a.jsonl", texts)
    (tmp_path / "cmmlu.csv").write_text(f",Question,A,B,C,D,Answer\n0,{question},黄盖,周瑜,鲁肃,吕蒙,A\n")
    made = make(
        tmp_path,
        sources=[{"name": "web", "uri": "raw/a.jsonl"}],
        dedup={"near": True, "max_line_documents": 5},
        decontamination={"uris": ["cmmlu.csv"]},
    )
    assert made.figures["by_rule"] == {"contaminated": 1}
    assert made.figures["evaluation_items"] == 1
    assert [row["detail"] for row in rows(tmp_path, "rejected")] == ["cmmlu.csv#1"]
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert report["counters"]["found.cmmlu.csv#1 in web"] == 1
    assert "Evaluation items found" in (tmp_path / "corpus" / "report.html").read_text()
    clean = [row["text"] for split in ("train", "held_out") for row in rows(tmp_path, split)]
    assert len(clean) == 7
    assert not [text for text in clean if footer in text or "13812345678" in text]
    assert [name for name in made.inputs if name.startswith("evaluation ")] == [f"evaluation {tmp_path}/cmmlu.csv"]


def test_an_interrupted_run_goes_on_with_the_shards_that_are_missing(
    cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path / "raw", 4)
    (tmp_path / "undisturbed").mkdir()
    write_raw(tmp_path / "undisturbed" / "raw", 4)
    make(tmp_path / "undisturbed")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_find_duplicates", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    judged = sorted((tmp_path / "corpus" / "work").glob("judged-*.parquet"))
    assert len(judged) == 4
    judged[0].unlink()
    (tmp_path / "corpus" / "work" / f"{judged[1].name}.0.partial").write_bytes(b"half a file")
    before = {path: path.stat().st_mtime_ns for path in judged[1:]}
    with monkeypatch.context() as patch:  # all data files written, no manifest
        patch.setattr(stage, "publish", killed)
        patch.setattr(stage, "_clean_up", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in judged[1:]} == before
    with pytest.raises(ValueError, match="no complete corpus artifact"):
        read_manifest(str(tmp_path / "corpus"), "corpus")
    (tmp_path / "corpus" / "train" / "part-99999.parquet").write_bytes(b"half a file")
    done = make(tmp_path)
    assert set(done.files) == {f"{name}/part-0000{i}.parquet" for name in SPLITS for i in range(4)} | {
        "report.html",
        "report.json",
    }
    assert contents(tmp_path) == contents(tmp_path / "undisturbed")
    assert make(tmp_path) == done


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_killed_worker_or_driver_changes_nothing(cluster: LocalCluster, tmp_path: Path, victim: str) -> None:
    texts = [f"{text}{TRIGGER if number == 40 else ''}" for number, text in enumerate(TEXTS)]
    values = {"sources": [{"name": "novel", "uri": "raw/a.jsonl"}], "shard_bytes": 1024, "dedup": {"near": True}}
    values["rules"] = {"functions": ["tests.corpus.killing:kill_once"]}
    for name in ("disturbed", "undisturbed"):
        write_lines(tmp_path / name / "raw" / "a.jsonl", texts)
    expected = make(tmp_path / "undisturbed", **values).figures
    code = (
        "import os, sys, json; from pathlib import Path; from app.corpus import stage\n"
        "from app.corpus.config import CorpusConfig\n"
        "config = CorpusConfig.model_validate_json(sys.argv[1])\n"
        f"Path({str(FLAG)!r}).write_text({'str(os.getpid())' if victim == 'driver' else repr('worker')})\n"
        "stage.run(config)"
    )
    given = json.dumps(values | {"storage_uri": str(tmp_path / "disturbed"), "held_out_fraction": 0.1})
    command = [sys.executable, "-c", code, given]
    root = Path(__file__).parent.parent.parent
    try:
        first = subprocess.run(command, cwd=root, env={**os.environ, **cluster.environment}, capture_output=True)
        assert not FLAG.exists(), first.stderr.decode()[-2000:]
    finally:
        FLAG.unlink(missing_ok=True)
    if victim == "driver":
        assert first.returncode == -9
        assert not (tmp_path / "disturbed" / "corpus" / "manifest.json").exists()
    else:
        assert first.returncode == 0, first.stderr.decode()[-2000:]
    assert make(tmp_path / "disturbed", **values).figures == expected
    assert contents(tmp_path / "disturbed") == contents(tmp_path / "undisturbed")


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


def test_weights_become_upsampling_of_which_the_least_is_one(cluster: object, tmp_path: Path) -> None:
    generator = random.Random(0)
    write_lines(tmp_path / "raw" / "a.jsonl", [passage(generator, 40) for _ in range(40)])
    write_lines(tmp_path / "raw" / "b.jsonl", [passage(generator, 40) for _ in range(10)])
    sources = [{"name": name, "uri": f"raw/{name}.jsonl", "weight": 1.0} for name in "ab"]
    figures = make(tmp_path, sources=sources, held_out_fraction=0.0).figures
    assert figures["upsampling"]["a"] == 1.0
    assert figures["upsampling"]["b"] == pytest.approx(4.0, rel=0.02)
