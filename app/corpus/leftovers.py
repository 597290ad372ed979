"""What is left of HTML and wikitext in a text that claims to be plain: tags, entities, links, templates, bold marks.

Only what is surely markup goes: known element names with well-formed attributes, entities that end in a semicolon,
wikitext in a document that shows itself as wikitext. Nested leftovers are peeled from the inside; what still nests
after some passes loses its brackets, so the work stays linear and the result stable.
It is no parser: whole pages and dumps are read by the readers. HTML quoted as an example in prose is taken out as well.
"""

from __future__ import annotations

import re
from html.entities import html5

MAX_PASSES = 6
_INLINE = (
    "a abbr acronym b bdi bdo big cite code del dfn em font i img ins kbd label mark nowiki q rp rt ruby s samp small "
)
_INLINE += "span strike strong sub sup tt u var wbr ref references gallery noinclude includeonly onlyinclude"
_BLOCK = (
    "address article aside blockquote body br button canvas caption center col colgroup dd details dialog div dl dt "
)
_BLOCK += (
    "fieldset figcaption figure footer form frame frameset h1 h2 h3 h4 h5 h6 head header hr html iframe input legend "
)
_BLOCK += (
    "li link main menu meta nav noscript object ol optgroup option p param pre script section select source style "
)
_BLOCK += "summary table tbody td textarea tfoot th thead title tr ul video audio embed svg path"
_BLOCK_NAMES = frozenset(_BLOCK.split())
_SHORT_NAMES = frozenset("abiqsu")
_NAMES = "|".join(sorted((_INLINE + " " + _BLOCK).split(), key=len, reverse=True))
_VALUE = r"""\s*+=\s*+(?:"[^"<>]*+"|'[^'<>]*+'|[^\s"'<>]++)"""
_FLAG = (
    r"(?:async|autoplay|checked|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|readonly|selected)\b(?!\s*+=)"
)
_TAG = re.compile(
    rf"<(/?)({_NAMES})(?:\s++(?:{_FLAG}|[A-Za-z:@_-][\w:.-]*+{_VALUE}))*+\s*+/?>|<!doctype\s[^<>]*+>|<\?xml\s[^<>]*+>",
    re.IGNORECASE,
)
_SHORT_CLOSING = re.compile("</([abiqsu])>", re.IGNORECASE)
_OPENING = re.compile(r"<!--|<(script|style|ref)(?=[\s>])[^<>]*+>", re.IGNORECASE)
_ENTITY = re.compile(r"&(#\d{1,7}+|#[xX][0-9a-fA-F]{1,6}+|[A-Za-z][A-Za-z0-9]{1,31}+);")
_AMPERSANDS = re.compile(r"&amp;(?:amp;)*+")

_CHINESE = re.compile("[\u3400-\u9fff]")
_LINK = re.compile(r"(?<![A-Za-z0-9_)\]])\[\[([^\[\]{}<>\n]*+)\]\]")
_TEMPLATE = re.compile(r"\{\{([^{}]*+)\}\}")
_CHINESE_SIDE = "\u3001-\u303f\u3400-\u9fff\uff01-\uff5e"
_BOLD = re.compile(r"'''?(?!')([^'\n]{1,200})'''?(?!')")
_SURE_BOLD = re.compile(
    rf"'''(?!')([^'\n]{{1,200}})'''(?=[{_CHINESE_SIDE}])|(?<=[{_CHINESE_SIDE}])'''(?!')([^'\n]{{1,200}})'''(?!')"
)
_HEADING = re.compile(r"^(={2,6})([^=\n]++)\1[ \t]*+$", re.MULTILINE)
_EXTERNAL = re.compile(r"\[(?:https?:)?//[^\s\[\]<>]++([^\[\]\n]*+)\]")
_NAMESPACES = (
    "file|image|category|media|\u6587\u4ef6|\u6a94\u6848|\u6863\u6848|\u56fe\u50cf|\u5716\u50cf|\u5206[\u7c7b\u985e]"
)
_NO_PROSE = re.compile(f":?(?:{_NAMESPACES}) *:", re.IGNORECASE)
_ALL_MARKS = re.compile(r"[<>&]|\[\[|\]\]|\{\{|\}\}|'''")


