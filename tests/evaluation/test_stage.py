"""Evaluation on the shared cluster: the figures, and that neither division, a rerun nor a killed actor changes them."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.evaluation import generation, stage
from app.evaluation.config import EvaluateConfig
from app.evaluation.generation import Workers
from tests.evaluation import known_logits
from tests.evaluation.test_choices import write_cmmlu
from tests.tiny_trained import UNTRAINED_BITS_PER_BYTE, write_artifacts, write_texts
from tests.warm_workers import family

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def settings(root: Path, **changes: object) -> EvaluateConfig:
    values = {"storage_uri": str(root), "num_continuations": 20, "prompt_tokens": 4, "continuation_tokens": 6}
    return EvaluateConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_artifacts(folder)
    known_logits.write(folder / "known", "B")
    write_cmmlu(folder / "cmmlu", ["agronomy", "anatomy"], num_questions=50)
    return folder


def choices(**changes: object) -> list[dict[str, object]]:
    subjects = ["agronomy", "anatomy"]
    return [{"name": "cmmlu", "uri": "cmmlu", "layout": "cmmlu", "subjects": subjects, "shots": [0, 5]} | changes]


def test_one_worker_and_three_give_the_same_report(cluster: object, root: Path) -> None:
    one = stage.run(settings(root, num_workers=1, output_uri="one", choices=choices()))
    three = stage.run(settings(root, num_workers=3, output_uri="three", choices=choices()))
    assert one.figures == three.figures
    reports = [json.loads((root / name / "report.json").read_text()) for name in ("one", "three")]
    assert reports[0] == reports[1]
    assert reports[0]["figures"] == one.figures
    assert one.figures["documents"] == 32
    assert one.figures["continuations"] == 20
    assert len(reports[0]["samples"]) == stage.SAMPLES_SHOWN
    assert one.figures["bits_per_byte"] < 0.5 * UNTRAINED_BITS_PER_BYTE
    for name in ("bits_per_byte", "perplexity", "bleu", "chrf", "rougeL", "bertscore", "distinct_2", "repetition"):
        interval = one.figures[f"{name}_interval"]
        assert interval["low"] <= one.figures[name] <= interval["high"]
        assert interval["n"] == (32 if name in ("bits_per_byte", "perplexity") else 20)
        assert interval["tokenisation"]
    assert one.figures["bleu_interval"]["tokenisation"] == "sacrebleu zh"
    page = (root / "one" / "report.html").read_text()
    assert str(one.figures["bits_per_byte"]) in page
    assert {"model", "corpus", f"choices {root}/cmmlu/test/agronomy.csv"} <= set(one.inputs)
    assert not list(root.glob("*-shards"))


def test_the_speed_of_the_endpoints_engine_is_told(cluster: object, root: Path) -> None:
    speed = {"batch_sizes": [1, 3], "prompt_tokens": 4, "new_tokens": 8, "num_runs": 2, "enforce_eager": True}
    manifest = stage.run(settings(root, output_uri="fast", num_continuations=0, max_documents=8, speed=speed))
    for batch in (1, 3):
        interval = manifest.figures[f"tokens_per_second_{batch}_interval"]
        assert 0 < interval["low"] <= manifest.figures[f"tokens_per_second_{batch}"] <= interval["high"]
        assert interval["n"] == 2
        assert interval["tokenisation"].startswith("vLLM ")
    page = (root / "fast" / "report.html").read_text()
    assert page.count("decoded by the endpoint's engine") == 2
    too_long = speed | {"prompt_tokens": 100_000}
    with pytest.raises(ValueError, match=r"speed\.prompt_tokens: no held-out document has 100000 tokens"):
        stage.run(settings(root, output_uri="slow", num_continuations=0, max_documents=8, speed=too_long))


def test_the_score_of_known_logits_is_exact(cluster: object, root: Path) -> None:
    """The model prefers B whatever is asked: right are questions 1, 5, … of the 50 of each subject."""
    asked = choices(max_questions=48)
    manifest = stage.run(settings(root, model_uri="known/model", output_uri="exact", choices=asked))
    for shots in (0, 5):
        assert manifest.figures[f"cmmlu_{shots}_shot_macro"] == 12 / 48
        assert manifest.figures[f"cmmlu_{shots}_shot_micro_interval"]["n"] == 96
    report = json.loads((root / "exact" / "report.json").read_text())
    assert [one["shots"] for one in report["choices"]] == [0, 5]
    assert report["choices"][1]["subjects"] == {"agronomy": [0.25, 48], "anatomy": [0.25, 48]}
    assert report["decontamination"]["cmmlu"] == "2 of 2 files were NOT decontaminated against"
    assert any("lost their beginning" in note for note in report["choices"][1]["notes"])  # 5 examples are too long


def test_documents_too_short_to_continue_are_left_out(cluster: object, root: Path) -> None:
    figures = stage.run(settings(root, prompt_tokens=400, output_uri="short")).figures
    assert "bleu" not in figures
    assert figures["bits_per_byte"] > 0


def test_a_benchmark_that_changed_is_scored_again(cluster: object, root: Path) -> None:
    asked = choices(subjects=["anatomy"], shots=[0])
    before = stage.run(settings(root, output_uri="again", choices=asked))
    assert stage.run(settings(root, output_uri="again", choices=asked)) == before
    write_cmmlu(root / "cmmlu", ["anatomy"], num_questions=51)
    with pytest.raises(ValueError, match="already made, with other input choices"):
        stage.run(settings(root, output_uri="again", choices=asked))


def test_a_rerun_does_only_what_is_missing(cluster: object, root: Path, tmp_path: Path) -> None:
    texts, _ = write_texts()
    model = read_manifest(str(root / "model"), "model").as_input()
    with Workers(model, str(tmp_path / "whole"), 2) as workers:
        whole = workers.score(texts)
    files = sorted((tmp_path / "whole").iterdir())
    assert len(files) == 5  # 288 documents, 64 a shard
    files[1].unlink()
    before = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    with Workers(model, str(tmp_path / "whole"), 1) as workers:
        assert workers.score(texts) == whole
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert files[1].exists()


def test_a_killed_actor_changes_nothing(cluster: LocalCluster, root: Path, tmp_path: Path) -> None:
    texts, _ = write_texts()
    model = read_manifest(str(root / "model"), "model").as_input()
    with Workers(model, str(tmp_path / "undisturbed"), 2) as workers:
        whole = workers.score(texts)
    killed: list[int] = []

    def kill_one() -> None:
        while not list(tmp_path.glob("disturbed/*.json")):
            time.sleep(0.01)
        actors = [p for p in family(cluster) if "_Reader" in " ".join(p.cmdline())]
        os.kill(actors[0].pid, signal.SIGKILL)
        killed.append(actors[0].pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with Workers(model, str(tmp_path / "disturbed"), 2) as workers:
        assert workers.score(texts) == whole
        assert workers.score([*texts, "却说"])[:-1] == pytest.approx(whole)
    killer.join()
    assert killed


def test_more_workers_than_the_cluster_has_room_for(cluster: object, root: Path, tmp_path: Path) -> None:
    texts, _ = write_texts()
    model = read_manifest(str(root / "model"), "model").as_input()
    with Workers(model, str(tmp_path), 9) as workers:
        assert len(workers.map(generation._score, texts, 10)) == len(texts)
