"""Optimizer states that DeepSpeed keeps in files on a node's disk (ZeRO-Infinity, Rajbhandari et al. 2021,
arXiv:2104.07857).

`whole` has all of them in host memory while a checkpoint is written or read, so that checkpoints are the same wherever
states are kept. DeepSpeed 0.19.8 copies its files instead: what exports a model does not read them, and loading forgets
how many steps the optimizer has made. It does not step; DeepSpeed swaps around that by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def prepare() -> None:
    """Load the operators that read and write the files; the first worker of a node compiles them for all, in minutes.

    Raises ValueError when they cannot be compiled here.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ValueError("offload_optimizer nvme: needs libaio's headers (Debian: libaio-dev) and a C++ compiler")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # another ninja compiles anew
    if os.access(sys.prefix, os.W_OK):  # so does another environment, in the folder that all share by default
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    folder = Path(cpp_extension._get_build_directory(builder.name, False))
    with (folder.parent / "compiling").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # is gone with its process, unlike the locks that torch leaves when killed
        for name in (builder.name, "pin_memory"):
            (folder.parent / name / "lock").unlink(missing_ok=True)
        if not (folder / f"{builder.name}.so").exists():
            logger.info("compiling DeepSpeed's file operators in %s, once: some minutes", folder)
        builder.load(verbose=False)


@contextlib.contextmanager
def whole(engine: Any, changes: bool) -> Iterator[None]:
    """The optimizer's states in memory while the block runs, and in their files afterwards; written if it `changes`
    them. Does nothing where states are not kept in files.
    """
    optimizer = engine.optimizer
    if not getattr(optimizer, "swap_optimizer", False):
        yield
        return
    groups = [i for i in range(len(optimizer.fp16_groups)) if optimizer._swappable_optimizer_subgroup(i)]
    for i in groups:
        _read(optimizer, i)
    optimizer.swap_optimizer = False
    try:
        yield
    finally:
        optimizer.swap_optimizer = True
    if changes:
        optimizer.optimizer_swapper.purge_state()  # forgets tensors that were replaced, to find the new ones
        for i in groups:
            _write(optimizer, i)
    else:
        for i in groups:
            _swapped(optimizer, i).release_memory()


def clear(engine: Any) -> None:
    """Delete this worker's files; the engine cannot step any more."""
    if not getattr(engine.optimizer, "swap_optimizer", False):
        return
    folder = Path(engine.optimizer.optimizer_swapper.swap_folder)  # of a run: zero_stage_3/optimizer/rank0
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another worker still has its own
        for parent in list(folder.parents)[:3]:
            parent.rmdir()


def _read(optimizer: Any, group: int) -> None:
    optimizer._optimizer_states_and_gradient_swap_in(group)
    tensors = _swapped(optimizer, group).get_compute_tensors()
    copies = [tensor.detach().clone() for tensor in tensors]
    optimizer._release_swap_buffers(group)
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.data = copy


def _write(optimizer: Any, group: int) -> None:
    swapper, swapped = optimizer.optimizer_swapper, _swapped(optimizer, group)
    tensors = swapped.get_compute_tensors()
    values = [tensor.data for tensor in tensors]
    length = swapper._io_aligned_numel(swapped.numel())
    swapped.swap_buffers = swapper.swap_buffer_manager.allocate(length, len(values), values[0].dtype)
    swapped.set_swap_buffers(swapped.swap_buffers, length)
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
    optimizer._optimizer_states_and_gradient_swap_out(group)


def _swapped(optimizer: Any, group: int) -> Any:
    """What DeepSpeed knows of a group's weights and states, whether here or in files."""
    return optimizer.optimizer_swapper._get_param_swap_info(optimizer.fp32_partitioned_groups_flat[group])
