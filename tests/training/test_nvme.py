"""Optimizer states in files on a disk: the same run as with states in memory, also after a stop, on other workers too.

The first run compiles DeepSpeed's file operators, some minutes; needs libaio's headers.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from app.cluster import LocalCluster
from app.training import nvme, stage
from app.training.config import TrainConfig
from tests.training.runs import assert_equal_runs, finish, start
from tests.training.tiny import config_of, log_of, write_inputs

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 4}
SETTINGS: dict[str, Any] = {
    "model": SIZES,  # of its two groups DeepSpeed keeps matrices in files, and the others, below a MiB, in memory
    "num_steps": 12,
    "checkpoint_interval_steps": 4,
    "evaluation_interval_steps": 12,
    "num_workers": 2,
}


@pytest.fixture(scope="module")
def in_memory(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root, **SETTINGS, offload_optimizer="cpu")))
    return root


def on_disk(root: Path) -> dict[str, Any]:
    return SETTINGS | {"offload_optimizer": "nvme", "nvme_dir": str(root / "disk")}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"offload_optimizer": "nvme"}, "belong together"),
        ({"nvme_dir": "/disk"}, "belong together"),
        ({"offload_optimizer": "nvme", "nvme_dir": "disk"}, "nvme_dir: 'disk' must be absolute"),
    ],
)
def test_the_folder_is_given_with_the_setting_and_whole(given: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig.model_validate(given)


def test_a_machine_that_cannot_compile_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ValueError, match="offload_optimizer nvme: needs libaio's headers"):
        nvme.prepare()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_states_on_a_disk_change_nothing(in_memory: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    job = start(tmp_path, in_memory, cluster, **on_disk(tmp_path))
    while not {path.parent.name for path in (tmp_path / "disk").rglob("exp_avg*.swp")} >= {"rank0", "rank1"}:
        assert job.poll() is None, finish(job)
        time.sleep(0.02)
    finish(job)
    assert_equal_runs(tmp_path, in_memory)
    assert not any((tmp_path / "disk").iterdir())  # its files are gone with it


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_stopped_run_goes_on_from_its_files(in_memory: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    """On as many workers bit for bit, on another number with the same losses, and without a disk."""
    first, alone, moved = (tmp_path / name for name in ("first", "alone", "moved"))
    first.mkdir()
    job = start(first, in_memory, cluster, **on_disk(tmp_path), stop_at_step=6)
    job.communicate(timeout=300)
    assert job.returncode == stage.STOPPED
    for root in (alone, moved):
        shutil.copytree(first, root)
    finish(start(first, in_memory, cluster, **on_disk(tmp_path)))
    assert_equal_runs(first, in_memory)
    finish(start(moved, in_memory, cluster, **SETTINGS, offload_optimizer="cpu"))
    assert_equal_runs(moved, in_memory)
    finish(start(alone, in_memory, cluster, **on_disk(tmp_path) | {"num_workers": 1}))
    losses = ([line["loss"] for line in log_of(root)] for root in (alone, in_memory))
    assert next(losses) == pytest.approx(next(losses), abs=1e-4)
