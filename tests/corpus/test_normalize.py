import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.corpus.config import NormalizeConfig
from app.corpus.leftovers import strip_leftovers
from app.corpus.normalize import build_normalizer

normalize = build_normalizer(NormalizeConfig())


def mojibake(text: str, charset: str) -> str:
    return text.encode("utf-8").decode(charset)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("\ufeff  刘备\u3000\u3000关羽 \r\n\r\n\r\n\r\n张飞\n", "刘备 关羽\n\n张飞"),
        ("e\u0301", "\u00e9"),
        ("a\x00b\u200bc\u202ed\u2066e\u00adf", "abcdef"),
        ("刘备\u2028关羽\x0c张飞\x85赵云\x0b马超", "刘备\n关羽\n张飞\n赵云\n马超"),
        ("刘备\u2003\u202f关羽", "刘备 关羽"),
        (" \n\t ", ""),
        ("\uff21\uff22\uff43\uff11\uff12", "ABc12"),
        ("\uff76\uff9e\uff97\uff7d", "\u30ac\u30e9\u30b9"),  # half-width katakana with its voicing mark
        ("\u2f08\u2f17", "\u4eba\u5341"),  # Kangxi radicals
    ],
)
def test_characters_and_blanks(raw: str, expected: str) -> None:
    assert normalize(raw) == expected


@pytest.mark.parametrize(
    "text",
    [
        "全角\uff0c标点\u3002\u201c引号\u201d\u2018\u2019\uff08括号\uff09\u300a书\u300b\uff01\uff1f\uff1b\uff1a\u2014\u2014\u2026\u2026\u3001\u00b7\uff5e\uff05",
        "1 < 2 and 3 > 2",
        "if (a<b && c>d) { x[[1]] = y[[i]]; p->q(); }",
        "vector<int> x; List<String> y; Map<K,V> z; std::pair<a,b> w; f<b>(c)",
        "#include <stdio.h>",
        "https://a.cn/?a=1&copy=2&lt=3&para=4&b=5",
        'm = [[1,2],[3,4]]; n = [["张三", "李四"]]; [[ -f 文件 ]] && echo {{ name }} {{msg}}',
        "def f():\n'''计算平均值'''\nreturn x == y == z",
        "AT&T; R&D; Q&A &c.; a &= b; &notit;",
        "caf\u00e9 na\u00efve, 37\u00b0C, 3\u00d74, \u00a9 2024, Gr\u00f6\u00dfe, \u041f\u0440\u0438\u0432\u0435\u0442",
        "\u5f8c\u4f86\u7684\u81fa\u7063",  # traditional characters stay unless asked
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # a joiner that spells
    ],
)
def test_good_text_stays_as_it_is(text: str) -> None:
    assert normalize(text) == text


@pytest.mark.parametrize("charset", ["latin-1", "sloppy-windows-1252"])
def test_mojibake_is_repaired_and_its_neighbours_are_left(charset: str) -> None:
    import ftfy.bad_codecs

    ftfy.bad_codecs.ok()
    good = "刘备和关羽是兄弟"
    assert normalize(mojibake(good, charset)) == good
    fine = "\u201c他说\uff1a\u2018好\u2019\u201d\uff0c\u2026\u2026caf\u00e9"
    assert normalize(f"{fine}\n{mojibake(good, charset)}") == f"{fine}\n{good}"
    unrepaired = build_normalizer(NormalizeConfig(repair_mojibake=False))
    assert unrepaired(mojibake(good, charset)) != good


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("<p>你好<br/>世界</p><div class='a' id=b>再见</div>", "你好\n世界\n\n再见"),
        ("<script type=\"text/javascript\">var a = '<b>';</script>正文<style>p{}</style><!-- 注 -->完", "正文 完"),
        ("<SCRIPT>x</SCRIPT>正文", "正文"),
        ("<a href='http://x.cn/?a=1&b=2' target=_blank>链接</a>", "链接"),
        ("H<sub>2</sub>O 与 <b>粗体</b>", "H2O 与 粗体"),
        ("<td>甲</td><td>乙</td>", "甲 乙"),
        ("好&nbsp;书&amp;杂志 &#183; &#x4e2d;&hellip;&ldquo;引&rdquo;", "好 书&杂志 \u00b7 中\u2026\u201c引\u201d"),
        ("&amp;amp;amp;lt;", "<"),
        ("&lt;br&gt;文", "文"),
        ("&#0;&#xd800;&#99999999;文", "&#99999999;文"),
        ("[[刘备|玄德]]是[[蜀汉]]的{{cite|url=a|t={{b}}}}皇帝[[File:a.jpg|thumb|像]][[分类:三国]]", "玄德是蜀汉的皇帝"),
        ("'''刘备'''\uff08161年\uff09", "刘备\uff08161年\uff09"),
        (
            "== 生平 ==\n[[刘备]]''斜体''<ref name=\"a\">注</ref>文<ref name=x />后[http://a.cn 网站]",
            "生平\n刘备斜体文后 网站",
        ),
        ("<script>没有结尾", "没有结尾"),
    ],
)
def test_leftovers_of_markup_go(raw: str, expected: str) -> None:
    assert normalize(raw) == expected


