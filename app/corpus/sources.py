"""What there is to read: the files of all sources, and the shards that tasks read on their own.

`find_files` lists files in a fixed order and settles each one's format; `find_shards` cuts plain jsonl and text files
by bytes and parquet files by row groups, and leaves all others whole. Only sizes and parquet footers are looked at.
It reads no records (readers.py does) and judges no text (rules.py does).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from app import storage
from app.corpus.config import CorpusConfig, Format, SourceConfig

EXCERPT_CHARACTERS = 200
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".html": "html",
    ".htm": "html",
    ".warc": "warc",
    ".wet": "warc",
    ".xml": "mediawiki",
    ".arrow": "huggingface",
}
_SPLIT_BY_BYTES = ("jsonl", "text")
_DATASET, _DATASET_DICT, _DATASET_STATE = "dataset_info.json", "dataset_dict.json", "state.json"


@dataclass(frozen=True)
class RawFile:
    """One file to read, with what its source says of it. `index` orders files over all sources; never format auto."""

    index: int
    uri: str
    source: str
    format: Format
    text_key: str


@dataclass(frozen=True)
class Shard:
    """The records of a file whose positions are in [start, end); an end of None is the end of the file."""

    file: RawFile
    start: int
    end: int | None


@dataclass(frozen=True)
class Record:
    """The text of a raw record, or the reason why there is none and the beginning of what was there.

    `position` grows within a file and does not depend on its shards: the byte offset of the line in plain jsonl and
    text files, the row in parquet and Arrow files, else a running number.
    """

    text: str
    position: int
    reason: str | None = None
    title: str = ""


def find_files(config: CorpusConfig) -> list[RawFile]:
    """All files of all sources in a fixed order. Raises ValueError for a source without any."""
    found: list[RawFile] = []
    for source in config.sources:
        uri = config.resolve(source.uri)
        for file_uri, file_format in _files_of(source, uri):
            found.append(RawFile(len(found), file_uri, source.name, file_format, source.text_key))
    return found


def find_shards(files: list[RawFile], shard_bytes: int) -> list[Shard]:
    """What each task reads, in reading order, in pieces of at most about `shard_bytes` where the format allows it."""
    return [shard for file in files for shard in _shards_of(file, shard_bytes)]


def compression_of(uri: str) -> str | None:
    """How the file is compressed, by the end of its name."""
    return COMPRESSIONS.get(PurePosixPath(uri).suffix)


def _files_of(source: SourceConfig, uri: str) -> list[tuple[str, Format]]:
    dataset = _dataset_files(uri) if source.format in ("auto", "huggingface") else []
    uris = dataset or storage.list_files(uri)
    if source.format == "huggingface" and not dataset:
        uris = [one for one in uris if one.endswith(".arrow")]
    if not uris:
        raise ValueError(f"sources.{source.name}.uri: no file at {uri}; check the path")
    return [(one, _format(source.format, one)) for one in uris]


def _dataset_files(uri: str) -> list[str]:
    """The Arrow files of a folder that `save_to_disk` of Hugging Face datasets wrote, all splits in their order."""
    folder = uri.rstrip("/")
    if any(character in uri for character in "*?["):
        return []
    if storage.exists(f"{folder}/{_DATASET_DICT}"):
        splits = _names(f"{folder}/{_DATASET_DICT}", "splits")
        return [file for split in splits for file in _dataset_files(f"{folder}/{split}")]
    if not storage.exists(f"{folder}/{_DATASET}"):
        return []
    if not storage.exists(f"{folder}/{_DATASET_STATE}"):
        return storage.list_files(f"{folder}/data-*.arrow")
    return [f"{folder}/{name}" for name in _names(f"{folder}/{_DATASET_STATE}", "_data_files")]


def _names(uri: str, key: str) -> list[str]:
    try:
        with storage.open_file(uri) as stream:
            entries = json.load(stream)[key]
        return [str(entry["filename"]) if isinstance(entry, dict) else str(entry) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{uri}: cannot be read as a saved dataset ({type(error).__name__}: {error}); save it again, "
            "or set uri to its .arrow files"
        ) from None


def _format(given: Format, uri: str) -> Format:
    if given != "auto":
        return given
    suffixes = [suffix for suffix in PurePosixPath(uri).suffixes if suffix not in COMPRESSIONS]
    suffix = suffixes[-1].lower() if suffixes else ""
    if suffix not in _FORMATS:
        known = ", ".join(dict.fromkeys(_FORMATS.values()))
        raise ValueError(f"{uri}: format unknown from its name; set format to one of: {known}")
    return _FORMATS[suffix]


def _shards_of(file: RawFile, shard_bytes: int) -> list[Shard]:
    starts = [0]
    if file.format == "parquet":
        starts = _row_starts(file.uri, shard_bytes)
    elif file.format in _SPLIT_BY_BYTES and not compression_of(file.uri):
        size = storage.size_bytes(file.uri)
        pieces = max(1, -(-size // shard_bytes))
        starts = [size * piece // pieces for piece in range(pieces)]  # even pieces: no short one at the end
    return [Shard(file, start, end) for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _row_starts(uri: str, shard_bytes: int) -> list[int]:
    """Where the shards of a parquet file begin, in rows; each takes row groups until it has `shard_bytes`."""
    try:
        with storage.open_file(uri) as stream:
            footer = pq.read_metadata(stream)
    except (OSError, UnicodeDecodeError, pa.ArrowException):
        return [0]  # the task that reads it names it, together with all other damaged files
    starts, taken, row = [0], 0, 0
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if taken and taken + group.total_byte_size > shard_bytes:
            starts.append(row)
            taken = 0
        taken += group.total_byte_size
        row += group.num_rows
    return starts
