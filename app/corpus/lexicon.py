"""Words that tell what sort of text it is, and the automata that find them.

Short lists of our own, and lists that users name by URI, one word a line. Matching is Aho-Corasick over the whole text,
on lower case and half width for the users' lists. It judges nothing, and it ships no list of sensitive words.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

import ahocorasick_rs

from app import storage

FUNCTION_WORDS = tuple("的了是在和有不我他这也就都而之其以于与为曰者乃")  # modern and classical prose
_ADVERTISEMENTS = """
加微信 加我微信 微信号 加薇信 加vx 加VX 加QQ 加qq QQ群 qq群 扫码 扫描二维码 扫一扫 长按二维码 识别二维码
关注公众号 关注我们 点击链接 点击下方 点击购买 点击领取 点击进入 立即购买 立即抢购 立即领取 立即下载 立即咨询
免费领取 免费咨询 限时抢购 限时优惠 限时特价 优惠券 领券 红包 秒杀 包邮 全场 代开发票 代开 办证 刻章 贷款 无抵押
信用卡套现 网上兼职 招聘兼职 日赚 日结 月入过万 躺赚 刷单 返利 返现 代理加盟 招商加盟 诚招代理 加盟热线 咨询热线
订购热线 服务热线 联系电话 客服电话 厂家直销 批发价 货到付款 低价出售 博彩 彩金 投注 开户送 棋牌 真人娱乐 娱乐城
六合彩 时时彩 私服 外挂 代练 祖传秘方 无效退款 减肥药 壮阳 增高 丰胸
"""
ADVERTISEMENT_TERMS = tuple(_ADVERTISEMENTS.split())
JAVASCRIPT_LINE = re.compile(
    r"(?:启用|开启|打开|支持|禁用|允许|enable|disable|requires?|turn on)[\w ]{0,20}?(?:javascript|cookies?)\b"
    r"|(?:javascript|cookies?)\W{0,3}(?:被禁用|未启用|未开启|is disabled|must be enabled)"
    r"|\bfunction\b[^()\n]{0,40}\([^()\n]{0,80}\) ?\{|\b(?:var|let|const) [\w$]{1,40} ?=|\b(?:document|window)\.\w"
    r"|=> ?\{|\$\([^()\n]{1,80}\)\.\w",
    re.IGNORECASE,
)
_WIDE = re.compile("[\uff01-\uff5e]")
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_ASCII_WORD = re.compile("[0-9a-z]")


@cache
def advertisement_automaton() -> ahocorasick_rs.AhoCorasick:
    """Finds ADVERTISEMENT_TERMS; of overlapping ones the longest."""
    return ahocorasick_rs.AhoCorasick(list(ADVERTISEMENT_TERMS), matchkind=ahocorasick_rs.MatchKind.LeftmostLongest)


def fold(text: str) -> str:
    """Lower case, with all full-width forms, punctuation too, in half width: what word lists are matched on."""
    text = text.lower()
    return text.translate(_HALF_WIDTH) if _WIDE.search(text) else text


class WordFinder:
    """Counts occurrences of words of users' lists; words of Latin letters count as whole words only."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._automaton = ahocorasick_rs.AhoCorasick(words, matchkind=ahocorasick_rs.MatchKind.LeftmostLongest)

    def count(self, text: str) -> int:
        """How many there are in the text, which is folded first."""
        folded = fold(text)
        found = self._automaton.find_matches_as_indexes(folded)
        return sum(1 for word, start, end in found if self._is_whole(folded, self._words[word], start, end))

    @staticmethod
    def _is_whole(text: str, word: str, start: int, end: int) -> bool:
        before, after = text[max(start - 1, 0) : start], text[end : end + 1]
        runs_on_before = _ASCII_WORD.match(word) and _ASCII_WORD.match(before)
        runs_on_after = _ASCII_WORD.match(word[-1]) and _ASCII_WORD.match(after)
        return not (runs_on_before or runs_on_after)


@lru_cache(maxsize=8)
def load_words(uris: tuple[str, ...]) -> WordFinder:
    """The finder for all words of these files. Raises ValueError naming a file that is missing, empty or not UTF-8."""
    words: dict[str, None] = {}
    for uri in uris:
        found = [word for line in read_text(uri).splitlines() if (word := fold(line).strip())]
        if not found:
            raise ValueError(f"rules.sensitive_word_uris: {uri} holds no words")
        words |= dict.fromkeys(found)
    return WordFinder(list(words))


def read_text(uri: str) -> str:
    """A UTF-8 text file. Raises ValueError naming a file that is missing or something else."""
    try:
        with storage.open_file(uri) as source:
            return str(source.read().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"rules: {uri} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"rules: {uri} is not UTF-8 text: {error}; convert it") from None
