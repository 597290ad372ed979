"""Where a worker group begins: the newest checkpoint that is whole, agreed upon by all ranks.

A checkpoint whose files differ from their checksums is passed over, said, and removed; the one before is tried. Rank 0
reads the run's folder, the others check their own shards. It restores nothing; saver.py does.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from app import storage
from app.training import checkpoint, journal
from app.training.checkpoint import CheckpointManifest
from app.training.ledger import Rewind

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """The checkpoint to resume from, if any, and what the attempts before left behind."""

    attempt: int
    manifest: CheckpointManifest | None
    rewinds: list[Rewind]
    reached: int  # the furthest step that an earlier attempt had finished; -1 for none
    last_alive: float  # when it said so

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.manifest.step if self.manifest else 0


def choose(run_uri: str, rank: int, world_size: int) -> Start:
    """The same on every rank; collective. Rank 0 clears away what was never completed."""
    attempt, rewinds, (reached, last_alive) = broadcast(
        (len(journal.read_events(run_uri, "started")) + 1, journal.read_rewinds(run_uri), _last_sign(run_uri))
        if rank == 0
        else None
    )
    if rank == 0:
        checkpoint.clean(run_uri)
    return Start(attempt, choose_checkpoint(run_uri, rank, world_size), rewinds, reached, last_alive)


def choose_checkpoint(run_uri: str, rank: int, world_size: int) -> CheckpointManifest | None:
    """The newest whole one, or None; collective."""
    candidates: list[CheckpointManifest] = broadcast(checkpoint.find_complete(run_uri) if rank == 0 else None)
    for manifest in candidates:
        same_size = manifest.world_size == world_size
        damages: list[Any] = [None] * world_size
        mine = checkpoint.find_damage(run_uri, manifest, rank if same_size else None) if same_size or rank == 0 else ""
        torch.distributed.all_gather_object(damages, mine)
        damage = next(filter(None, damages), "")
        if not damage:
            return manifest
        if rank == 0:
            logger.warning("%s: passing over the checkpoint of step %d", damage, manifest.step)
            journal.add_event(run_uri, "rejected", step=manifest.step, reason=damage)
            storage.delete(f"{checkpoint.folder(run_uri)}/{manifest.name}")
    return None


def drop_suspect(run_uri: str, step: int) -> None:
    """Remove the newest checkpoint if it is of that step and there is an older one: going back to it did not help."""
    complete = checkpoint.find_complete(run_uri)
    if len(complete) > 1 and complete[0].step == step:
        logger.warning("step %d was gone back to before: now to step %d", step, complete[1].step)
        storage.delete(f"{checkpoint.folder(run_uri)}/{complete[0].name}")


def _last_sign(run_uri: str) -> tuple[int, float]:
    uri = f"{run_uri}/{journal.HEARTBEAT}"
    if not storage.exists(uri):
        return -1, 0.0
    with storage.open_file(uri) as file:
        sign = json.load(file)
    return int(sign["step"]), float(sign["time"])


def broadcast(value: T | None) -> T:
    """Rank 0's value on every rank; collective."""
    box = [value]
    torch.distributed.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]