def strip_leftovers(text: str) -> str:
    """The text without leftovers of markup; the same object if there are none. Applying it twice changes nothing."""
    if "<" not in text and "&" not in text and "[[" not in text and "{{" not in text and "'''" not in text:
        return text
    for _ in range(MAX_PASSES):
        before = text
        text = _strip_once(text)
        if text == before:
            return text
    return _ALL_MARKS.sub(" ", text)  # nested deeper than any author does


def _strip_once(text: str) -> str:
    if "<" in text and ">" in text:
        text = _strip_tags(_cut_blocks(text))
    if "&" in text and ";" in text:
        text = _ENTITY.sub(_character_of_entity, _AMPERSANDS.sub("&", text))
    if "[[" in text or "{{" in text:
        text = _strip_wikitext(text)
    return _SURE_BOLD.sub(r"\1\2", text) if "'''" in text else text


def _cut_blocks(text: str) -> str:
    """Without comments, scripts, styles and references: their content is not prose. One that never ends is kept."""
    kept, start = [], 0
    folded = text.lower()
    if len(folded) != len(text):  # a few letters grow in lower case; then only lower-case ends are seen
        folded = text
    unclosed: set[str] = set()
    while opening := _OPENING.search(text, start):
        name = (opening[1] or "").lower()
        end = f"</{name}>" if name else "-->"
        is_open = end not in unclosed and not opening[0].endswith("/>")
        closed = folded.find(end, opening.end()) if is_open else -1
        if closed >= 0:
            kept += [text[start : opening.start()], "" if name == "ref" else " "]
            start = closed + len(end)
            continue
        if is_open:
            unclosed.add(end)  # asked once for each name: a million open tags must not cost a million searches
        kept.append(text[start : opening.end()])
        start = opening.end()
    return "".join([*kept, text[start:]]) if kept else text


def _strip_tags(text: str) -> str:
    closed = {name.lower() for name in _SHORT_CLOSING.findall(text)}

    def blank(tag: re.Match[str]) -> str:
        name = (tag[2] or "").lower()
        if name in _SHORT_NAMES and name not in closed and tag[0] == f"<{tag[2]}>":
            return tag[0]  # `x<b>y` without an end is a type parameter or a comparison
        if name in ("td", "th"):
            return " "
        return "\n" if name in _BLOCK_NAMES else ""

    return _TAG.sub(blank, text)


def _character_of_entity(entity: re.Match[str]) -> str:
    name = entity[1]
    if not name.startswith("#"):
        return html5.get(f"{name};", entity[0])
    code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
    return " " if code < 32 or code > 0x10FFFF or 0xD800 <= code < 0xE000 else chr(code)


def _strip_wikitext(text: str) -> str:
    is_wikitext = any(_CHINESE.search(link[1]) and _is_target(link[1]) for link in _LINK.finditer(text))
    if not is_wikitext and not any(_is_surely_template(template[1]) for template in _TEMPLATE.finditer(text)):
        return text
    text = _LINK.sub(_label_of_link, _TEMPLATE.sub(lambda found: "" if _is_name(found[1]) else found[0], text))
    text = _HEADING.sub(lambda heading: heading[2].strip(), _EXTERNAL.sub(r"\1", text))
    return _BOLD.sub(r"\1", text)


def _is_name(content: str) -> bool:
    return content[:1].isalnum() or content[:1] in ("#", ":")


def _is_target(content: str) -> bool:
    return bool(content) and not content[0].isspace() and content[0] not in "\"'|,"


def _is_surely_template(content: str) -> bool:
    has_values = content.count("|") > 1 or ("|" in content and "=" in content)
    return _is_name(content) and (has_values or _CHINESE.search(content) is not None)


def _label_of_link(link: re.Match[str]) -> str:
    target, _, label = link[1].partition("|")
    if not _is_target(link[1]):
        return link[0]
    if _NO_PROSE.match(target):
        return ""
    return label.rsplit("|", 1)[-1] or target.split("#")[0].lstrip(":")