def test_each_step_can_be_switched_off() -> None:
    assert build_normalizer(NormalizeConfig(half_width=False))("\uff21\u2f08") == "\uff21\u2f08"
    assert build_normalizer(NormalizeConfig(strip_markup=False))("<p>你好&amp;</p>") == "<p>你好&amp;</p>"
    assert build_normalizer(NormalizeConfig(to_simplified=True))("\u5f8c\u4f86\u7684\u81fa\u7063") == "后来的台湾"


_PIECES = "刘备 ab 1 \uff0c \u3002 \t \n \r \x00 \u3000 \u00a0 \u200b \ufeff \u2028 \x85 e\u0301 "
_PIECES += "\u1100\u1161 \uff21 \uff9e \uff76 \u2f08 \u212b < > & ; amp; &amp; &lt; &gt; &#65313; &#x301; "
_PIECES += "&eacute; <b> </b> <p> <br> <!-- --> <script> </script> <ref> / [[ ]] [ ] | {{ }} TTT TT == # : = "
_PIECES += "\u00c3 \u00a9 \u00e2\u20ac\u0153 \u00e5\u02c6\u02dc \x98 \u5f8c \u81fa \u4e7e S"
MESSY = st.lists(st.sampled_from([piece.replace("T", "'").replace("S", " ") for piece in _PIECES.split(" ")])).map(
    "".join
)


@pytest.mark.parametrize("to_simplified", [False, True])
@given(text=MESSY | st.text())
@example(text="<<b>b>\u00c3\u200b\u00a9</b>")
@example(text="[[|刘备]]\n == 标题 ==")
@example(text="{{" * 9 + "刘备" + "}}" * 9)
def test_normalize_twice_is_normalize_once(to_simplified: bool, text: str) -> None:
    function = build_normalizer(NormalizeConfig(to_simplified=to_simplified))
    once = function(text)
    assert function(once) == once


@given(
    st.text(
        st.sampled_from(
            "刘备关羽张飞的了是\uff0c\u3002\uff01\u201c\u201d\u2026\u2014\u300a\u300b\uff08\uff09\u3001\uff1a"
        ),
        max_size=50,
    )
)
def test_plain_chinese_never_changes(text: str) -> None:
    assert normalize(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        "<b",
        "<script>",
        "<!--",
        "&amp;",
        "[[刘|",
        "{{刘",
        "<a b=",
        "{{a|b=",
        "'''刘",
        "<a  ",
        "<<b>",
        "[http://",
        "==a [",
    ],
)
def test_nested_and_unclosed_markup_takes_linear_time(piece: str) -> None:
    text = piece * (30_000 // len(piece))
    started = time.process_time()
    strip_leftovers(f"[[刘备]]{text}")
    strip_leftovers(text + ">" * 1000 + "}}" * 1000)
    assert time.process_time() - started < 1.0
