"""Records of columnar files: parquet, and the Arrow streams of Hugging Face datasets saved on disk.

Parquet is read by row group and by batches of about a megabyte of one column; a position is a row number. Texts are
checked for UTF-8 a batch at a time, and one by one only where a batch has something wrong. Other columns are not read.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app import storage
from app.corpus.sources import EXCERPT_CHARACTERS, Record, Shard
from app.corpus.streams import BLOCK_BYTES, decode, excerpt, no_column, printable

MAX_BATCH_ROWS = 1000  # of parquet; fewer when rows are long: one may be a whole book


def read_parquet(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The rows of the row groups that the shard touches; no other row group is read."""
    key, end = shard.file.text_key, _end_of(shard)
    with storage.open_file(shard.file.uri) as stream:
        parquet = pq.ParquetFile(stream, buffer_size=BLOCK_BYTES)
        if key not in parquet.schema_arrow.names:
            raise no_column(shard, parquet.schema_arrow.names)
        row = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            if row < end and row + group.num_rows > shard.start:
                batch_rows = BLOCK_BYTES * group.num_rows // max(1, group.total_byte_size)
                batches = parquet.iter_batches(max(1, min(batch_rows, MAX_BATCH_ROWS)), [index], [key])
                end_row = yield from _rows((batch.column(0) for batch in batches), row, shard, max_bytes)
                if end_row != row + group.num_rows:
                    raise EOFError(f"row group {index} has {end_row - row} rows, not {group.num_rows}")
            row += group.num_rows
        if row != parquet.metadata.num_rows:
            raise EOFError(f"{row} rows in row groups, not {parquet.metadata.num_rows}")


def read_arrow(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The rows of an Arrow stream, a record batch at a time."""
    key = shard.file.text_key
    with storage.open_file(shard.file.uri) as stream, pa.ipc.open_stream(stream) as batches:
        if key not in batches.schema.names:
            raise no_column(shard, batches.schema.names)
        yield from _rows((_checked(batch.column(key)) for batch in batches), 0, shard, max_bytes)


def _checked(column: pa.Array) -> pa.Array:
    """The column; reading one from a stream trusts its offsets, and wrong ones would end the process."""
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    as_bytes = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    column = column.view(as_bytes) if is_text else column  # text that is no UTF-8 is one record's fault
    column.validate(full=True)
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):  # views of nulls go unchecked
        return pa.array(
            column.to_pylist(), pa.large_string() if pa.types.is_string_view(column.type) else pa.large_binary()
        )
    return column


def _rows(columns: Iterator[pa.Array], row: int, shard: Shard, max_bytes: int) -> Generator[Record, None, int]:
    """Records of the pieces of a column from `row` on, as far as they are in the shard; returns the row after them."""
    for column in columns:
        first, last = max(0, shard.start - row), min(len(column), _end_of(shard) - row)
        if first < last:
            yield from _values(_as_bytes(column.slice(first, last - first)), row + first, max_bytes)
        row += len(column)
    return row


def _values(column: pa.Array, row: int, max_bytes: int) -> Iterator[Record]:
    if not pa.types.is_large_binary(column.type):
        for position in range(row, row + len(column)):  # the values may be anything, also nothing that Python can hold
            yield Record(printable(column.type), position, "missing_text")
        return
    sizes = pc.binary_length(column)
    if not column.null_count and (pc.max(sizes).as_py() or 0) <= max_bytes:
        try:
            texts = column.cast(pa.large_string()).to_pylist()
        except pa.ArrowInvalid:  # one of them is no UTF-8
            pass
        else:
            yield from map(Record, texts, itertools.count(row))
            return
    for index, size in enumerate(sizes.to_pylist()):
        if size is None:
            yield Record("None", row + index, "missing_text")
        elif size > max_bytes:
            beginning = column[index].as_buffer()[: 4 * EXCERPT_CHARACTERS].to_pybytes()
            yield Record(excerpt(beginning), row + index, "too_long")
        else:
            yield decode(column[index].as_py(), row + index)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Strings as their bytes: Arrow does not check that they are UTF-8, and one that is not would end the reading."""
    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type)
    is_bytes = kinds.is_binary(column.type) or kinds.is_binary_view(column.type)
    return column.cast(pa.large_binary()) if is_text or is_bytes else column


def _end_of(shard: Shard) -> int:
    return sys.maxsize if shard.end is None else shard.end
