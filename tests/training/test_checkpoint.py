"""A checkpoint is whole or it is none, whenever its writers are killed and whatever happens to its files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.training import checkpoint
from app.training.checkpoint import CheckpointManifest

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from app.training import checkpoint
from tests.training.test_checkpoint import draft_of
run_uri, attempt = sys.argv[1], int(sys.argv[2])
for step in range(1, 100_000):
    draft = draft_of(step, attempt)
    for rank in range(2):
        part = {}
        with checkpoint.open_stamped(f"{run_uri}/checkpoints/{draft.name}", part, f"rank{rank}.pt") as file:
            for block in range(20):
                file.write(bytes([step % 251]) * 10_000)
        checkpoint.write_part(f"{run_uri}/checkpoints/{draft.name}", rank, part)
    checkpoint.publish(run_uri, draft)
    checkpoint.retire(run_uri, 2, set())
"""


def draft_of(step: int, attempt: int = 1) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        attempt=attempt,
        world_size=2,
        zero_stage=3,
        fingerprint="f",
        tokens=0,
        versions={},
        config={},
    )


def write(run_uri: Path, step: int, attempt: int = 1, ranks: int = 2) -> Path:
    """The folder of a checkpoint of two ranks, of which so many have written their parts."""
    draft = draft_of(step, attempt)
    folder = run_uri / "checkpoints" / draft.name
    for rank in range(ranks):
        part: dict[str, checkpoint.FileStamp] = {}
        with checkpoint.open_stamped(str(folder), part, f"rank{rank}.pt") as file:
            file.write(b"%d of %d" % (rank, step))
        checkpoint.write_part(str(folder), rank, part)
    assert checkpoint.publish(str(run_uri), draft) is (ranks == 2)
    return folder


def steps(run_uri: Path) -> list[int]:
    return [manifest.step for manifest in checkpoint.find_complete(str(run_uri))]


def test_a_checkpoint_is_complete_with_the_part_of_every_rank(tmp_path: Path) -> None:
    assert steps(tmp_path) == []
    write(tmp_path, 10)
    write(tmp_path, 20, ranks=1)
    assert steps(tmp_path) == [10]
    (manifest,) = checkpoint.find_complete(str(tmp_path))
    assert [list(part) for part in manifest.parts] == [["rank0.pt"], ["rank1.pt"]]
    assert manifest.files["rank1.pt"].bytes == len(b"1 of 10")
    checkpoint.clean(str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [manifest.name]


def test_the_parts_of_two_attempts_make_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 10, attempt=1, ranks=1)
    folder = tmp_path / "checkpoints" / draft_of(10, attempt=2).name
    checkpoint.write_part(str(folder), 1, {})
    assert not checkpoint.publish(str(tmp_path), draft_of(10, attempt=2))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_file_is_found(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 10)
    file = write(tmp_path, 20) / "rank1.pt"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else b"X" + content[1:])
    newest, before = checkpoint.find_complete(str(tmp_path))
    found = checkpoint.find_damage(str(tmp_path), newest)
    assert found == f"{file} " + ("is missing" if damage == "missing" else "differs from its checksum")
    assert checkpoint.find_damage(str(tmp_path), newest, rank=0) == ""
    assert checkpoint.find_damage(str(tmp_path), newest, rank=1) == found
    assert checkpoint.find_damage(str(tmp_path), before) == ""


def test_a_manifest_cut_short_is_none(tmp_path: Path) -> None:
    write(tmp_path, 10)
    manifest = write(tmp_path, 20) / checkpoint.MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes()[:50])
    assert steps(tmp_path) == [10]


def test_the_newest_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    write(tmp_path, 50, attempt=2)
    checkpoint.retire(str(tmp_path), keep=2, protected={20})
    assert steps(tmp_path) == [50, 50, 20]
    assert [manifest.attempt for manifest in checkpoint.find_complete(str(tmp_path))] == [2, 1, 1]


def test_the_best_step() -> None:
    scores = {10: {"held_out_bits_per_byte": 2.0}, 20: {"held_out_bits_per_byte": 1.5}, 30: {"other": 0.1}}
    assert checkpoint.best_step(scores) == 20
    assert checkpoint.best_step(scores | {40: {"held_out_bits_per_byte": 1.5}}) == 40
    assert checkpoint.best_step({30: {"other": 0.1}}) == -1


def test_scores_of_steps_that_were_taken_back_are_forgotten(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.write_scores(str(tmp_path), step, {"held_out_bits_per_byte": step / 10})
    checkpoint.forget_scores(str(tmp_path), after_step=20)
    assert checkpoint.read_scores(str(tmp_path)) == {step: {"held_out_bits_per_byte": step / 10} for step in (10, 20)}


@pytest.mark.slow
def test_writers_killed_at_random_moments_leave_whole_checkpoints_only(tmp_path: Path) -> None:
    """12 SIGKILLs while parts, manifests and deletions follow each other without a pause."""
    moments = random.Random(0)
    newest = 0
    for attempt in range(1, 13):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(attempt)]
        writer = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 30
        while not any(manifest.attempt == attempt for manifest in checkpoint.find_complete(str(tmp_path))):
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.random() * 0.1)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        complete = checkpoint.find_complete(str(tmp_path))
        assert len(complete) >= 2 or attempt == 1
        assert [checkpoint.find_damage(str(tmp_path), manifest) for manifest in complete] == [""] * len(complete)
        newest = max(newest, complete[0].step)
        checkpoint.clean(str(tmp_path))
        assert checkpoint.find_complete(str(tmp_path)) == complete
    assert newest > 2
    json.loads((tmp_path / "checkpoints" / complete[0].name / checkpoint.MANIFEST_NAME).read_text())


@pytest.mark.slow
def test_a_checkpoint_that_did_not_help_is_dropped_if_there_is_an_older_one(tmp_path: Path) -> None:
    from app.training.restart import drop_suspect  # imports torch

    write(tmp_path, 10)
    write(tmp_path, 20)
    drop_suspect(str(tmp_path), 10)
    assert steps(tmp_path) == [20, 10]
    drop_suspect(str(tmp_path), 20)
    assert steps(tmp_path) == [10]
    drop_suspect(str(tmp_path), 10)
    assert steps(tmp_path) == [10]
