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

from app import storage
from app.corpus.config import CorpusConfig, Format

EXCERPT_CHARACTERS = 200
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
PARQUET_BATCH_ROWS = 100  # a row may be a whole book
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)


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
        for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[file.text_key]):
            for value in _without_decoding(batch.column(0)).to_pylist():
                yield _decode(value) if isinstance(value, bytes) else Record(str(value), "missing_text")


def _without_decoding(column: pa.Array) -> pa.Array:
    """Strings as their bytes: Arrow does not check that they are UTF-8, and one that is not would end the reading."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if is_text else column


def _lines(uri: str, max_line_bytes: int) -> Iterator[bytes | Record]:
    compression = COMPRESSIONS.get(PurePosixPath(uri).suffix)
    is_zstd = compression == "zstd"  # fsspec's reader takes a file that was cut short for a whole one; Arrow's does not
    with fsspec.open(uri, "rb", compression=None if is_zstd else compression) as opened:
        stream: IO[bytes] = io.BufferedReader(pa.CompressedInputStream(opened, "zstd"), 1 << 20) if is_zstd else opened
        while line := stream.readline(max_line_bytes):
            if len(line) == max_line_bytes and not line.endswith(b"\n"):
                while (rest := stream.readline(max_line_bytes)) and not rest.endswith(b"\n"):
                    pass
                yield Record(_excerpt(line), "too_long")
            elif line.strip():
                yield line


def _parse(line: bytes, file: RawFile) -> Record:
    decoded = _decode(line)
    if decoded.reason or file.format == "text":
        return decoded
    try:
        value = json.loads(decoded.text)
    except (ValueError, RecursionError):  # a JSONDecodeError, or a number of thousands of digits
        return Record(decoded.text, "invalid_json")
    content = value.get(file.text_key) if isinstance(value, dict) else None
    return Record(content) if isinstance(content, str) else Record(decoded.text, "missing_text")


def _decode(content: bytes) -> Record:
    try:
        return Record(content.decode("utf-8-sig"))  # files made on Windows begin with a byte order mark
    except UnicodeDecodeError:
        return Record(_excerpt(content), "invalid_utf8")


def _excerpt(content: bytes) -> str:
    return content[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")


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
