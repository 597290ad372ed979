import bz2
import gzip
import json
import lzma
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from app.corpus import streams
from app.corpus.config import CorpusConfig, Format, SourceConfig
from app.corpus.readers import read_records
from app.corpus.sources import RawFile, Record, Shard, find_files, find_shards

LINES = [{"text": "刘备"}, {"text": "关羽"}]
JSONL = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
PAGE = (
    "<html><head><title>三国\n演义</title></head>"
    "<body><nav><a href='/'>首页</a></nav><main><p>{}</p></main></body></html>"
)
SENTENCE = "话说天下大势，分久必合，合久必分。"


def read(path: Path, max_bytes: int = 1 << 20, text_key: str = "text", shard_bytes: int = 1 << 30) -> list[Record]:
    config = CorpusConfig(sources=[SourceConfig(name="a", uri=str(path), text_key=text_key)])
    shards = find_shards(find_files(config), shard_bytes)
    return [record for shard in shards for record in read_records(shard, max_bytes)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def reasons(records: list[Record]) -> list[str | None]:
    return [record.reason for record in records]


# Streams and lines


@pytest.mark.parametrize(
    ("name", "content", "positions"),
    [
        ("a.jsonl", JSONL, [0, 19]),
        ("a.jsonl.gz", gzip.compress(JSONL), [0, 1]),
        ("a.jsonl.zst", zstandard.compress(JSONL), [0, 1]),
        ("a.txt", "刘备\n\n关羽\n".encode(), [0, 8]),
        ("a.txt", "\ufeff刘备\r\n关羽".encode(), [0, 11]),
        ("a.txt.gz", gzip.compress("刘备\n关羽".encode()), [0, 1]),
    ],
)
def test_lines_of_formats_and_compressions(tmp_path: Path, name: str, content: bytes, positions: list[int]) -> None:
    records = read(write(tmp_path / name, content))
    assert records == [Record("刘备", positions[0]), Record("关羽", positions[1])]


def test_a_bad_line_is_a_named_rejection_and_reading_goes_on(tmp_path: Path) -> None:
    bad = {
        b"not json": "invalid_json",
        b'{"text": 1}': "missing_text",
        b"[1]": "missing_text",
        b'"text"': "missing_text",
        b'{"body": "a"}': "missing_text",
        b"\xff\xfe": "invalid_utf8",
        b'{"text": "\xff"}': "invalid_utf8",
        b'{"text": "\\ud800"}': "invalid_utf8",
        b'{"text": "' + b"x" * 7000 + b'"}': "too_long",
        b'{"text": "a"}' + b" " * 7000: "too_long",
        b"[" * 5000: "invalid_json",
        b'{"text": "a", "number": ' + b"1" * 5000 + b"}": "invalid_json",
        b"\x00": "invalid_json",
    }
    good = b'{"text": "a", "n": 1e999}\n{"text": "a", "n": NaN}\n{"text": "a", "n": %d}\n{"text": "\\u0000"}\n' % 10**30
    records = read(write(tmp_path / "a.jsonl", b"\n".join(bad) + b"\n\n \n" + good + JSONL), max_bytes=6000)
    assert reasons(records) == [*bad.values()] + [None] * 6
    assert [record.text for record in records[-6:]] == ["a", "a", "a", "\x00", "刘备", "关羽"]
    assert len(records[8].text) == 800


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert [one.text for one in read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + JSONL))] == ["刘备", "关羽"]


def test_the_longest_line_that_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"1234567890\n12345678901\n1234567890")
    assert reasons(read(path, max_bytes=10)) == [None, "too_long", None]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_of_100_megabytes_is_not_held(tmp_path: Path, suffix: str) -> None:
    with fsspec.open(str(tmp_path / f"a.jsonl{suffix}"), "wb", compression="infer") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + JSONL)
    tracemalloc.start()
    records = read(tmp_path / f"a.jsonl{suffix}")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(records) == ["too_long", None, None]
    assert sum(len(record.text) for record in records) < 1000
    assert peak_bytes < 8 << 20


