"""Plain text out of HTML pages and wikitext.

HTML: bytes to text by declared or detected encoding, then Resiliparse's main content. Wikitext: one linear pass takes
out templates, tables, references and tags and evens out what is not closed, then mwparserfromhell parses the rest.
It does not normalise (normalize.py does), expand templates or judge the text.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Node, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

MAX_NESTING = 2000  # Resiliparse's main content takes time in the square of it: 0.07 s here, 9 s at 20,000
MAX_UNDECODED = 0.01  # share of a page's characters
_SUPERSETS = {"gbk": "gb18030", "gb2312": "gb18030", "big5": "big5hkscs"}  # as browsers read them
_MAX_WIKI_DEPTH = 4  # mwparserfromhell reads what fails again on each level, so its time doubles with every one

# HTML --------------------------------------------------------------------------------------------------------------

_NESTING_TAG = re.compile("<(/?)(?:div|span|section|article|main|blockquote|ul|ol|table|font|center|b|i|em|a)\\b", re.I)


def decode_page(content: bytes, charset: str | None = None) -> str | None:
    """Text of a page: UTF-8, else its declared or detected encoding; None when no encoding fits."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        detected = detect_encoding(content, from_html_meta=True)
    for name in (charset, detected):
        encoding = map_encoding_to_html5(name, fallback_utf8=False) if name else None
        if encoding:
            try:
                text = content.decode(_SUPERSETS.get(encoding, encoding), "replace")
            except LookupError:  # an encoding of browsers that Python lacks
                continue
            if text.count("\ufffd") <= MAX_UNDECODED * len(text):
                return text.removeprefix("\ufeff")
    return None


def html_to_text(html: str) -> tuple[str, str] | None:
    """(title, main content) of a page; None when its elements are nested too deeply to be one."""
    if _nesting(html) > MAX_NESTING:
        return None
    tree = HTMLTree.parse(html)
    text = extract_plain_text(tree, main_content=True, alt_texts=False, comments=False, post_meta=False)
    return " ".join((tree.title or "").split()), text.strip()


