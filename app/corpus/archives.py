"""Records of files that hold pages: HTML, WARC archives, MediaWiki exports.

WARC records are read by fastwarc and exports by expat, both streamed: nothing longer than `max_bytes` is held.
markup.py makes text of what they hold. Records of an archive that are neither pages nor plain text are no documents.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import IO, BinaryIO, cast
from xml.parsers import expat

from fastwarc import ArchiveIterator, WarcRecord, WarcRecordType
from mwparserfromhell.parser import ParserError

from app.corpus.markup import decode_page, html_to_text, wikitext_to_text
from app.corpus.sources import EXCERPT_CHARACTERS, Record, Shard
from app.corpus.streams import BLOCK_BYTES, excerpt, open_stream

_REDIRECT = re.compile(r"\s*#\s*(?:redirect|重定向|重新導向)", re.I)
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_DOCUMENT_RECORDS = (WarcRecordType.response, WarcRecordType.resource, WarcRecordType.conversion)
_PAGE_PARTS = ("title", "ns", "model", "text")


def read_html(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The main content of a file, which is one page."""
    with open_stream(shard.file.uri) as stream:
        content = stream.read(max_bytes + 1)
        yield Record(excerpt(content), 0, "too_long") if len(content) > max_bytes else _page(content, 0, None)


def _page(content: bytes, position: int, charset: str | None) -> Record:
    html = decode_page(content, charset)
    parts = html_to_text(html) if html is not None else None
    if parts is None:
        return Record(excerpt(content), position, "invalid_html")
    title, text = parts
    return Record(text, position, None, title) if text else Record(excerpt(content), position, "missing_text", title)


def read_warc(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The pages and plain texts of an archive."""
    with open_stream(shard.file.uri) as stream:
        # fastwarc's own decompression and HTTP parsing take a file that was cut short for a whole one
        entries = ArchiveIterator(cast(BinaryIO, _Counted(stream)), parse_http=False, stream_detect=False)
        for position, entry in enumerate(entries):
            size = entry.content_length
            is_wanted = entry.record_type in _DOCUMENT_RECORDS
            num_held = size if is_wanted and size <= max_bytes else min(size, 4 * EXCERPT_CHARACTERS)
            block = entry.reader.read(num_held) if num_held else b""
            if len(block) + (entry.consume(size - len(block)) if size > len(block) else 0) < size:
                raise EOFError(f"record {position} is cut short")
            if is_wanted and size > max_bytes:
                yield Record(excerpt(block), position, "too_long")
            elif is_wanted and (record := _archived(entry, block, position, max_bytes)):
                yield record


class _Counted:
    """A stream with the two methods that fastwarc asks for; what Arrow decompresses cannot tell its position."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.position = stream, 0

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.position += len(content)
        return content

    def tell(self) -> int:
        return self.position


def _archived(entry: WarcRecord, block: bytes, position: int, max_bytes: int) -> Record | None:
    """The document in a WARC record, or None when it holds something other than a page or plain text."""
    kind, charset = entry.headers.get("Content-Type") or "", None
    if kind.startswith("application/http"):
        http = WarcRecord()
        http.set_bytes_content(block)
        http.is_http = True
        try:
            http.parse_http(auto_decode="all")
            status, charset, kind = http.http_headers.status_code, http.http_charset, http.http_content_type or ""
            is_page = kind.lower().startswith((*_HTML_TYPES, "text/plain"))
            block = http.reader.read(max_bytes + 1) if is_page else b""
        except OSError:  # what it was compressed with is damaged or unknown
            return Record(excerpt(block), position, "invalid_http")
        if status is None or not 200 <= status < 300:
            return Record(excerpt(block), position, "invalid_http" if status is None else "http_error")
    if len(block) > max_bytes:
        return Record(excerpt(block), position, "too_long")
    if kind.lower().startswith(_HTML_TYPES):
        return _page(block, position, charset)
    if not kind.lower().startswith("text/plain"):
        return None
    text = decode_page(block, charset)
    return Record(excerpt(block), position, "invalid_utf8") if text is None else Record(text, position)


class _Dump:
    """Collects the pages of a MediaWiki export while expat reads it; characters beyond `max_bytes` are not held."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.pages: list[dict[str, str]] = []
        self.page: dict[str, str] = {}
        self.parts: list[str] = []
        self.num_characters, self.root = 0, ""
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self.root = self.root or name
        if name == "page":
            self.page = {}
        elif name == "redirect":
            self.page["redirect"] = attributes.get("title", "")
        self.parts, self.num_characters = [], 0

    def _characters(self, content: str) -> None:
        if self.num_characters <= self.max_bytes:
            self.parts.append(content)
        self.num_characters += len(content)

    def _end(self, name: str) -> None:
        if name in _PAGE_PARTS:
            self.page[name] = "".join(self.parts)
        elif name == "page":
            self.pages.append(self.page)


def read_mediawiki(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The pages of an export in the order of the file: articles as text under their title, the others by reason."""
    dump, position = _Dump(max_bytes), itertools.count()
    with open_stream(shard.file.uri) as stream:
        is_whole = False
        while not is_whole:
            block = stream.read(BLOCK_BYTES >> 2)
            is_whole = not block
            dump.parser.Parse(block, is_whole)
            if dump.root not in ("", "mediawiki"):
                raise ValueError(f"{shard.file.uri}: holds <{dump.root[:40]}>, no <mediawiki> export; set format")
            yield from (_article(page, next(position), max_bytes) for page in dump.pages)
            dump.pages.clear()


def _article(page: dict[str, str], position: int, max_bytes: int) -> Record:
    title, wikitext = page.get("title", ""), page.get("text", "")
    beginning = f"{title}\n{wikitext[:EXCERPT_CHARACTERS]}"
    if page.get("ns", "0") != "0" or page.get("model", "wikitext") != "wikitext":
        return Record(beginning, position, "not_an_article", title)
    if "redirect" in page or _REDIRECT.match(wikitext):
        return Record(beginning, position, "redirect", title)
    if len(wikitext) > max_bytes or len(wikitext.encode("utf-8")) > max_bytes:
        return Record(beginning, position, "too_long", title)
    try:
        text = wikitext_to_text(wikitext)
    except ParserError:
        return Record(beginning, position, "invalid_wikitext", title)
    if not text:
        return Record(beginning, position, "missing_text", title)
    return Record(f"{title}\n{text}", position, None, title)
