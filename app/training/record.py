"""What a private folder was begun with, a file in it: the same job goes on there, another one is refused.

A record holds `settings` and `data`, each a flat mapping, and whatever else its owner keeps. It knows neither what the
folder holds nor which settings count; the owner chooses them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app import storage

Record = Mapping[str, Any]
_WORDS = {"data": "of other ", "settings": "with "}
SHOWN = 16  # characters of a value


def find_same(uri: str, name: str, key: str, record: Record, overwrite: bool) -> dict[str, Any] | None:
    """The record in the folder's file of that name, if settings and data are those of `record`; None to begin anew.

    `key` is the setting that the folder comes from. Raises ValueError naming what differs, unless overwrite is set:
    then the folder is deleted.
    """
    if not storage.exists(f"{uri}/{name}"):
        return None
    with storage.open_file(f"{uri}/{name}") as file:
        found: dict[str, Any] = json.load(file)
    lines = _differences(found, json.loads(json.dumps(record)))
    if not lines:
        return found
    if not overwrite:
        advice = f"it cannot be resumed so: set {key} to another folder, or --overwrite true to start again"
        raise ValueError("\n".join([*(f"{uri} holds a {name.partition('.')[0]} {line}" for line in lines), advice]))
    storage.delete(uri)
    return None


def write(uri: str, name: str, record: Record) -> None:
    """Begin the folder."""
    storage.write_atomic(f"{uri}/{name}", json.dumps(record, indent=1).encode())


def _differences(found: Record, now: Record) -> list[str]:
    return [
        f"{word}{key}: {str(found[part].get(key))[:SHOWN]}, now {str(now[part].get(key))[:SHOWN]}"
        for part, word in _WORDS.items()
        for key in sorted(found[part].keys() | now[part].keys())
        if found[part].get(key) != now[part].get(key)
    ]
