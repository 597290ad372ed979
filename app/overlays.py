"""Packages that only some processes should see, each in a folder of its own that is put first on a task's path.

They pin other versions of what the rest needs, or are noticed by libraries that then load them everywhere. `make setup`
fills the folders from requirements/<name>.lock. It installs nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(sys.prefix) / "overlays"


def python_path(overlays: Mapping[str, str], what: str) -> str:
    """PYTHONPATH of a task that needs these: name of an overlay -> a package that is in it.

    Raises ValueError with the command that makes a missing one; `what` is what the user asked for.
    """
    folders = [ROOT / name for name in overlays]
    for folder, package in zip(folders, overlays.values(), strict=True):
        if not (folder / package).is_dir():
            raise ValueError(
                f"{what} is not installed in {folder}: run make setup, or "
                f"pip install --no-deps --target {folder} -r requirements/{folder.name}.lock"
            )
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