LINE = st.one_of(
    st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
    st.sampled_from([b"", b"\r", b" ", b'{"text": "a"}', '{"text": "刘备"}\r'.encode(), b"x" * 200, b"\x00", b"\xff"]),
)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(LINE, max_size=12),
    ends=st.booleans(),
    shard_bytes=st.integers(1, 300),
    block_bytes=st.integers(1, 64),
    file_format=st.sampled_from(["jsonl", "text"]),
)
def test_shards_of_any_size_give_the_same_records(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    ends: bool,
    shard_bytes: int,
    block_bytes: int,
    file_format: Format,
) -> None:
    path = tmp_path_factory.getbasetemp() / "shards"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    file = RawFile(0, str(path), "a", file_format, "text")
    whole = list(read_records(Shard(file, 0, None), 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", block_bytes)
        pieces = [list(read_records(shard, 100)) for shard in find_shards([file], shard_bytes)]
    assert [record for piece in pieces for record in piece] == whole
    assert len(whole) == sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    assert [record.position for record in whole] == sorted({record.position for record in whole})
    for record in whole:
        if record.reason is None:
            assert path.read_bytes()[record.position :].startswith((record.text.encode(), b'{"text"', b"\xef"))


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.bz2", "jsonl.zst", "jsonl.xz", "parquet", "arrow", "warc", "xml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / f"a.{name}", b"this is no archive" * 100)
    with pytest.raises(ValueError, match=rf"a\.{name}: cannot be read .* repair the file"):
        read(path)


@pytest.mark.parametrize("name", ["jsonl", "warc", "csv", "xml", "html"])
@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS.items())
def test_a_file_cut_short_is_named_and_not_taken_for_a_whole_one(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    content = {"jsonl": JSONL * 1000, "csv": b"text\na\nb\n", "html": PAGE.format(SENTENCE).encode()}
    content |= {"warc": archive(("conversion", "text/plain", b"abc")), "xml": DUMP}
    whole, cut = tmp_path / f"whole.{name}.{suffix}", tmp_path / f"cut.{name}.{suffix}"
    assert read(write(whole, compress(content[name])))
    with pytest.raises(ValueError, match=rf"cut\.{name}\.{suffix}: cannot be read"):
        read(write(cut, compress(content[name])[:-9]))


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSORS.items())
def test_files_compressed_one_by_one_and_put_together_are_read_to_the_end(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    assert len(read(write(tmp_path / f"a.jsonl.{suffix}", compress(JSONL) * 3))) == 3 * len(LINES)


# CSV


def test_csv_has_quoted_newlines_and_rows_of_any_length(tmp_path: Path) -> None:
    content = '\ufeffid,text\r\n1,"刘备,\r\n""关羽"""\r\n\r\n2\r\n3,张飞,more\n4,'.encode() + b"\xff\n5,\x00\n"
    records = read(write(tmp_path / "a.csv", content))
    assert [record.text for record in records] == ['刘备,\r\n"关羽"', "2", "张飞", "\ufffd", "\x00"]
    assert reasons(records) == [None, "missing_text", None, "invalid_utf8", None]
    assert [record.position for record in records] == [0, 2, 3, 4, 5]  # the empty row has a number too


def test_a_csv_field_of_a_megabyte_is_kept_and_one_that_never_ends_is_not_held(tmp_path: Path) -> None:
    content = b'text\n"' + b"a\n" * 500_000 + b'"\n'
    assert len(read(write(tmp_path / "a.csv", content))[0].text) == 1_000_000
    records = read(write(tmp_path / "b.csv", b'text\nb\n"' + b"a" * 90 + b"\n" + b"c" * 20 + b"\nd\n"), max_bytes=100)
    assert reasons(records) == [None, "too_long", None]
    assert [record.text[:2] for record in records] == ["b", '"a', "d"]


def test_a_csv_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"id,body\n1,a\n")
    with pytest.raises(ValueError, match=r"a\.csv: no column 'text'; set text_key to one of: id, body"):
        read(path)
    assert [record.text for record in read(path, text_key="body")] == ["a"]
    assert read(write(tmp_path / "b.csv", b"")) == []
    with pytest.raises(ValueError, match=r"c\.csv: no header row"):
        read(write(tmp_path / "c.csv", b"x" * 2000), max_bytes=1024)


# Columns


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["刘备", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="body") == [Record("刘备", 0), Record("None", 1, "missing_text")]
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; set text_key to one of: body"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text_of_all_types(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["刘备", "关羽", None, "x" * 200]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet", max_bytes=100)
    assert reasons(records) == [None, None, "missing_text", "too_long"]
    assert [record.text for record in records] == ["刘备", "关羽", "None", "x" * 200]


def test_parquet_columns_of_no_text_are_missing_text(tmp_path: Path) -> None:
    for index, values in enumerate(([1, 2], [["a"], []], [{"a": 1}, None], [None, None])):
        pq.write_table(pa.table({"text": values}), tmp_path / f"{index}.parquet")
        assert reasons(read(tmp_path / f"{index}.parquet")) == ["missing_text"] * 2


