"""Build the DeepSpeed operators that CPU workers need, once, into the virtual environment.

Run as `python -m app.training.build_ops` at set-up. A process killed while building leaves a lock for which every later
one would wait for ever: a lock that no build holds is removed. Builds nothing where there is a GPU: torch suffices.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from filelock import FileLock

from app import logs

logger = logging.getLogger(__name__)

EXTENSIONS_DIR = Path(sys.prefix) / "torch_extensions"
CPU_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS_DIR), "OMP_NUM_THREADS": "1"}


def build() -> None:
    """Compile the shared-memory communication operator if it is not there yet."""
    os.environ.update(CPU_ENVIRONMENT)
    EXTENSIONS_DIR.mkdir(parents=True, exist_ok=True)
    with FileLock(EXTENSIONS_DIR / "build.lock"):
        for stale in EXTENSIONS_DIR.glob("*/lock"):
            logger.warning("removing the lock of a build that was killed: %s", stale)
            stale.unlink()
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    logs.configure()
    build()
