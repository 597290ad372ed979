"""Checkpoints on storage: a folder for each, made of the parts of all ranks, with a checksummed manifest written last.

A rank writes its files and then its part list; when all lists are there, rank 0 writes the manifest. A folder without
one is not a checkpoint, and a file that differs from its checksum makes the reader take the one before. Folders carry
the attempt that wrote them: a run that was killed never completes a folder with parts of two attempts.
It knows nothing of DeepSpeed: saver.py fills and reads the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from app import storage

MANIFEST_NAME = "manifest.json"
READ_BYTES = 1 << 22
SCORE = "held_out_bits_per_byte"  # chooses the best checkpoint
PREFERENCE_SCORE = "held_out_preference_loss"  # where pairs of answers are learned from


class FileStamp(BaseModel):
    """Size and SHA-256 of a file."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """What a complete checkpoint holds: the state after `step` steps of a run, as `world_size` parts."""

    model_config = ConfigDict(frozen=True)
    step: int
    attempt: int
    world_size: int
    zero_stage: int
    fingerprint: str
    tokens: int
    versions: dict[str, str]
    config: dict[str, Any]
    created_at: str = ""
    parts: list[dict[str, FileStamp]] = []  # by rank: its files

    @property
    def name(self) -> str:
        """Its folder's name, which is DeepSpeed's tag too."""
        return f"step-{self.step:08d}-{self.attempt:04d}"

    @property
    def files(self) -> dict[str, FileStamp]:
        """All files of all ranks."""
        return {name: stamp for part in self.parts for name, stamp in part.items()}


def folder(run_uri: str) -> str:
    """Where the checkpoints of a run are."""
    return f"{run_uri}/checkpoints"


@contextmanager
def open_stamped(uri: str, stamps: dict[str, FileStamp], name: str) -> Iterator[HashingWriter]:
    """A file to write that appears whole or not at all; its stamp is put into the mapping under the name."""
    with storage.open_atomic(f"{uri}/{name}") as target:
        writer = HashingWriter(target)
        yield writer
    stamps[name] = FileStamp(bytes=writer.written, sha256=writer.digest.hexdigest())


class HashingWriter:
    """The two methods of a file that torch.save calls; hashes what passes."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, content: bytes) -> int:
        """Pass the bytes on."""
        self.digest.update(content)
        self.written += len(content)
        return self._target.write(content)

    def flush(self) -> None:
        """Pass the call on."""
        self._target.flush()


def write_part(uri: str, rank: int, part: Mapping[str, FileStamp]) -> None:
    """Say that a rank has written all its files of the checkpoint folder `uri`."""
    content = json.dumps({name: stamp.model_dump() for name, stamp in part.items()})
    storage.write_atomic(f"{uri}/rank-{rank:05d}.json", content.encode())


def publish(run_uri: str, draft: CheckpointManifest) -> bool:
    """Write the manifest if the parts of all ranks are there; whether they were."""
    uri = f"{folder(run_uri)}/{draft.name}"
    lists = storage.list_files(uri, ".json")
    if len(lists) < draft.world_size:
        return False
    parts = []
    for path in lists:
        with storage.open_file(path) as file:
            parts.append({name: FileStamp.model_validate(stamp) for name, stamp in json.load(file).items()})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = draft.model_copy(update={"parts": parts, "created_at": now})
    storage.write_atomic(f"{uri}/{MANIFEST_NAME}", manifest.model_dump_json().encode())
    return True


def find_complete(run_uri: str) -> list[CheckpointManifest]:
    """The checkpoints that have a readable manifest, newest step first, of one step the newest attempt first."""
    found = []
    for uri in storage.list_files(folder(run_uri), f"/{MANIFEST_NAME}"):
        try:
            with storage.open_file(uri) as file:
                found.append(CheckpointManifest.model_validate_json(file.read()))
        except (ValidationError, FileNotFoundError):
            continue  # of another version, damaged on the disk, or retired since it was listed: as good as none
    return sorted(found, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)


def find_damage(run_uri: str, manifest: CheckpointManifest, rank: int | None = None) -> str:
    """The first file that is missing or differs from its checksum, and how; "" when all are whole.

    With a rank, its own part only; for another number of workers than wrote it all parts are needed.
    """
    files = manifest.files if rank is None else manifest.parts[rank]
    for name, stamp in files.items():
        uri = f"{folder(run_uri)}/{manifest.name}/{name}"
        if not storage.exists(uri):
            return f"{uri} is missing"
        if stamp != _stamp(uri):
            return f"{uri} differs from its checksum"
    return ""


def write_scores(run_uri: str, step: int, figures: Mapping[str, float]) -> None:
    """Keep the held-out figures of the state after `step` steps."""
    storage.write_atomic(f"{run_uri}/validation/step-{step:08d}.json", json.dumps(figures).encode())


def read_scores(run_uri: str) -> dict[int, dict[str, float]]:
    """Held-out figures by step."""
    scores = {}
    for uri in storage.list_files(f"{run_uri}/validation", ".json"):
        with storage.open_file(uri) as file:
            scores[int(uri.rsplit("-", 1)[1].removesuffix(".json"))] = json.load(file)
    return scores


def best_step(scores: Mapping[int, Mapping[str, float]]) -> int:
    """The step with the lowest held-out bits per byte, or loss; the later of equals; -1 when none was scored."""
    scored = {
        step: figures[name] for step, figures in scores.items() for name in (PREFERENCE_SCORE, SCORE) if name in figures
    }
    return min(scored, key=lambda step: (scored[step], -step), default=-1)


def forget_scores(run_uri: str, after_step: int) -> None:
    """Drop the figures of steps that were taken back."""
    for step in read_scores(run_uri):
        if step > after_step:
            storage.delete(f"{run_uri}/validation/step-{step:08d}.json")


def clean(run_uri: str) -> None:
    """Remove what was never completed; no writer may be at work."""
    root = folder(run_uri)
    complete = {manifest.name for manifest in find_complete(run_uri)}
    for name in {path.split("/", 1)[0] for path in storage.file_sizes(root)} if storage.exists(root) else ():
        if name not in complete:
            storage.delete(f"{root}/{name}")


def retire(run_uri: str, keep: int, protected: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints, and those of the protected steps; a manifest goes first."""
    for manifest in find_complete(run_uri)[keep:]:
        if manifest.step not in protected:
            uri = f"{folder(run_uri)}/{manifest.name}"
            storage.delete(f"{uri}/{MANIFEST_NAME}")
            storage.delete(uri)


def _stamp(uri: str) -> FileStamp:
    digest, size = hashlib.sha256(), 0
    with storage.open_file(uri) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileStamp(bytes=size, sha256=digest.hexdigest())