def test_shards_of_parquet_read_only_their_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"第{row}回" for row in range(95)]}), path, row_group_size=10)
    whole = [Record(f"第{row}回", row) for row in range(95)]
    assert [read(path, shard_bytes=size) for size in (1, 400, 1 << 30)] == [whole] * 3
    asked: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, rows: int, groups: list[int], *more: object) -> object:
        asked.extend(groups)
        return iter_batches(self, rows, groups, *more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    file = RawFile(0, str(path), "a", "parquet", "text")
    assert list(read_records(Shard(file, 20, 40), 100)) == whole[20:40]
    assert asked == [2, 3]
    assert list(read_records(Shard(file, 25, 27), 100)) == whole[25:27]


def test_a_parquet_string_that_is_no_utf8_is_a_named_rejection(tmp_path: Path) -> None:
    _, offsets, content = pa.array([b"good", b"\xff\xfe", b"\xed\xa0\x80"]).buffers()
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, content])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert reasons(read(tmp_path / "a.parquet")) == [None, "invalid_utf8", "invalid_utf8"]


def test_a_saved_dataset(tmp_path: Path) -> None:
    for name, rows in (
        ("data-00000-of-00002.arrow", ["刘备", None]),
        ("data-00001-of-00002.arrow", ["关羽", "x" * 200]),
    ):
        table = pa.table({"text": pa.array(rows, pa.string()), "id": [1, 2]})
        with pa.ipc.new_stream(tmp_path / name, table.schema) as target:
            target.write_table(table, max_chunksize=1)
    (tmp_path / "dataset_info.json").write_text("{}")
    names = sorted(path.name for path in tmp_path.glob("*.arrow"))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    records = read(tmp_path, max_bytes=100)
    assert reasons(records) == [None, "missing_text", None, "too_long"]
    assert [record.position for record in records] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"arrow: no column 'body'; set text_key to one of: text, id"):
        read(tmp_path, text_key="body")


def write_stream(path: Path, column: pa.Array) -> None:
    with pa.ipc.new_stream(path, pa.schema([("text", column.type)])) as target:
        target.write_table(pa.table({"text": column}))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()])
def test_arrow_text_of_all_types(tmp_path: Path, kind: pa.DataType) -> None:
    write_stream(tmp_path / "a.arrow", pa.array(["刘备", None, "x" * 200], pa.string()).cast(kind))
    assert reasons(read(tmp_path / "a.arrow", max_bytes=100)) == [None, "missing_text", "too_long"]


def test_wrong_offsets_in_an_arrow_file_do_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_stream(path, pa.array(["刘备", "关羽"], pa.string()))
    offsets = struct.pack("<3i", 0, 6, 12)
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, struct.pack("<3i", 0, 1 << 29, 12)))
    with pytest.raises(ValueError, match=r"a\.arrow: cannot be read as huggingface \(ArrowInvalid"):
        read(path)


# Pages


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_html(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "a.html", PAGE.format(SENTENCE).encode(encoding))
    assert read(path) == [Record(SENTENCE, 0, None, "三国 演义")]
    assert reasons(read(path, max_bytes=50)) == ["too_long"]
    assert reasons(read(write(tmp_path / "b.html", b"<div>" * 20_000 + b"x"))) == ["invalid_html"]
    assert reasons(read(write(tmp_path / "c.html", b""))) == ["missing_text"]


def archive(*records: tuple[str, str, bytes]) -> bytes:
    head = "WARC/1.0\r\nWARC-Type: {}\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
    return b"".join(head.format(kind, form, len(body)).encode() + body + b"\r\n\r\n" for kind, form, body in records)


def http(
    body: bytes, form: str = "text/html; charset=utf-8", head: str = "", status: int = 200
) -> tuple[str, str, bytes]:
    answer = f"HTTP/1.1 {status} X\r\nContent-Type: {form}\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    return "response", "application/http; msgtype=response", answer.encode() + body