def _nesting(html: str) -> int:
    if html.count("<") < MAX_NESTING:
        return 0
    depth = deepest = 0
    for tag in _NESTING_TAG.finditer(html):
        depth = max(0, depth - 1) if tag[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


# Wikitext ----------------------------------------------------------------------------------------------------------

_DROPPED_TAGS = frozenset(
    [
        "ref",
        "references",
        "gallery",
        "math",
        "chem",
        "ce",
        "score",
        "source",
        "syntaxhighlight",
        "timeline",
        "hiero",
        "graph",
        "imagemap",
        "table",
        "style",
        "script",
        "templatestyles",
        "mapframe",
        "maplink",
        "section",
        "indicator",
        "inputbox",
    ]
)
_LINE_TAGS = frozenset(
    [
        "br",
        "p",
        "div",
        "li",
        "ul",
        "ol",
        "dl",
        "dd",
        "dt",
        "hr",
        "center",
        "blockquote",
        "poem",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
    ]
)
_INLINE_TEMPLATES = {  # name -> its parameters that are running text, the first that is there counts
    "lang": ("2",),
    "le": ("3", "1"),
    "link-en": ("3", "1"),
    "link-ja": ("3", "1"),
    "internal link helper": ("3", "1"),
    "tsl": ("4", "3"),
    "translink": ("4", "3"),
    "nowrap": ("1",),
    "ruby": ("1",),
}
_TOKEN = re.compile(
    r"\{\{|\}\}|\[\[|\]\]|^[ \t:*#]*\{\||^[ \t]*\|\}(?!\}(?!\}))"
    r"|<(?P<close>/?)(?P<tag>[A-Za-z][A-Za-z0-9]*)(?=[\s/>])[^<>]*>|<",
    re.M,
)
_COMMENT = re.compile("<!--|-->")
_PARAMETER = re.compile(r"\{\{\{[^{}]*\}\}\}")
_VARIANT = re.compile(r"-\{([^{}]*)\}-")
_VARIANT_CHOICE = re.compile(r"(zh-hans|zh-cn|zh-sg|zh-my|zh)\s*:([^;]*)", re.I)
_OPEN_URL = re.compile(r"\[(?![^\[\]\n]{0,2000}\])(?:https?:|ftp:)?//[^\s\[\]<>\u0080-\uffff]*")
_NO_TEXT_LINK = re.compile(
    "(?:file|image|media|category|文件|檔案|档案|图像|圖像|图片|圖片|媒体|媒體|分类|分類)\\s*:", re.I
)
_OTHER_LANGUAGE = re.compile("(?:[a-z]{2,3}(?:-[a-z]+)*|simple):")  # small letters: CSI: is no language
_QUOTES = re.compile("'{2,5}")
_INDENT = re.compile("^[ \t]+", re.M)
_SWITCH = re.compile("__[A-Z]{3,}__|__[^\\W_a-zA-Z]{2,8}__")
_BRACKETS = re.compile(r"\{\{+|\}\}+|\[\[+|\]\]+|^[ \t]*(?:\{\||\|\}|\|-).*$", re.M)
_CAPTION = re.compile(
    r"^(?:(?:thumb|thumbnail|缩略图|縮略圖|left|right|center|upright|frame|\d+px)\s*(?:=[\d.]+)?\|)+.*$", re.M
)
_EMPTY_PARENTHESES = re.compile("[\uff08(][\\s,;:\uff0c\u3001\uff1b\uff1a]*[\uff09)]")
_STRAY_COMMAS = re.compile("(?<=[\uff08(])[\\s,;\uff0c\u3001\uff1b]+|[,;\uff0c\u3001\uff1b]+(?=[\uff09)])")
_BLANK_LINES = re.compile(r"[ \t]*\n(?:[ \t]*\n)+")
_HEADING_SIGN = "\x02"  # begins heading lines until empty ones are found; XML cannot hold it


def wikitext_to_text(wikitext: str) -> str:
    """Running text of an article: links by their words, headings as lines; empty sections are left out.

    Raises mwparserfromhell.parser.ParserError.
    """
    text = _without_comments(wikitext.replace(_HEADING_SIGN, ""))
    text = _VARIANT.sub(_one_variant, _PARAMETER.sub("", text))
    text = _OPEN_URL.sub("", _Outline(text).cut())
    text = _plain(mwparserfromhell.parse(text, skip_style_tags=True))
    text = _QUOTES.sub("", _SWITCH.sub("", _INDENT.sub("", text)))
    text = _CAPTION.sub("", _BRACKETS.sub("", text))
    for _ in range(2):  # a pair may stand in a pair
        text = _EMPTY_PARENTHESES.sub("", text)
    text = _BRACKETS.sub(" ", _STRAY_COMMAS.sub("", text))  # what was cut out between two may have made a pair
    text = _without_empty_sections(text)
    return _BLANK_LINES.sub("\n\n", text).strip().encode("utf-8", "replace").decode("utf-8")  # &#xd800; is no text


def _without_comments(text: str) -> str:
    kept, start, hidden = [], 0, False
    for mark in _COMMENT.finditer(text):
        if not hidden and mark[0] == "<!--":
            kept.append(text[start : mark.start()])
            start, hidden = mark.start(), True
        elif hidden and mark[0] == "-->":
            start, hidden = mark.end(), False
    return "".join(kept) + text[start:].removeprefix("<!--" if hidden else "")  # one that is not closed hides nothing


def _one_variant(markup: re.Match[str]) -> str:
    """The mainland Chinese words of -{zh-cn:计算机; zh-tw:電腦;}-; nothing for conversion rules of the page."""
    flags, bar, content = markup[1].rpartition("|")
    if bar and {"H", "T"} & {flag.strip().upper() for flag in flags.split(";")}:
        return ""
    choices = {choice[1].lower(): choice[2].strip() for choice in _VARIANT_CHOICE.finditer(content)}
    if choices:
        return next(choices[name] for name in ("zh-cn", "zh-hans", "zh-sg", "zh-my", "zh") if name in choices)
    return content


@dataclass
class _Outline:
    """What of a wikitext goes: templates, tables, references, tags, and marks that have no counterpart.

    One pass with a stack; each mark is pushed and popped once, so that hostile text costs no more than other text.
    """

    text: str
    opened: list[tuple[str, int, int]] = field(default_factory=list)  # kind, begin and end of the mark
    open_marks: Counter[str] = field(default_factory=Counter)
    cuts: list[tuple[int, int, str]] = field(default_factory=list)  # begin, end, what takes the place

    def cut(self) -> str:
        for token in _TOKEN.finditer(self.text):
            mark = token[0].lstrip(" \t:*#")
            if token["tag"]:
                self._tag(token)
            elif mark == "<":
                self.cuts.append((*token.span(), "&lt;"))
            elif mark in ("{{", "[[", "{|"):
                self._open(mark, token)
            else:
                self._close({"}}": "{{", "]]": "[[", "|}": "{|"}[mark], token)
        while self.opened:
            self._drop_mark()
        return self._apply()

    def _tag(self, token: re.Match[str]) -> None:
        name = token["tag"].lower()
        if name not in _DROPPED_TAGS or token[0].endswith("/>"):
            self.cuts.append((*token.span(), "\n" if name in _LINE_TAGS else ""))
        elif token["close"]:
            self._close(name, token)
        else:
            self._open(name, token)

    def _close(self, kind: str, token: re.Match[str]) -> None:
        is_crossed = kind == "[[" and bool(self.opened) and self.opened[-1][0] != kind  # links end where they begin
        if is_crossed or not self.open_marks[kind]:
            self.cuts.append((*token.span(), ""))
            return
        while self.opened[-1][0] != kind:
            self._drop_mark()
        start, end = self._pop()
        inside = self.text[end : end + 40].split("|", 1)[0].strip().lower()
        if kind != "[[" and inside not in _INLINE_TEMPLATES:
            self.cuts.append((start, token.end(), ""))
        elif self.open_marks[kind] >= _MAX_WIKI_DEPTH:
            self.cuts += [(start, end, ""), (*token.span(), "")]

    def _open(self, kind: str, token: re.Match[str]) -> None:
        self.opened.append((kind, *token.span()))
        self.open_marks[kind] += 1

    def _pop(self) -> tuple[int, int]:
        kind, start, end = self.opened.pop()
        self.open_marks[kind] -= 1
        return start, end

    def _drop_mark(self) -> None:
        self.cuts.append((*self._pop(), ""))

    def _apply(self) -> str:
        kept, position = [], 0
        for start, end, replacement in sorted(self.cuts):
            if start >= position:  # else inside of what is cut already
                kept += [self.text[position:start], replacement]
                position = end
        return "".join([*kept, self.text[position:]])


def _plain(code: Wikicode) -> str:
    return "".join(_words(node) for node in code.nodes)


def _words(node: Node) -> str:
    """The running text of a node; nothing for comments, list marks and parameters."""
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, Wikilink):
        return _link(node)
    if isinstance(node, ExternalLink):
        return _plain(node.title) if node.brackets and node.title else ""
    if isinstance(node, Heading):
        return f"\n{_HEADING_SIGN * node.level}{_plain(node.title).strip()}\n"
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    return _inline(node) if isinstance(node, Template) else ""


def _link(node: Wikilink) -> str:
    title = _plain(node.title).strip()
    if _NO_TEXT_LINK.match(title):
        return ""
    if node.text is not None:
        return _plain(node.text)
    return "" if _OTHER_LANGUAGE.match(title) else title.removeprefix(":")


def _inline(node: Template) -> str:
    parameters = _INLINE_TEMPLATES.get(str(node.name).strip().lower(), ())
    return next((_plain(node.get(name).value).strip() for name in parameters if node.has(name)), "")


def _without_empty_sections(text: str) -> str:
    kept: list[str] = []
    filled = 0  # headings of a smaller level have something below them; lines come from the last to the first
    for line in reversed(text.split("\n")):
        level = len(line) - len(line.lstrip(_HEADING_SIGN))
        if not level:
            kept.append(line)
            filled = 7 if line.strip() else filled
        elif level < filled:
            kept += ["", line[level:], ""]
            filled = level
    return "\n".join(reversed(kept))
