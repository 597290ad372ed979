"""Personal data in Chinese and English text: where it is, and the text with placeholders in its stead.

A bounded pattern per kind finds candidates; checksums, dates, regions, number ranges and the words beside them decide.
Full-width digits and letters count as ASCII ones. Every pattern is bounded, so the time is linear in the text.
It does not find names, addresses, or numbers that nothing tells from an order number.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

KINDS: tuple[str, ...] = (
    *("mobile", "landline", "resident_id", "bank_card", "credit_code"),
    *("email", "ipv4", "ipv6", "plate", "passport"),
)
_MOST_SPECIFIC_FIRST = (
    *("resident_id", "credit_code", "email", "bank_card", "mobile", "landline"),
    *("ipv6", "ipv4", "passport", "plate"),
)
Span = tuple[int, int]


@dataclass(frozen=True)
class Finding:
    """text[start:end] is personal data of that kind."""

    kind: str
    start: int
    end: int


def find_pii(text: str, kinds: Sequence[str] = KINDS) -> list[Finding]:
    """What is found of these kinds, in order, without overlaps: the longer wins, then the more specific kind.

    Raises ValueError for an unknown kind.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"no such kind of personal data: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    if not _POSSIBLE.search(text):
        return []
    if _WIDE.search(text):
        text = text.translate(_TO_ASCII)  # one character for one: positions stay
    found = [Finding(kind, *span) for kind in _MOST_SPECIFIC_FIRST if kind in kinds for span in _FINDERS[kind](text)]
    found.sort(key=lambda one: one.start - one.end)  # stable: of one length the more specific stays first
    taken = bytearray(len(text)) if len(found) > 1 else bytearray()
    kept = []
    for one in found:
        if 1 not in taken[one.start : one.end]:
            taken[one.start : one.end] = b"\x01" * (one.end - one.start)
            kept.append(one)
    return sorted(kept, key=lambda one: one.start)


def mask_pii(text: str, kinds: Sequence[str] = KINDS) -> tuple[str, Counter[str]]:
    """The text with placeholders such as [MOBILE], and how many of each kind; all else stays as it was.

    >>> mask_pii("电话13812345678。")
    ('电话[MOBILE]。', Counter({'mobile': 1}))
    """
    counts: Counter[str] = Counter()
    while findings := find_pii(text, kinds):  # again: what the longer of two left over may be a finding itself
        pieces, end = [], 0
        for one in findings:
            pieces += [text[end : one.start], f"[{one.kind.upper()}]"]
            end = one.end
            counts[one.kind] += 1
        text = "".join(pieces) + text[end:]
    return text, counts


# --- what stands beside a number ---

_POSSIBLE = re.compile("[0-9@\uff10-\uff19\uff20]")
_WIDE = re.compile("[\uff10-\uff19\uff20-\uff3a\uff41-\uff5a]")
_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_SEP = "[ \\-\u00a0\u2010-\u2015\u2212\u3000\uff0d]"
_COLON = "[\\s:\uff1a]"
_LABEL_CHARACTERS = 24  # how far before a number the word is looked for that says what it is
_NAMED_OTHERWISE = re.compile(
    r"(?:订单|单号|编号|编码|流水|序列|货号|票号|批次|批号|型号|版本|运单|快递|合同|条码|条形码|发票|工号|学号|案号|群|扣扣"
    r"|时间戳|QQ|ISBN|ISSN|IMEI|DOI|SKU|order|serial|invoice|ticket|tracking|timestamp|\bNo\.?|\b[ou]?id)"
    rf"(?:号码|号|编号|\s?number|\s?no\.?|\s?id)?\s?(?:是|为|is)?(?:{_COLON}|[#.=_/\"']){{0,3}}$",
    re.IGNORECASE,
)
_PHONE_LABEL = re.compile(
    r"(?:电话|手机|座机|传真|热线|致电|拨打|联系|微信|短信|tel|phone|mobile|mob|cell|fax|call|whatsapp|wechat|contact)"
    r"[^0-9\n]{0,10}$",
    re.IGNORECASE,
)
_IDENTITY_LABEL = re.compile(r"(?:身份证|证件|居民|identity|ID card|resident id)[^0-9\n]{0,12}$", re.IGNORECASE)
_CARD_LABEL = re.compile(r"(?:卡号|银行卡|储蓄卡|信用卡|借记卡|[账帐]号|card|account)[^0-9\n]{0,12}$", re.IGNORECASE)
_VERSION_BEFORE = re.compile(
    r"(?:版本号?|固件|(?<![A-Za-z])v|ver\.?|version|release|第|章节?|section|chapter|fig(?:ure)?\.?|[图表])"
    rf"{_COLON}{{0,2}}$",
    re.IGNORECASE,
)
_SECTION_AFTER = re.compile(r"\s?(?:节|章|条|款|版|小节)")
_AMOUNT_BEFORE = re.compile("(?:[\xa5\uffe5$€£]|RMB|CNY|USD)\\s?$", re.IGNORECASE)
_AMOUNT_AFTER = re.compile(r"\s?(?:元|块钱|[万亿]|美[元金]|日元|欧元|人[次民]|次|吨|公里|千米|%|字节|bytes)")
_LINK_BEFORE = re.compile("[A-Za-z_]{2}[=/&]$")


