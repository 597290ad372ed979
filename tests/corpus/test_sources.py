import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from app.corpus.config import CorpusConfig, SourceConfig
from app.corpus.sources import RawFile, Record, find_files, read_records

LINES = [{"text": "刘备"}, {"text": "关羽"}]
JSONL = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def read(path: Path, max_line_bytes: int = 1 << 20, text_key: str = "text") -> list[Record]:
    config = CorpusConfig(sources=[SourceConfig(name="a", uri=str(path), text_key=text_key)])
    return [record for file in find_files(config) for record in read_records(file, max_line_bytes)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("a.jsonl.zst", zstandard.compress(JSONL)),
        ("a.txt", "刘备\n\n关羽\n".encode()),
        ("a.txt.gz", gzip.compress("刘备\n关羽".encode())),
    ],
)
def test_formats_and_compressions_read_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [record.text.strip() for record in read(tmp_path / name)] == ["刘备", "关羽"]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["刘备", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="body") == [Record("刘备"), Record("None", "missing_text")]
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; set text_key to one of: body"):
        read(tmp_path / "a.parquet")


def test_a_bad_line_is_a_named_rejection_and_reading_goes_on(tmp_path: Path) -> None:
    bad = [
        b"not json\n",
        b'{"text": 1}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"text": "' + b"x" * 7000 + b'"}\n',
        b"[" * 990 + b"\n",
        b'{"text": "a", "number": ' + b"1" * 5000 + b"}\n",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(bad) + JSONL)
    records = read(tmp_path / "a.jsonl", max_line_bytes=6000)
    reasons = [record.reason for record in records]
    assert reasons == [
        "invalid_json",
        "missing_text",
        "missing_text",
        "invalid_utf8",
        "too_long",
        "invalid_json",
        "invalid_json",
        None,
        None,
    ]
    assert len(records[4].text) == 800


def test_a_line_of_50_megabytes_is_not_held(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + JSONL)
    records = read(tmp_path / "a.jsonl")
    assert [record.reason for record in records] == ["too_long", None, None]
    assert sum(len(record.text) for record in records) < 1000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no archive" * 100)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read .* repair the file"):
        read(tmp_path / name)


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS.items())
def test_a_file_cut_short_is_named_and_not_taken_for_a_whole_one(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(JSONL * 1000)[:-9])
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: cannot be read"):
        read(path)


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS.items())
def test_files_compressed_one_by_one_and_put_together_are_read_to_the_end(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(JSONL) * 3)
    assert len(read(tmp_path / f"a.jsonl.{suffix}")) == 3 * len(LINES)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + JSONL)
    assert read(tmp_path / "a.jsonl") == [Record("刘备"), Record("关羽")]


def test_a_parquet_string_that_is_no_utf8_is_a_named_rejection(tmp_path: Path) -> None:
    _, offsets, content = pa.array([b"good", b"\xff\xfe"]).buffers()
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])}), tmp_path / "a.parquet"
    )
    assert [record.reason for record in read(tmp_path / "a.parquet")] == [None, "invalid_utf8"]


def test_a_missing_or_unknown_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\.a\.uri: no file at"):
        read(tmp_path / "nothing.jsonl")
    (tmp_path / "a.doc").write_bytes(b"")
    with pytest.raises(ValueError, match="set format to"):
        read(tmp_path / "a.doc")


@given(content=st.binary(max_size=400))
def test_any_bytes_give_records_or_nothing(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(content)
    records = list(read_records(RawFile(0, str(path), "a", "jsonl", "text"), 1 << 20))
    assert len(records) == sum(1 for line in content.split(b"\n") if line.strip())
