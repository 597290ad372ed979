"""Evaluation on the shared cluster: the figures, and that they do not depend on how the work is divided."""

import json
from pathlib import Path

import pytest

from app.evaluation import stage
from app.evaluation.config import EvaluateConfig
from tests.tiny_trained import UNTRAINED_BITS_PER_BYTE, write_artifacts

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def settings(root: Path, **changes: object) -> EvaluateConfig:
    values = {"storage_uri": str(root), "num_continuations": 6, "prompt_tokens": 4, "continuation_tokens": 6}
    return EvaluateConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_artifacts(folder)
    return folder


def test_one_shard_and_three_give_the_same_report(cluster: object, root: Path) -> None:
    one = stage.run(settings(root, num_shards=1, output_uri="one"))
    three = stage.run(settings(root, num_shards=3, output_uri="three"))
    assert one.figures == three.figures
    reports = [json.loads((root / name / "report.json").read_text()) for name in ("one", "three")]
    assert reports[0] == reports[1]
    assert reports[0]["figures"] == one.figures
    assert one.figures["documents"] == 32
    assert one.figures["continuations"] == len(reports[0]["samples"]) == 6
    assert one.figures["bits_per_byte"] < 0.5 * UNTRAINED_BITS_PER_BYTE
    page = (root / "one" / "report.html").read_text()
    assert str(one.figures["bits_per_byte"]) in page
    assert {name: given.uri for name, given in one.inputs.items()} == {
        "model": f"{root}/model",
        "corpus": f"{root}/corpus",
    }


def test_documents_too_short_to_continue_are_left_out(cluster: object, root: Path) -> None:
    figures = stage.run(settings(root, prompt_tokens=400, output_uri="short")).figures
    assert "bleu" not in figures
    assert figures["bits_per_byte"] > 0
