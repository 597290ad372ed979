"""A new run that goes on from where another one stopped, with other settings: the other's folder is copied.

What a run must have to be resumed is copied, what says which run it is is not: the training stage writes that last, so
a copy that was cut off is made again. The other run must have ended.
"""

from __future__ import annotations

import shutil

from app import storage

PARTS = ("checkpoints", "log", "events", "validation", "architecture")


def copy_run(from_uri: str, to_uri: str) -> None:
    """Copy checkpoints, log, events and scores of a run into an empty folder. Raises ValueError if there are none."""
    names = [name for name in storage.file_sizes(from_uri) if name.split("/")[0] in PARTS]
    if not any(name.startswith("checkpoints/") for name in names):
        raise ValueError(f"{from_uri}: holds no checkpoint to go on from")
    for name in names:
        with storage.open_file(f"{from_uri}/{name}") as source, storage.open_file(f"{to_uri}/{name}", "wb") as target:
            shutil.copyfileobj(source, target)
