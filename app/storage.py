"""Files on a local path or any fsspec URI: open, list, delete, atomic write.

A thin layer over fsspec, so that a stage never asks whether its artifact is local or remote.
It does not cache and knows nothing of manifests.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

PARTIAL_SUFFIX = ".partial"


def open_file(uri: str, mode: str = "rb", **options: Any) -> IO[Any]:
    """An open file; a context manager. Parent folders of a written file are made."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if "w" in mode:
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    opened: IO[Any] = fsspec.open(uri, mode, **options).open()
    return opened


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    return bool(filesystem.exists(path))


def size_bytes(uri: str) -> int:
    """Size of one file. Raises FileNotFoundError."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    return int(filesystem.size(path))


def file_sizes(uri: str) -> dict[str, int]:
    """Name relative to the folder -> bytes, for every file under it."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    root = path.rstrip("/") + "/"
    return {name.removeprefix(root): int(info["size"]) for name, info in filesystem.find(path, detail=True).items()}


def stamp(uri: str) -> str:
    """What changes when a raw file changes (size and modification time or ETag), cheap on any filesystem."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    info = filesystem.info(path)
    changed = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info), "")
    return f"{info['size']}:{changed}"


def list_files(uri: str, suffix: str = "") -> list[str]:
    """All files under a folder, or matching a glob, or the file itself; sorted, as full URIs."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if any(character in path for character in "*?["):
        found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
    else:
        found = filesystem.find(path) if filesystem.exists(path) else []
    return sorted(full_uri(uri, name) for name in found if name.endswith(suffix))


def full_uri(like: str, path: str) -> str:
    """`path` of the filesystem that `like` lives on, as a URI that open_file takes."""
    return f"{like.split('://', 1)[0]}://{path}" if "://" in like else path


def delete(uri: str) -> None:
    """Remove a file or a folder with all it holds; no error if it is not there."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@contextmanager
def open_atomic(uri: str) -> Iterator[IO[bytes]]:
    """A file to write that appears under its name when the block ends without an error: whole, or not at all."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if "file" not in filesystem.protocol:  # object stores put a whole object or none
        with open_file(uri, "wb") as target:
            yield target
        return
    partial = f"{path}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(partial, "wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def delete_partial(uri: str) -> None:
    """Remove what writers that were killed left under a folder; nobody else may be writing there."""
    for name in file_sizes(uri) if exists(uri) else ():
        if name.endswith(PARTIAL_SUFFIX):
            delete(f"{uri}/{name}")


def write_atomic(uri: str, content: bytes) -> None:
    """Write a whole file or nothing: a reader never sees a part of it."""
    with open_atomic(uri) as target:
        target.write(content)


@contextmanager
def local_copy(uri: str, cache_dir: str | None = None) -> Iterator[Path]:
    """A local folder with the files of `uri`: itself when it is local, else a copy, removed afterwards."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if "file" in filesystem.protocol:
        yield Path(path)
        return
    folder = Path(cache_dir or "/tmp") / f"zero-to-one-{uuid.uuid4().hex}"
    try:
        filesystem.get(path.rstrip("/") + "/", f"{folder}/", recursive=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def upload(folder: Path, uri: str) -> None:
    """Copy the files of a local folder to `uri`."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(path, exist_ok=True)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            filesystem.put_file(str(file), f"{path}/{file.relative_to(folder)}")
