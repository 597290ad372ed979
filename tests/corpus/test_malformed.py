"""10,000 malformed files, each read as every format: records by name, or the documented error; never anything else."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.core import OpenFile

from app import storage
from app.corpus.config import Format
from app.corpus.readers import read_records
from app.corpus.sources import RawFile, Shard

FORMATS: tuple[Format, ...] = ("jsonl", "text", "csv", "parquet", "huggingface", "html", "warc", "mediawiki")
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, 1),
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstandard.compress,
}
MAX_BYTES = 1024
NUM_INPUTS = 10_000
NAMED = {
    "invalid_utf8",
    "invalid_json",
    "invalid_csv",
    "invalid_html",
    "invalid_http",
    "missing_text",
    "too_long",
    "redirect",
    "not_an_article",
    "http_error",
}


def parquet(texts: list[str]) -> bytes:
    pq.write_table(pa.table({"text": texts}), sink := io.BytesIO())
    return sink.getvalue()


def arrow(texts: list[str]) -> bytes:
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(sink := io.BytesIO(), table.schema) as target:
        target.write_table(table)
    return sink.getvalue()


def warc(body: bytes) -> bytes:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body
    head = "WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {}\r\n\r\n"
    return (head.format(len(answer)).encode() + answer + b"\r\n\r\n") * 2


def dump(wikitext: bytes) -> bytes:
    head = b"<mediawiki><page><title>a</title><ns>0</ns><revision><text>"
    return head + wikitext + b"</text></revision></page></mediawiki>"


WIKI_MARKS = [b"{{", b"}}", b"[[", b"]]", b"{|", b"|}", b"|", b"=", b"\n", b"'''", b"[http://a ", b"]", b"-{", b"}-"]
WIKI_MARKS += [b"&lt;ref>", b"&lt;/ref>", b"&lt;b ", b"&lt;!--", b"-->", b"&amp;#xd800;", b"* ", b"a", "刘备".encode()]
TAGS = [
    b"<div>",
    b"</div>",
    b"<table>",
    b"<td>",
    b"<a href=",
    b"<!--",
    b"<script>",
    b"&#xd800;",
    b"\x00",
    b"<title>",
    b"a",
]
VALUES = ["1", "null", '"\\ud800"', '"\\u0000"', "[]", "{}", "1e999", "NaN", "9" * 40, '"a', "tru", '"\\x"', "[" * 50]


def anything(chance: random.Random) -> bytes:
    """Content of one kind: noise, odd JSON, markup without sense."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.randrange(300))
    if kind == 1:
        return b"\n".join(b'{"text": %s}' % chance.choice(VALUES).encode() for _ in range(4))
    if kind == 2:
        depth = chance.choice([10, 900, 1100, 3000])
        return chance.choice([b"[", b'{"text":']) * depth + b"1" + b"]" * chance.choice([0, depth])
    if kind == 3:
        return bytes(chance.choices(b'\x00\xff\r\n",{}[]<>\\ a\xed\xa0\x80', k=chance.randrange(200)))
    if kind == 4:
        return dump(b"".join(chance.choices(WIKI_MARKS, k=chance.randrange(60))))
    if kind == 5:
        return b"".join(chance.choices(TAGS, k=chance.randrange(60)))
    if kind == 6:
        return b'text\n"' + b"a" * chance.choice([10, 2000]) + chance.choice([b'"', b'"x"', b"\r", b"\n"]) + b"\nb"
    return warc(b"".join(chance.choices(TAGS, k=10)))


WHOLE = [parquet(["刘备", "关羽" * 50] * 5), arrow(["刘备", "关羽" * 50] * 5), warc(b"<p>a</p>"), dump(b"a" * 200)]
WHOLE += [json.dumps({"text": "刘备"}).encode() * 3, b"text,id\na,1\n" * 5, b"<html><title>a</title><p>b</p></html>"]


def malformed(chance: random.Random) -> tuple[str, bytes]:
    """(end of the name, content): anything, or a whole file with bytes changed or its end cut off."""
    content, suffix = anything(chance), chance.choice(list(PACK))
    if chance.random() < 0.5:
        damaged = bytearray(chance.choice(WHOLE))
        for _ in range(chance.choice([0, 1, 3])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        content = bytes(damaged)
    packed = PACK[suffix](content)
    return suffix, packed[: chance.randrange(len(packed) + 1)] if chance.random() < 0.3 else packed


@pytest.mark.slow
def test_10_000_malformed_files_give_named_records_or_the_documented_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, outcomes = random.Random(3), Counter[str]()
    memory = fsspec.filesystem("memory")
    # 80,000 times to find out that memory:// is memory would take half of the test's time
    monkeypatch.setattr(fsspec, "open", lambda uri, mode, compression: OpenFile(memory, uri, mode, compression))
    monkeypatch.setattr(storage, "open_file", memory.open)
    for number in range(NUM_INPUTS):
        suffix, content = malformed(chance)
        uri = f"/malformed{suffix}"
        memory.pipe_file(uri, content)
        for file_format in FORMATS:
            outcomes[read_one(uri, file_format, content, number)] += 1
    assert sum(outcomes.values()) == NUM_INPUTS * len(FORMATS)
    assert min(outcomes[name] for name in ("damaged", "records")) > NUM_INPUTS


def read_one(uri: str, file_format: Format, content: bytes, number: int) -> str:
    file = RawFile(0, uri, "a", file_format, "text")
    try:
        records = list(read_records(Shard(file, 0, None), MAX_BYTES))
    except ValueError as error:
        is_documented = type(error) is ValueError and uri.rpartition("/")[2] in str(error)
        return "damaged" if is_documented else pytest.fail(f"{number} {file_format}: {error!r}")
    for record in records:
        record.text.encode("utf-8")
        assert record.reason is None or record.reason in NAMED, (number, file_format, record)
        assert len(record.text) <= 2 * MAX_BYTES, (number, file_format)
    positions = [record.position for record in records]
    assert all(before < after for before, after in itertools.pairwise(positions)), (number, file_format)
    if file_format in ("jsonl", "text") and uri.endswith("malformed"):
        assert len(records) == sum(1 for line in content.split(b"\n") if line.strip())
    return "records"
