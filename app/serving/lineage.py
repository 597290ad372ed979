"""From what the served model was made: the walk of its manifest's inputs, as GET /v1/lineage tells it.

Settings and files are left out: clients learn digests and names, not how the machines are set up.
"""

from __future__ import annotations

from typing import Any

from app.artifacts import Input, Manifest, find_input

MAX_DEPTH = 16


def lineage(manifest: Manifest, model_id: str) -> dict[str, Any]:
    """The model's id, kind and digest, and its inputs with theirs, as far as their manifests are still there."""
    return {"model": model_id, **_described(manifest, MAX_DEPTH)}


def _described(manifest: Manifest, depth: int) -> dict[str, Any]:
    inputs = {name: _input(given, depth - 1) for name, given in manifest.inputs.items()}
    return {"kind": manifest.kind, "digest": manifest.digest, "created_at": manifest.created_at, "inputs": inputs}


def _input(given: Input, depth: int) -> dict[str, Any]:
    known = {"name": given.uri.rstrip("/").rsplit("/", 1)[-1], "digest": given.digest}
    manifest = find_input(given) if depth else None
    return known | (_described(manifest, depth) if manifest else {})
