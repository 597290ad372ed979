"""The shipped sizes fit the devices that they name, and a plan that does not says what would."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.config import read_yaml, validate
from app.planning import stage
from app.planning.config import PlanConfig

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "jobs" / "configs").glob("*/plan_capacity.yaml"))


def preset(path: Path) -> PlanConfig:
    return validate(PlanConfig, read_yaml(PlanConfig, path))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.parent.name)
def test_every_size_fits_its_devices(path: Path) -> None:
    config = preset(path)
    capacity = stage.run(config)
    assert not capacity.misfit
    assert "It fits: " in capacity.text
    for file, key, planned in (
        ("train_tokenizer.yaml", "vocab_size", config.vocab_size),
        ("pack_tokens.yaml", "block_tokens", config.block_tokens),
    ):
        assert yaml.safe_load((path.parent / file).read_text())[key] == planned


def test_there_is_a_plan_of_every_size() -> None:
    sizes = (path.parent for path in (ROOT / "jobs" / "configs").glob("*/train_tokenizer.yaml"))
    assert [path.parent for path in PRESETS] == sorted(sizes)


def test_the_table_of_a_mixture_of_experts() -> None:
    text = stage.run(preset(ROOT / "jobs" / "configs" / "30b-a3b" / "plan_capacity.yaml")).text
    assert "30.2 B, 2.99 B active: embeddings 262 M, attention 906 M, experts 29.0 B, routers 12.6 M" in text
    assert "64 workers × 8 forward passes × 2 blocks" in text


def test_the_job_says_what_would_fit() -> None:
    command = [sys.executable, "jobs/plan_capacity.py", "--config", "jobs/configs/13b/plan_capacity.yaml"]
    command += ["--train_model.micro_batch_sequences", "16", "--train_model.zero_stage", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    first, *_, last = done.stderr.splitlines()
    assert first == "error: it does not fit: 135 GiB needed of 72.0 GiB"
    assert last == "error: the nearest plan that fits: --micro_batch_sequences 2: 64.6 GiB"
    assert "what helps: --zero_stage 2: 112 GiB" in done.stderr
    assert done.stdout.startswith("parameters")


def test_what_training_refuses_is_not_planned() -> None:
    config = PlanConfig().with_overrides({"train_model.zero_stage": 0, "train_model.offload_optimizer": "cpu"})
    with pytest.raises(ValueError, match="the nearest job that works: --zero_stage 1"):
        stage.run(config)


def test_a_cpu_needs_a_size() -> None:
    with pytest.raises(ValueError, match="device CPU needs device_memory_gib"):
        PlanConfig().with_overrides({"device": "CPU"})


def test_workers_that_share_a_model_fill_whole_groups() -> None:
    config = PlanConfig().with_overrides({"train_model.tensor_parallel": 2, "train_model.num_workers": 4})
    with pytest.raises(ValueError, match="num_devices: 7 is no multiple of the 2 that share a model"):
        stage.run(config.with_overrides({"num_devices": 7, "train_model.zero_stage": 1}))


def test_the_table_of_a_pipeline() -> None:
    changes = {"pipeline_stages": 4, "num_workers": 8, "zero_stage": 1, "global_batch_sequences": 64}
    config = PlanConfig().with_overrides({f"train_model.{key}": value for key, value in changes.items()})
    text = stage.run(config).text
    assert "on 8 × A100-80GB, ZeRO-1, in the stage that takes most" in text
    assert "a step              pipeline of 4 stages × 2 replicas: of 4 micro-batches" in text