WARC_PAGE = PAGE.format(SENTENCE).encode()
ARCHIVE = [
    ("warcinfo", "application/warc-fields", b"software: test"),
    ("request", "application/http; msgtype=request", b"GET / HTTP/1.1\r\n\r\n"),
    http(WARC_PAGE),
    http(gzip.compress(WARC_PAGE), head="Content-Encoding: gzip\r\n"),
    http(PAGE.format(SENTENCE).encode("gbk"), form="text/html; charset=GBK"),
    ("conversion", "text/plain", SENTENCE.encode()),
    ("resource", "text/html", WARC_PAGE),
    http(b"\x89PNG", form="image/png"),
    http(b"no gzip", head="Content-Encoding: gzip\r\n"),
    http(WARC_PAGE, status=404),
    ("response", "application/http", b"\xff\xff"),
    ("metadata", "text/plain", b"fetchTimeMs: 3"),
    ("conversion", "text/plain", b"x" * 300_000),
    ("conversion", "text/plain", b"x" * 200_000),
]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_warc(tmp_path: Path, name: str) -> None:
    pack = COMPRESSORS.get(name.rpartition(".")[2], bytes)
    members = b"".join(pack(archive(record)) for record in ARCHIVE)
    records = read(write(tmp_path / name, members), max_bytes=250_000)
    page = (SENTENCE, None, "三国 演义")
    assert [(one.text, one.reason, one.title) for one in records[:5]] == [page, page, page, (SENTENCE, None, ""), page]
    assert reasons(records[5:]) == ["invalid_http", "http_error", "invalid_http", "too_long", None]
    assert [record.position for record in records] == [2, 3, 4, 5, 6, 8, 9, 10, 12, 13]


@pytest.mark.parametrize("num_missing", [5, 100, 200_000])
def test_an_archive_cut_short_is_named(tmp_path: Path, num_missing: int) -> None:
    path = write(tmp_path / "a.warc", archive(*ARCHIVE)[:-num_missing])
    with pytest.raises(ValueError, match=r"a\.warc: cannot be read as warc \(EOFError: record 13 is cut short\)"):
        read(path)


def page(title: str, wikitext: str, namespace: int = 0, inside: str = "") -> str:
    escaped = wikitext.replace("&", "&amp;").replace("<", "&lt;")
    return f"""  <page>
    <title>{title}</title><ns>{namespace}</ns><id>1</id>{inside}
    <revision><id>2</id><contributor><username>甲</username></contributor><comment>text</comment>
      <model>wikitext</model><format>text/x-wiki</format>
      <text bytes="9" xml:space="preserve">{escaped}</text><sha1>x</sha1>
    </revision>
  </page>
"""


DUMP = f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="zh">
  <siteinfo><sitename>Wikipedia</sitename><namespaces><namespace key="0" case="first-letter" /></namespaces></siteinfo>
{page("刘备", "'''刘备'''（{{lang|en|x}}）字[[玄德|玄德]]<ref>三国志</ref>，A &amp; B。{{Infobox|a={{b}}}}")}
{page("先主", "#REDIRECT [[刘备]]", inside='<redirect title="刘备" />')}
{page("昭烈帝", "#重定向 [[刘备]]")}
{page("Template:三国", "{{三国}}", namespace=10)}
{page("空", "{{消歧义}}")}
{page("长", "长" * 1000)}
{page("关羽", "字云长。")}
</mediawiki>
""".encode()


@pytest.mark.parametrize("name", ["a.xml", "a.xml.bz2", "a.xml.gz", "a.xml.xz"])
def test_mediawiki(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.corpus.archives.BLOCK_BYTES", 400)
    path = write(tmp_path / name, COMPRESSORS.get(name.rpartition(".")[2], bytes)(DUMP))
    records = read(path, max_bytes=2999)
    assert reasons(records) == [None, "redirect", "redirect", "not_an_article", "missing_text", "too_long", None]
    assert records[0] == Record("刘备\n刘备（x）字玄德，A & B。", 0, None, "刘备")
    assert records[-1] == Record("关羽\n字云长。", 6, None, "关羽")
    assert len(records[5].text) == 202


def test_another_xml_file_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xml: holds <rss>, no <mediawiki> export; set format"):
        read(write(tmp_path / "a.xml", b"<rss><page><title>a</title></page></rss>"))
    with pytest.raises(ValueError, match=r"b\.xml: cannot be read as mediawiki \(ExpatError: "):
        read(write(tmp_path / "b.xml", DUMP[:-20]))


def test_an_article_of_25_megabytes_is_not_held(tmp_path: Path) -> None:
    before, after = DUMP.split("字云长。".encode())
    with (tmp_path / "a.xml").open("wb") as file:
        file.write(before)
        for _ in range(50):
            file.write(b"x y\n" * (1 << 17))
        file.write(after)
    tracemalloc.start()
    records = read(tmp_path / "a.xml")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records[-1].reason == "too_long"
    assert peak_bytes < 10 << 20
