"""Raw records from files: jsonl, parquet or text, plain or compressed, one at a time.

A record that cannot be read becomes a named rejection and reading goes on; a file that cannot be read is a ValueError
with its path. It does not judge text; rules.py does.
"""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from app import storage
from app.corpus.config import CorpusConfig, Format

EXCERPT_CHARACTERS = 200
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pa.ArrowInvalid)


@dataclass(frozen=True)
class RawFile:
    """One file to read, with what its source says of it. `index` orders files over all sources."""

    index: int
    uri: str
    source: str
    format: Format
    text_key: str


@dataclass(frozen=True)
class Record:
    """The text of a raw record, or the reason why there is none and the beginning of what was there."""

    text: str
    reason: str | None = None


def find_files(config: CorpusConfig) -> list[RawFile]:
    """All files of all sources in a fixed order. Raises ValueError for a source without any."""
    found: list[RawFile] = []
    for source in config.sources:
        uri = config.resolve(source.uri)
        uris = storage.list_files(uri)
        if not uris:
            raise ValueError(f"sources.{source.name}.uri: no file at {uri}; check the path")
        for file_uri in uris:
            found.append(RawFile(len(found), file_uri, source.name, _format(source.format, file_uri), source.text_key))
    return found


def read_records(file: RawFile, max_line_bytes: int) -> Iterator[Record]:
    """The records of a file in order. Raises ValueError naming the file when it is damaged."""
    try:
        if file.format == "parquet":
            yield from _parquet(file)
        else:
            for line in _lines(file.uri, max_line_bytes):
                yield line if isinstance(line, Record) else _parse(line, file)
    except _DAMAGED as error:
        raise ValueError(
            f"{file.uri}: cannot be read as {file.format} ({type(error).__name__}: {error}); "
            "repair the file, or leave it out of the source's uri"
        ) from None


def _parquet(file: RawFile) -> Iterator[Record]:
    with storage.open_file(file.uri) as stream:
        parquet = pq.ParquetFile(stream)
        if file.text_key not in parquet.schema_arrow.names:
            known = ", ".join(parquet.schema_arrow.names)
            raise ValueError(f"{file.uri}: no column {file.text_key!r}; set text_key to one of: {known}")
        for batch in parquet.iter_batches(batch_size=1000, columns=[file.text_key]):
            for text in batch.column(0).to_pylist():
                yield Record(text) if isinstance(text, str) else Record(str(text), "missing_text")


def _lines(uri: str, max_line_bytes: int) -> Iterator[bytes | Record]:
    compression = COMPRESSIONS.get(PurePosixPath(uri).suffix)
    with fsspec.open(uri, "rb", compression=compression) as opened:
        stream: IO[bytes] = io.BufferedReader(opened, 1 << 20) if compression == "zstd" else opened
        while line := stream.readline(max_line_bytes):
            if len(line) == max_line_bytes and not line.endswith(b"\n"):
                while (rest := stream.readline(max_line_bytes)) and not rest.endswith(b"\n"):
                    pass
                yield Record(line[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace"), "too_long")
            elif line.strip():
                yield line


def _parse(line: bytes, file: RawFile) -> Record:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return Record(line[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace"), "invalid_utf8")
    if file.format == "text":
        return Record(text)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return Record(text, "invalid_json")
    content = value.get(file.text_key) if isinstance(value, dict) else None
    return Record(content) if isinstance(content, str) else Record(text, "missing_text")


def _format(given: Format, uri: str) -> Format:
    if given != "auto":
        return given
    suffixes = [suffix for suffix in PurePosixPath(uri).suffixes if suffix not in COMPRESSIONS]
    known: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    known |= {".txt": "text", ".text": "text"}
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in known:
        raise ValueError(f"{uri}: format unknown from its name; set format to jsonl, parquet or text")
    return known[suffix]
