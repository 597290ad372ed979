"""The manifest: what an artifact is, from what it was made, and the proof that it is whole.

A stage calls `Manifest.draft`, returns what `find_complete` finds, else works and calls `publish`, which writes
`manifest.json` last. An output without it does not exist for any reader. Lineage is the walk of `inputs`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from app import storage
from app.config import RunConfig

logger = logging.getLogger(__name__)

Kind = Literal["corpus", "augmented", "tokenizer", "tokens", "model", "adapter", "report"]
EVALUATION = "evaluation"  # begins the names of inputs that were kept out of a corpus
GATE = "gate"  # the figure of a model that says whether it may be served: "passed", or "failed: …"
MANIFEST_NAME = "manifest.json"
_WHERE_NOT_WHAT = {"storage_uri", "overwrite"}  # settings that change where or whether, not what is made


class Input(BaseModel):
    """One thing an artifact was made from: where it lay and the digest it had."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uri: str
    digest: str


class Manifest(BaseModel):
    """kind, settings, inputs by digest, files with sizes in bytes, and the figures of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    uri: str
    config: dict[str, Any]
    inputs: dict[str, Input] = {}
    files: dict[str, int] = {}
    figures: dict[str, float | int | str | dict[str, float | int | str]] = {}
    created_at: str = ""

    @classmethod
    def draft(cls, kind: Kind, uri: str, config: RunConfig, inputs: dict[str, Input]) -> Manifest:
        """The manifest of work not yet done."""
        return cls(kind=kind, uri=uri, config=config.model_dump(mode="json"), inputs=inputs)

    @property
    def digest(self) -> str:
        """Hash of what was made (files and figures) and from what; the same work redone elsewhere may differ."""
        content = self.model_dump(mode="json", exclude={"uri"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def as_input(self) -> Input:
        """This artifact as an input of the next stage."""
        return Input(uri=self.uri, digest=self.digest)


def raw_inputs(uris: list[str]) -> dict[str, Input]:
    """Inputs that no stage made: files known by name, size and modification time."""
    return {uri: Input(uri=uri, digest=storage.stamp(uri)) for uri in uris}


def read_manifest(uri: str, kind: Kind) -> Manifest:
    """The manifest of a complete artifact of that kind.

    Raises ValueError if there is none, it cannot be read, its kind differs, or a file is missing or cut short.
    """
    path = f"{uri}/{MANIFEST_NAME}"
    if not storage.exists(path):
        raise ValueError(f"{uri}: no complete {kind} artifact here (no {MANIFEST_NAME}); run the stage that writes it")
    try:
        with storage.open_file(path) as file:
            manifest = Manifest.model_validate_json(file.read())
    except ValidationError as error:
        raise ValueError(f"{path}: not a manifest of this version ({error.error_count()} errors); delete it") from None
    if manifest.kind != kind:
        raise ValueError(f"{uri}: is a {manifest.kind} artifact, expected {kind}; check the URI in the config")
    for name, size in manifest.files.items():
        file_uri = f"{uri}/{name}"
        found = storage.size_bytes(file_uri) if storage.exists(file_uri) else None
        if found != size:
            what = "missing" if found is None else f"{found} bytes instead of {size}"
            raise ValueError(f"{file_uri}: {what}; the artifact is damaged: delete {uri} and run its stage again")
    return manifest.model_copy(update={"uri": uri})


def folder_input(uri: str, kinds: Sequence[Kind], file_name: str) -> Input:
    """A folder as an input: an artifact of one of these kinds, or one that no stage made, known by one of its files.

    Raises ValueError if it is neither.
    """
    if storage.exists(f"{uri}/{MANIFEST_NAME}"):
        with storage.open_file(f"{uri}/{MANIFEST_NAME}") as file:
            head = file.read(200).decode(errors="replace")
        return read_manifest(uri, next((kind for kind in kinds if f'"kind": "{kind}"' in head), kinds[0])).as_input()
    if not storage.exists(f"{uri}/{file_name}"):
        raise ValueError(f"{uri}/{file_name} does not exist; a folder in the Hugging Face layout is needed")
    return Input(uri=uri, digest=storage.stamp(f"{uri}/{file_name}"))


def find_input(given: Input) -> Manifest | None:
    """The manifest of an input, if it still is what it was; None for a raw file and for what was made anew since."""
    path = f"{given.uri}/{MANIFEST_NAME}"
    if not storage.exists(path):
        return None
    try:
        with storage.open_file(path) as file:
            found = Manifest.model_validate_json(file.read())
    except (ValidationError, OSError):  # of another version
        return None
    return found.model_copy(update={"uri": given.uri}) if found.digest == given.digest else None


def states(config: RunConfig) -> list[str]:
    """What lies at each artifact URI of a config: lines for `--dry-run`."""
    lines = []
    for name in type(config).model_fields:
        if name.endswith("_uri") and name != "storage_uri" and (given := getattr(config, name)):
            uri = config.resolve(given)
            is_complete = storage.exists(f"{uri}/{MANIFEST_NAME}")
            lines.append(f"{name}: {uri} is {'complete' if is_complete else 'not there yet'}")
    return lines


def find_complete(draft: Manifest, overwrite: bool) -> Manifest | None:
    """The manifest of this very work if it is complete; else None, with the place cleared for a new start.

    Raises ValueError if a complete output made from other settings or inputs lies there and overwrite is off.
    """
    if storage.exists(f"{draft.uri}/{MANIFEST_NAME}"):
        done = read_manifest(draft.uri, draft.kind)
        changes = _changes(done, draft)
        if not changes:
            logger.info("%s: complete, skipped", draft.uri)
            return done
        if not overwrite:
            raise ValueError(
                f"{draft.uri}: already made, with other {', '.join(changes)}; "
                "set --overwrite true to replace it, or choose another output"
            )
        storage.delete(f"{draft.uri}/{MANIFEST_NAME}")  # first: no moment with a manifest beside half an output
    return None


def clear(uri: str) -> None:
    """Remove what an interrupted run left at `uri`."""
    if storage.exists(uri):
        logger.warning("%s: removing an incomplete output", uri)
        storage.delete(uri)


def publish(draft: Manifest, figures: dict[str, Any]) -> Manifest:
    """Write the manifest, last of all files; from now on the artifact is complete."""
    files = storage.file_sizes(draft.uri)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = draft.model_copy(update={"files": files, "figures": figures, "created_at": now})
    manifest = Manifest.model_validate(manifest.model_dump())
    storage.write_atomic(f"{draft.uri}/{MANIFEST_NAME}", manifest.model_dump_json(indent=2).encode())
    return manifest


def _changes(done: Manifest, draft: Manifest) -> list[str]:
    keys = (set(done.config) | set(draft.config)) - _WHERE_NOT_WHAT
    changed = [key for key in sorted(keys) if done.config.get(key) != draft.config.get(key)]
    before = {name: given.digest for name, given in done.inputs.items()}
    after = {name: given.digest for name, given in draft.inputs.items()}
    return changed + [f"input {name}" for name in sorted(before.keys() | after) if before.get(name) != after.get(name)]