def _before(text: str, start: int) -> str:
    return text[max(0, start - _LABEL_CHARACTERS) : start]


def _is_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether it is not a part of a longer word of ASCII letters and digits, nor of a decimal number."""
    after, before = text[end : end + 2], text[max(0, start - 2) : start]
    in_decimal = (after[:1] == "." and after[1:].isdigit()) or (before[1:] == "." and before[:1].isdigit())
    return not (in_decimal or _is_word(after[:1]) or _is_word(before[-1:]))


def _is_of_another_sort(text: str, start: int, end: int) -> bool:
    """Whether the words beside it name it otherwise: the number of an order, an amount, a part of a link."""
    before = _before(text, start)
    return bool(
        _AMOUNT_AFTER.match(text, end)
        or _AMOUNT_BEFORE.search(before)
        or _NAMED_OTHERWISE.search(before)
        or _LINK_BEFORE.search(before)
    )


def _digits(number: str) -> str:
    return "".join(character for character in number if character in "0123456789")


def _is_day(yyyymmdd: str) -> bool:
    try:
        return 1880 <= date(int(yyyymmdd[:4]), int(yyyymmdd[4:6]), int(yyyymmdd[6:8])).year < 2050
    except ValueError:
        return False


# --- telephones ---

# Segments in use in 2025; 141, 144 and 172 belong to machines, 154, 194 and most of 16x and 14x are not given out.
_MOBILE = re.compile(
    "1(?:(?<![0-9].)|(?<=86.))(?:3[0-9]|4[5-9]|5[0-35-9]|6[2567]|7[013-8]|8[0-9]|9[0-35-9])"
    f"(?:[0-9]{{8}}|{_SEP}?[0-9]{{4}}{_SEP}?[0-9]{{4}}|[0-9]{_SEP}[0-9]{{3}}{_SEP}[0-9]{{4}})(?![0-9])"
)
_COUNTRY_CODE = re.compile(rf"(?:[(\uff08](?:\+|00)?86[)\uff09]{_SEP}?|(?:(?<![0-9])00|\+)?(?<![1-9])86{_SEP}?)$")
_DASH = "[\\-\u2010-\u2015\u2212\uff0d]"
_MIDDLE_OF_SERIES = re.compile(f"[0-9]{_DASH}$")
_SERIES_GOES_ON = re.compile(f"{_DASH}[0-9]")

_AREA = (
    "(?:10|2[0-57-9]|3(?:1[0-9]|35|49|5[0-9]|7[0-9]|9[1-8])|4(?:1[0-9]|2[179]|3[1-9]|5[1-9]|6[4789]|7[0-9]|8[23])"
    "|5(?:1[0-9]|2[37]|3[0-9]|4[36]|5[0-9]|6[1-6]|7[0-9]|80|9[1-9])|6(?:3[1-5]|6[0238]|9[12])"
    "|7(?:01|1[0-9]|2[248]|3[0-9]|4[3-6]|5[0-9]|6[0-9]|7[0-9]|9[0-9])"
    "|8(?:1[2-8]|2[5-7]|3[0-9]|5[1-9]|7[0-9]|8[3-8]|9[1-9])|9(?:0[1-9]|1[0-9]|3[0-9]|4[13]|5[1-5]|7[0-9]|9[0-9]))"
)
_LANDLINE = re.compile(
    rf"[0(\uff08+](?<![0-9+(\uff08].)(?:(?<=\+)86{_SEP}?[(\uff08]?0?[)\uff09]?{_SEP}?|(?<=[(\uff08])0|(?<=0))"
    rf"(?P<area>{_AREA})(?P<joint>[)\uff09]{_SEP}?|{_SEP}?)"
    rf"(?P<number>[2-8][0-9]{{3}}{_SEP}?[0-9]{{4}}|[2-8][0-9]{{2}}{_SEP}?[0-9]{{4}})(?![0-9])"
)


def _mobiles(text: str) -> Iterator[Span]:
    for match in _MOBILE.finditer(text):
        start, end = match.span()
        code = _COUNTRY_CODE.search(text, max(0, start - 8), start)
        start = code.start() if code else start
        if text[start - 1 : start].isdigit():
            continue
        if _PHONE_LABEL.search(_before(text, start)):
            is_alone = not _is_word(text[end : end + 1])
        else:
            in_series = _MIDDLE_OF_SERIES.search(text[max(0, start - 2) : start]) or _SERIES_GOES_ON.match(text, end)
            is_alone = _stands_alone(text, start, end) and not in_series and not _is_of_another_sort(text, start, end)
        if is_alone:
            yield start, end


def _landlines(text: str) -> Iterator[Span]:
    for match in _LANDLINE.finditer(text):
        start, end = match.span()
        if match[0][0] in "(\uff08" and match["joint"][:1] not in (")", "\uff09"):
            start += 1
        is_labelled = bool(_PHONE_LABEL.search(_before(text, start)))
        is_joined = not match["joint"] and match[0][0] != "+"
        is_long_area = len(match["area"]) == 3
        if len(_digits(match["number"])) == 7 and not is_long_area:
            continue
        if is_labelled or not (is_joined or _is_of_another_sort(text, start, end) or _SERIES_GOES_ON.match(text, end)):
            before = text[max(0, start - 2) : start]
            if not _is_word(text[end : end + 1]) and (is_labelled or not _MIDDLE_OF_SERIES.search(before)):
                yield start, end


# --- numbers with checksums ---

_PROVINCE = re.compile("1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
_MONTH_DAY = "(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
_RESIDENT = re.compile(
    f"[1-9](?<![0-9].)[0-9]{{5}}(?:{_SEP}?(?:18|19|20)[0-9]{{2}}{_MONTH_DAY}{_SEP}?[0-9]{{3}}[0-9Xx]"
    f"|[0-9]{{2}}{_MONTH_DAY}[0-9]{{3}})(?![0-9])"
)
_RESIDENT_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_CREDIT_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
_CREDIT = re.compile(
    "(?:1[1239]|2[19]|3[1-59]|4[19]|5[1-59]|6[129]|7[129]|8[19]|9[123]|A[19]|N[1239]|Y1)(?<![0-9A-Za-z_]..)"
    "[0-9]{6}[0-9A-HJ-NP-RTUW-Y]{10}(?![0-9A-Za-z_])"
)

_CARD = re.compile(
    "[1-9](?<![0-9].)(?:[0-9]{14,18}"
    f"|[0-9]{{3}}(?:{_SEP}[0-9]{{4}}){{3}}(?P<rest>{_SEP}[0-9]{{1,3}})?|[0-9]{{5}}{_SEP}[0-9]{{10,13}}"
    f"|[0-9]{{3}}{_SEP}[0-9]{{6}}{_SEP}[0-9]{{5}})(?![0-9])"
)
_CARD_RANGES = re.compile(  # UnionPay, old Chinese debit cards, Visa, Mastercard, JCB, Discover, American Express
    "(?:(?:62|81)[0-9]{14,17}|(?:9558|103[0-9])[0-9]{15}|4[0-9]{15}|4(?:36742|56351|05512)[0-9]{13}|5[1-5][0-9]{14}"
    "|(?:222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}"
    "|60(?:11|[0-9]{2})[0-9]{12,15}|6(?:4[4-9]|5[0-9])[0-9]{13}|3[47][0-9]{13})"
)


def resident_check(digits: str) -> str:
    """The 18th character of a resident ID with these first 17 digits (GB 11643, ISO 7064 MOD 11-2)."""
    return "10X98765432"[sum(w * int(d) for w, d in zip(_RESIDENT_WEIGHTS, digits, strict=True)) % 11]


def credit_check(code: str) -> str:
    """The 18th character of a unified social credit code with these first 17 (GB 32100)."""
    total = sum(pow(3, i, 31) * _CREDIT_ALPHABET.index(character) for i, character in enumerate(code))
    return _CREDIT_ALPHABET[-total % 31]


def luhn_check(digits: str) -> str:
    """The last digit of a card number with these digits before it (ISO/IEC 7812-1)."""
    return str(-sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10)


def _residents(text: str) -> Iterator[Span]:
    for match in _RESIDENT.finditer(text):
        start, end = match.span()
        number = _digits(match[0][:-1]) + match[0][-1].upper()
        is_foreign = len(number) == 18 and number[0] == "9"  # permanent residents' cards of 2023
        if not _PROVINCE.match(number, is_foreign) or _is_word(text[end : end + 1]):
            continue
        label = _IDENTITY_LABEL.search(_before(text, start))
        if not label and not _stands_alone(text, start, end):
            continue
        if len(number) == 18:
            is_sound = _is_day(number[6:14]) and resident_check(number[:17]) == number[17]
        else:  # no checksum: only where the text says so
            is_sound = bool(label) and _is_day("19" + number[6:12])
        if is_sound:
            yield start, end


def _credit_codes(text: str) -> Iterator[Span]:
    for match in _CREDIT.finditer(text):
        code = match[0]
        if not (_PROVINCE.match(code, 2) or code[2:8] == "100000") or credit_check(code[:17]) != code[17]:
            continue
        if not (code.isdigit() and _is_of_another_sort(text, *match.span())):
            yield match.span()


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        ends = [match.end(), *([match.start("rest")] if match["rest"] else [])]
        start = match.start()
        is_labelled = bool(_CARD_LABEL.search(_before(text, start)))
        for end in ends:
            number = _digits(text[start:end])
            if not _CARD_RANGES.fullmatch(number) or luhn_check(number[:-1]) != number[-1]:
                continue
            is_time = number[0] == "2" or number.startswith("103")  # yymmddhhmmss… and counters look so as well
            is_other = is_time or not _stands_alone(text, start, end) or _is_of_another_sort(text, start, end)
            if is_labelled or not is_other:
                yield start, end
                break


# --- addresses on the Internet ---

_LOCAL_REVERSED = re.compile("[A-Za-z0-9_+\\-](?:[A-Za-z0-9._%+\\-]{0,62}[A-Za-z0-9_])?")
_DOMAIN = re.compile("(?:[A-Za-z0-9](?:[A-Za-z0-9\\-]{0,61}[A-Za-z0-9])?\\.){1,6}([A-Za-z]{2,18})(?![A-Za-z0-9@_])")
_FILE_ENDING = re.compile("png|jpe?g|gif|webp|svg|css|js|json|html?|xml|pdf|zip", re.IGNORECASE)  # icon@2x.png
_IPV4 = re.compile("[0-9](?<![0-9.].)[0-9]{0,2}(?:\\.[0-9]{1,3}){3}(?![0-9]|\\.[0-9])")
_COLONS = re.compile(":[0-9A-Fa-f]{0,4}:")
_IPV6_RUN = re.compile("[0-9A-Fa-f:]+")
_HEX_BEFORE = re.compile("[0-9A-Fa-f]{1,4}$")
_IPV6_CHARACTERS = 39


def _emails(text: str) -> Iterator[Span]:
    at, last_end = text.find("@"), 0
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        local = _LOCAL_REVERSED.match(text[max(last_end, at - 65) : at][::-1]) if domain else None
        if local and domain:
            start, end = at - local.end(), domain.end()
            before = text[max(0, start - 1) : start]
            is_whole = before not in ("@", ".", "%") and not _is_word(before) and ".." not in local[0]
            if is_whole and not _FILE_ENDING.fullmatch(domain[1]):
                yield start, end
                last_end = end
        at = text.find("@", at + 1)


def _ipv4s(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        try:
            address = ipaddress.IPv4Address(match[0])
        except ValueError:
            continue
        before = _before(text, match.start())
        is_version = _VERSION_BEFORE.search(before) or _SECTION_AFTER.match(text, match.end())
        is_nobody = address.is_loopback or address.is_unspecified or address.is_reserved or address.is_multicast
        is_label = before[-2:].upper() == "IP"
        if not (is_version or is_nobody) and (is_label or _stands_alone(text, *match.span())):
            yield match.span()


def _ipv6s(text: str) -> Iterator[Span]:
    position = 0
    while colons := _COLONS.search(text, position):
        head = _HEX_BEFORE.search(text, max(position, colons.start() - 4), colons.start())
        start = head.start() if head else colons.start()
        if text[start] == ":" != text[start + 1]:  # "IP:2001:db8::1"
            start += 1
        run = _IPV6_RUN.match(text, start)
        assert run is not None, "a colon was there"
        position = end = run.end()
        if text[end - 1] == ":" and text[end - 2] != ":":
            end -= 1
        is_glued = _is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])
        if not is_glued and end - start <= _IPV6_CHARACTERS and _is_host(text[start:end]):
            yield start, end


def _is_host(number: str) -> bool:
    """Whether it is an address of a host: global, unique local or link-local; `std::dead` and ::1 are none."""
    try:
        address = ipaddress.IPv6Address(number)
    except ValueError:
        return False
    first = int(address) >> 112
    return any(map(str.isdigit, number)) and (first >> 13 == 1 or first >> 9 == 0x7E or first >> 6 == 0x3FA)


# --- plates and passports ---

_PLATE = re.compile(
    "[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][A-HJ-NP-Z][·•\u30fb.\\- ]?"
    "(?:[A-HJK][A-HJ-NP-Z0-9][0-9]{4}|[0-9]{5}[A-HJK]|[A-HJ-NP-Z0-9]{4}[A-HJ-NP-Z0-9挂学警港澳])(?![A-Za-z0-9])"
)
_NOT_A_PLATE_AFTER = re.compile(r"\s?(?:型|号[文楼]|股|款)")
_PASSPORT = re.compile("(?:[EG][0-9]|E[A-HJ-NP-Z]|[DSP]E)(?<![A-Za-z0-9_].{2})[0-9]{7}(?![0-9A-Za-z_])")
_NAMED_PASSPORT = re.compile(
    "[护通旅Pp](?:照|行证|assport|ASSPORT)[^0-9\\n]{0,16}?"
    "(?<![A-Za-z0-9])(?P<number>[A-Z]{1,2}[0-9]{6,10}|[0-9]{8,9})(?![0-9A-Za-z])"
)


def _plates(text: str) -> Iterator[Span]:
    for match in _PLATE.finditer(text):
        start, end = match.span()
        is_adjective = text[start] == "新" and text[max(0, start - 1) : start] in tuple("最全更翻创")
        if len(_digits(match[0])) >= 2 and not is_adjective and not _NOT_A_PLATE_AFTER.match(text, end):
            yield start, end


def _passports(text: str) -> Iterator[Span]:
    for match in _NAMED_PASSPORT.finditer(text):
        yield match.span("number")
    for match in _PASSPORT.finditer(text):
        is_dated = match[0][1].isdigit() and _is_day(match[0][1:])  # E20240315: a serial with its date
        if not is_dated and not _is_of_another_sort(text, *match.span()):
            yield match.span()


_FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {
    "mobile": _mobiles,
    "landline": _landlines,
    "resident_id": _residents,
    "bank_card": _cards,
    "credit_code": _credit_codes,
    "email": _emails,
    "ipv4": _ipv4s,
    "ipv6": _ipv6s,
    "plate": _plates,
    "passport": _passports,
}
