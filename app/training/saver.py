"""Between DeepSpeed and the checkpoint folders: copies the state to memory, writes it behind the steps, reads it back.

`begin` makes DeepSpeed save into an engine that keeps copies of the tensors in host memory; a thread serialises,
checksums and stores them while training goes on, then rank 0 completes the checkpoint and retires old ones. `load`
gives each rank its own shards; for another number of workers they are converted to a universal checkpoint first
(Lian et al. 2024, arXiv:2406.18820). The random state is reseeded every step and not stored,
nor are weights that an adapter leaves as they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from app import storage
from app.training import checkpoint, nvme
from app.training.checkpoint import CheckpointManifest, FileStamp

POLL_SECONDS = 0.05


class Saver:
    """Writes the checkpoints of one worker, one at a time; every rank makes the same calls."""

    def __init__(self, engine: Any, run_uri: str, retire: Callable[[], None]) -> None:
        """`retire` is called by rank 0 after each complete checkpoint, in the thread that wrote it."""
        self._engine = engine
        self._run_uri = run_uri
        self._retire = retire
        self._memory = engine.checkpoint_engine = _MemoryEngine()
        self._rank = engine.global_rank
        self._thread: threading.Thread | None = None
        self._left = threading.Event()
        self.error: Exception | None = None
        self.completed = 0  # steps of the newest complete checkpoint that this worker knows of; rank 0 knows all

    def begin(self, draft: CheckpointManifest) -> None:
        """Copy the state and return; collective. Waits first if the checkpoint before is still being written.

        Does nothing once a rank has failed to write its part.
        """
        if not self.settle():
            return
        with tempfile.TemporaryDirectory() as scratch, nvme.whole(self._engine, changes=False):
            self._engine.save_checkpoint(scratch, draft.name, save_latest=False, exclude_frozen_parameters=True)
            states = self._memory.take(scratch)
        self._thread = threading.Thread(target=self._write, args=(draft, states), name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> bool:
        """Wait until the checkpoint begun last is complete; collective. False when a rank could not write its part."""
        while True:
            mine = self._thread is not None and self._thread.is_alive(), self.error is not None
            states: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
            if any(has_failed for _, has_failed in states):
                self._left.set()  # rank 0 waits for parts that will not come
                return False
            if not any(is_writing for is_writing, _ in states):
                return True
            time.sleep(POLL_SECONDS)

    def _write(self, draft: CheckpointManifest, states: dict[str, Any]) -> None:
        try:
            uri = f"{checkpoint.folder(self._run_uri)}/{draft.name}"
            part: dict[str, FileStamp] = {}
            for path in list(states):
                with checkpoint.open_stamped(uri, part, path.split("/", 1)[1]) as target:
                    torch.save(states.pop(path), target)  # type: ignore[arg-type]  # it writes, and torch asks no more
            checkpoint.write_part(uri, self._rank, part)
            while self._rank == 0 and not checkpoint.publish(self._run_uri, draft):
                if self._left.wait(POLL_SECONDS):
                    return
            self.completed = draft.step
            if self._rank == 0:
                self._retire()
        except Exception as error:
            self.error = error  # the loop asks after every step


def load(engine: Any, run_uri: str, manifest: CheckpointManifest) -> None:
    """Restore weights, optimizer and counters; collective. Raises ValueError when DeepSpeed cannot read them."""
    world_size = torch.distributed.get_world_size()
    root = checkpoint.folder(run_uri)
    is_universal = manifest.world_size != world_size and manifest.zero_stage > 0
    if not is_universal:
        _load(engine, root, manifest.name, is_universal=False)
        return
    name = f"{manifest.name}-for-{world_size}"
    if engine.global_rank == 0:
        _convert(f"{root}/{manifest.name}", f"{root}/{name}")
    torch.distributed.barrier()
    _load(engine, root, name, is_universal=True)
    _load_buffers(engine.module, f"{root}/{manifest.name}")
    torch.distributed.barrier()
    if engine.global_rank == 0:
        storage.delete(f"{root}/{name}")


def _load(engine: Any, root: str, name: str, is_universal: bool) -> None:
    with storage.local_copy(f"{root}/{name}") as local:
        engine._config.load_universal_checkpoint = is_universal  # DeepSpeed takes it from the config; it varies here
        groups = [_settings(group) for group in engine.optimizer.param_groups]
        is_whole = all(parameter.requires_grad for parameter in engine.module.parameters())
        with nvme.whole(engine, changes=True):
            path, _ = engine.load_checkpoint(str(local.parent), tag=local.name, load_module_strict=is_whole)
    if path is None:
        raise ValueError(f"{root}/{name}: cannot be resumed from; delete it to use the one before")
    if is_universal:
        _separate_groups(engine.optimizer, groups)


def _load_buffers(module: torch.nn.Module, uri: str) -> None:
    """What of a model is no parameter, as the bias of a router: a universal checkpoint has none of it."""
    with storage.open_file(storage.list_files(uri, "model_states.pt")[0]) as file:
        saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
    for name, buffer in module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _separate_groups(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Mend what DeepSpeed 0.19.8 loads from a universal checkpoint under ZeRO-3.

    It gives every parameter group the settings of the first, so that all weights decay, and all groups one tensor that
    counts steps, so that each of them counts for the others.
    """
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _convert(source_uri: str, target_uri: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    storage.delete(target_uri)
    with storage.local_copy(source_uri) as source, tempfile.TemporaryDirectory() as scratch:
        local = target_uri if "://" not in target_uri else scratch
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
        names = {"input_folder": str(source), "output_folder": local}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(SimpleNamespace(**names, **options, strict=True, inject_missing_state=True))
        if local == scratch:
            storage.upload(Path(scratch), target_uri)


class _MemoryEngine(CheckpointEngine):  # type: ignore[misc]
    """What DeepSpeed saves, as copies in host memory by path; reads files as usual."""

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[str, Any] = {}

    def take(self, folder: str) -> dict[str, Any]:
        """The states saved since the last call, by path below the folder."""
        taken, self._states = self._states, {}
        return {os.path.relpath(path, folder): state for path, state in taken.items()}

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy; the tensors change with the next step."""
        self._states[path] = _copy(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Checkpoints hold DeepSpeed's own objects, so they are unpickled: their folder must be yours alone."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The thread commits."""
        return True


def _copy(value: Any) -> Any:
    """The value with tensors copied to host memory, each with a storage of its own size."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
        return copy.copy_(value.detach())
    if isinstance(value, dict):
        return type(value)((key, _copy(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copy(item) for item in value)
    return value
