"""A run that is disturbed equals the undisturbed one, bit for bit; what is exported is what was trained."""

import math
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster, LocalClusterConfig, start_local, stop_local
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from tests.training.runs import assert_equal_runs, finish, start, wait_for_checkpoint
from tests.training.tiny import BLOCK_TOKENS, HELD_OUT_BYTES, VOCAB_SIZE, config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root)))
    return root


def test_the_model_scores_what_the_trainer_reported(undisturbed: Path) -> None:
    """The exported weights, loaded by transformers alone, give the trainer's bits per byte."""
    import torch
    from transformers import AutoModelForCausalLM

    figures = read_manifest(f"{undisturbed}/model", "model").figures
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "model")
    assert model.dtype == torch.float32
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["restarts"] == 0
    rows = pq.read_table(undisturbed / "tokens" / "held_out" / "0.parquet").column("input_ids").to_pylist()
    blocks = torch.tensor(rows)  # [7, T]
    with torch.no_grad():
        loss = float(model(input_ids=blocks, labels=blocks).loss)  # mean over T-1 scored tokens of a block
    scored = 7 * (BLOCK_TOKENS - 1)
    scored_bytes = HELD_OUT_BYTES * scored / (7 * BLOCK_TOKENS + 5)
    bits_per_byte = loss * scored / math.log(2) / scored_bytes
    assert log_of(undisturbed)[-1]["held_out_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    assert loss < 0.7 * math.log(VOCAB_SIZE)  # it has learned, so the comparison says something


def test_a_killed_job_submitted_again_changes_nothing(undisturbed: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    """SIGKILL of the whole job; the newest checkpoint is damaged then, and a newer one was never completed."""
    first = start(tmp_path, undisturbed, cluster)
    wait_for_checkpoint(tmp_path, first, 20)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "model" / "manifest.json").exists()
    newest, *_ = checkpoint.find_complete(f"{tmp_path}/checkpoints")
    folder = tmp_path / "checkpoints" / "checkpoints" / newest.name
    shard = folder / next(iter(newest.parts[1]))
    shard.write_bytes(shard.read_bytes()[:-1])
    half_written = folder.with_name("step-00000055-0001")
    half_written.mkdir()
    (half_written / "rank-00000.json").write_text("{")
    said = finish(start(tmp_path, undisturbed, cluster))
    assert f"{shard} differs from its checksum: passing over the checkpoint of step {newest.step}" in said
    assert f"resuming after step {newest.step - 10}" in said
    assert_equal_runs(tmp_path, undisturbed)
    figures = read_manifest(f"{tmp_path}/model", "model").figures
    assert figures["restarts"] == 1
    assert [event["step"] for event in journal.read_events(f"{tmp_path}/checkpoints", "rejected")] == [newest.step]


@pytest.mark.long  # two clusters
def test_a_lost_head_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole cluster, job and all; a new one, started in its folder, goes on where it was."""
    settings = LocalClusterConfig(folder=str(tmp_path / "cluster"), num_cpus=3)
    head = start_local(settings)
    job = start(tmp_path, undisturbed, head)
    try:
        wait_for_checkpoint(tmp_path, job, 10)
        os.killpg(head.pid, signal.SIGKILL)
        job.kill()  # on a real cluster the driver runs on the head
        job.wait()
        again = start_local(settings)
        assert again.pid != head.pid
        assert "resuming after step" in finish(start(tmp_path, undisturbed, again))
    finally:
        stop_local(tmp_path / "cluster")
    assert_equal_runs(tmp_path, undisturbed)


def test_a_job_that_is_told_to_end_leaves_a_checkpoint(
    undisturbed: Path, cluster: LocalCluster, tmp_path: Path
) -> None:
    """SIGTERM before the first checkpoint: one is made at that step, and the next job goes on from there."""
    job = start(tmp_path, undisturbed, cluster, checkpoint_interval_steps=60)
    while not journal.read_events(f"{tmp_path}/checkpoints", "first_step"):
        assert job.poll() is None
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGTERM)
    _, said = job.communicate(timeout=120)
    assert job.returncode == stage.STOPPED, said[-3000:]
    (manifest,) = checkpoint.find_complete(f"{tmp_path}/checkpoints")
    assert f"stopped after a checkpoint at step {manifest.step}; submit the job again to go on" in said
    assert 0 < manifest.step < 60
    said = finish(start(tmp_path, undisturbed, cluster, checkpoint_interval_steps=60))
    assert f"resuming after step {manifest.step}" in said
    assert_equal_runs(tmp_path, undisturbed)


def test_other_data_or_settings_are_refused(undisturbed: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    record = (undisturbed / "checkpoints" / stage.RECORD).read_text()
    (tmp_path / "checkpoints" / stage.RECORD).write_text(record)
    other = TrainConfig.model_validate(config_of(undisturbed, tmp_path, optimizer={"warmup_steps": 2}))
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.005, now 0.001[\s\S]*--overwrite true"):
        stage.run(other)
    write_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run of other tokens: \w+, now \w+\n"):
        stage.run(TrainConfig.model_validate(config_of(tmp_path, tmp_path)))
    assert not (tmp_path / "model").exists()


def test_a_diverging_run_is_the_users_to_mend(undisturbed: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    changes = {"num_steps": 20, "optimizer": {"learning_rate": 1e30, "warmup_steps": 0}}
    job = start(tmp_path, undisturbed, cluster, **changes)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 2, said[-3000:]
    last = said.splitlines()[-1]
    assert "there is no checkpoint to go back to; lower optimizer.learning_rate or check the data" in last
    assert len(journal.read_events(f"{tmp_path}/checkpoints", "started")) == 1  # not retried
    assert not (tmp_path / "model").exists()
