"""Raw records of a shard, one at a time, from every format that a source may have.

A record without readable text becomes a named rejection with its beginning, and reading goes on; a damaged file is a
ValueError with its path. Lines (jsonl, text, csv) are read here, the rest in columns.py and archives.py, all streamed:
what is longer than `max_record_bytes` is never held. A record without a reason always encodes to UTF-8; nothing is
normalised or judged here.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from xml.parsers import expat

import orjson
import pyarrow as pa

from app.corpus.archives import read_html, read_mediawiki, read_warc
from app.corpus.columns import read_arrow, read_parquet
from app.corpus.config import Format
from app.corpus.sources import EXCERPT_CHARACTERS, Record, Shard, compression_of
from app.corpus.streams import decode, excerpt, no_column, open_stream, printable, split_lines

_DAMAGED = (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError, pa.ArrowException, expat.ExpatError)
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_records(shard: Shard, max_record_bytes: int) -> Iterator[Record]:
    """The records of a shard in order. Raises ValueError naming the file when it is damaged or has no such column."""
    file = shard.file
    try:
        yield from _READERS[file.format](shard, max_record_bytes)
    except _DAMAGED as error:
        raise ValueError(
            f"{file.uri}: cannot be read as {file.format} ({type(error).__name__}: {error}); "
            "repair the file, or leave it out of the source's uri"
        ) from None


def _read_jsonl(shard: Shard, max_bytes: int) -> Iterator[Record]:
    key, loads = shard.file.text_key, orjson.loads
    for position, line in _lines(shard, max_bytes):
        if len(line) > max_bytes:
            yield Record(excerpt(line[:max_bytes]), position, "too_long")
            continue
        try:
            text = loads(line)[key]
        except (ValueError, KeyError, TypeError):
            if line.strip():
                yield _odd_line(line, position, key)
            continue
        yield Record(text, position) if text.__class__ is str else Record(excerpt(line), position, "missing_text")


def _odd_line(line: bytes, position: int, key: str) -> Record:
    """What orjson refuses may still be JSON: huge numbers, NaN, a byte order mark."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(excerpt(line), position, "invalid_utf8")
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        return Record(excerpt(line), position, "invalid_json")
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return Record(excerpt(line), position, "missing_text")
    if _SURROGATE.search(text):  # JSON can spell half a surrogate pair
        return Record(excerpt(line), position, "invalid_utf8")
    return Record(text, position)


def _read_text(shard: Shard, max_bytes: int) -> Iterator[Record]:
    for position, line in _lines(shard, max_bytes):
        if len(line) > max_bytes:
            yield Record(excerpt(line[:max_bytes]), position, "too_long")
        elif line.strip():
            yield decode(line.removesuffix(b"\r").removeprefix(codecs.BOM_UTF8), position)


def _lines(shard: Shard, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    uri = shard.file.uri
    with open_stream(uri) as stream:
        if compression_of(uri):
            yield from enumerate(line for _, line in split_lines(stream, 0, sys.maxsize, max_bytes))
            return
        end = sys.maxsize if shard.end is None else shard.end
        if shard.start:  # the line that the byte before is part of began in another shard
            stream.seek(shard.start - 1)
            lines = split_lines(stream, shard.start - 1, end, max_bytes)
            next(lines, None)
        else:
            lines = split_lines(stream, 0, end, max_bytes)
        yield from lines


class _CsvLines:
    """Lines for csv.reader, which asks for more while a quoted field goes on; not for more than a record may have."""

    def __init__(self, lines: Iterator[tuple[int, bytes]], max_bytes: int) -> None:
        self.lines, self.max_bytes = lines, max_bytes
        self.num_bytes, self.beginning = 0, b""  # of the record being read

    def start_record(self) -> None:
        self.num_bytes, self.beginning = 0, b""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, line = next(self.lines)
        self.beginning = self.beginning or line[: min(self.max_bytes, 4 * EXCERPT_CHARACTERS)]
        self.num_bytes += len(line)
        if self.num_bytes > self.max_bytes:
            raise csv.Error("record too long")
        return line.decode("utf-8", "surrogateescape").removeprefix("\ufeff") + "\n"


def _read_csv(shard: Shard, max_bytes: int) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))  # it is one for the process, 128 KiB at first
    with open_stream(shard.file.uri) as stream:
        lines = _CsvLines(split_lines(stream, 0, sys.maxsize, max_bytes), max_bytes)
        rows = csv.reader(lines)
        try:
            header = next(filter(None, rows), None)  # empty lines may come first
        except csv.Error as error:
            raise ValueError(f"{shard.file.uri}: no header row of a csv file ({error}); write one as line 1") from None
        if header is None:
            return
        if shard.file.text_key not in header:
            raise no_column(shard, header)
        column = header.index(shard.file.text_key)
        for position in itertools.count():
            lines.start_record()
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                reason = "too_long" if lines.num_bytes > max_bytes else "invalid_csv"
                yield Record(excerpt(lines.beginning), position, reason)
                continue
            if row:
                yield _csv_record(row, column, position)


def _csv_record(row: list[str], column: int, position: int) -> Record:
    if column >= len(row):
        return Record(printable(",".join(row)), position, "missing_text")
    if row[column].isascii():
        return Record(row[column], position)
    return decode(row[column].encode("utf-8", "surrogateescape"), position)


_READERS: dict[Format, Callable[[Shard, int], Iterator[Record]]] = {
    "jsonl": _read_jsonl,
    "text": _read_text,
    "csv": _read_csv,
    "parquet": read_parquet,
    "huggingface": read_arrow,
    "html": read_html,
    "warc": read_warc,
    "mediawiki": read_mediawiki,
}
