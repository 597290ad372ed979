"""A disk that fills up while a checkpoint is written: a clear error, not retried, and the one before is whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from app.cluster import LocalCluster
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from tests.training.tiny import config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def train_on_full_disk(job: dict[str, Any], part: str) -> dict[str, Any]:
    """The worker's function; files of a checkpoint with this in their path go to a device that is full."""
    from app import storage

    open_atomic = storage.open_atomic

    @contextmanager
    def open_full(uri: str) -> Iterator[IO[bytes]]:
        if part in uri:
            with open("/dev/full", "wb", buffering=0) as target:
                yield target
        else:
            with open_atomic(uri) as target:
                yield target

    storage.open_atomic = open_full
    from app.training.loop import train_per_worker

    return train_per_worker(job | {"began": 0.0, "import_seconds": 0.0})


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        pytest.param("/step-00000020-", 10, id="of all workers", marks=pytest.mark.long),
        pytest.param("/step-00000030-0001/zero_pp_rank_1_", 20, id="of one, at the last step"),
    ],
)
def test_a_full_disk(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, kept: int
) -> None:
    write_inputs(tmp_path)
    config = TrainConfig.model_validate(config_of(tmp_path, tmp_path, num_steps=30))
    run = f"{tmp_path}/checkpoints"
    with monkeypatch.context() as patched:
        patched.setattr(stage, "_train", functools.partial(train_on_full_disk, part=part))
        error = (
            rf"^checkpoint at step \d+: \[Errno 28\] No space left on device; the checkpoint of step {kept} is whole$"
        )
        with pytest.raises(ValueError, match=error):
            stage.run(config)
    assert len(journal.read_events(run, "started")) == 1
    manifest, *_ = checkpoint.find_complete(run)
    assert manifest.step == kept
    assert checkpoint.find_damage(run, manifest) == ""
    stage.run(config)
    assert [event["step"] for event in journal.read_events(run, "started")] == [0, kept]
    assert [line["step"] for line in log_of(tmp_path)] == list(range(30))
