"""Bytes of raw files: opened and unpacked as streams, cut into lines, decoded.

What is longer than a record may be is never held: of a long line only its beginning is kept. Whatever the block size,
lines and offsets are the same. It knows no format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import fsspec
import pyarrow as pa

from app import storage
from app.corpus.sources import EXCERPT_CHARACTERS, Record, Shard, compression_of

BLOCK_BYTES = 1 << 20


@contextmanager
def open_stream(uri: str) -> Iterator[IO[bytes]]:
    """The bytes of a local or remote file, unpacked. A file that was cut short is an error when its end is reached."""
    compression = compression_of(uri)
    if compression == "zstd":  # fsspec's reader takes a file that was cut short for a whole one; Arrow's does not
        with storage.open_file(uri) as opened:
            yield io.BufferedReader(pa.CompressedInputStream(opened, "zstd"), BLOCK_BYTES)
    else:
        with fsspec.open(uri, "rb", compression=compression) as stream:
            yield stream


def split_lines(stream: IO[bytes], position: int, end: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines that begin before `end`, with their offsets; of one that is too long the first max_bytes + 1 bytes."""
    rest, num_dropped = b"", 0
    while block := stream.read(BLOCK_BYTES):
        first, *lines = block.split(b"\n")
        rest += first
        if not lines:
            num_dropped += max(0, len(rest) - max_bytes - 1)
            rest = rest[: max_bytes + 1]
            continue
        yield position, rest
        position += len(rest) + num_dropped + 1
        rest, num_dropped = lines.pop(), 0
        for line in lines:
            if position >= end:
                return
            yield position, line
            position += len(line) + 1
        if position >= end:
            return
    if rest:
        yield position, rest


def decode(content: bytes, position: int) -> Record:
    """A record of that text in UTF-8."""
    try:
        return Record(content.decode("utf-8"), position)
    except UnicodeDecodeError:
        return Record(excerpt(content), position, "invalid_utf8")


def excerpt(content: bytes) -> str:
    """What of a rejected record is shown, whatever it is."""
    return content[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")


def printable(value: object) -> str:
    """The beginning of a value that is no text, without half surrogate pairs."""
    return str(value)[:EXCERPT_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def no_column(shard: Shard, columns: list[str]) -> ValueError:
    """The error for a file without the text column, which names those that it has."""
    known = ", ".join(columns).encode("utf-8", "replace").decode("utf-8")
    return ValueError(f"{shard.file.uri}: no column {shard.file.text_key!r}; set text_key to one of: {known}")
