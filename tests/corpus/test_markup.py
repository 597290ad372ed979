import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.corpus.markup import MAX_NESTING, decode_page, html_to_text, wikitext_to_text

ARTICLE = """{{Infobox person|name=刘备|image=[[File:a.jpg|thumb]]
|x={{lang|en|y}}}}
'''刘备'''\uff08161年-223年\uff0c{{lang|en|Liu Bei}}\uff0c{{bd|161年}}\uff09\uff0c
字'''''玄德'''''<ref name="a">{{cite|title=三国志}}</ref>\u3002<!-- 注 -->
[[File:Liu.jpg|thumb|200px|刘备像 [[三国]]]]他是{{le|蜀汉开国君主|Shu}}\u3002H<sub>2</sub>O&nbsp;&lt;\u3002<br />3 < 5

== 生平 ==
{| class="wikitable"
|-
| 甲 || 乙
{| 表中表
|}
|}
* [[诸葛亮|孔明]]与[[关羽]]
* [[CSI:犯罪现场]]\uff0c[http://a.b 网站]
=== 空 ===
== 参考文献 ==
{{reflist}}<references />
== 外部链接 ==
[[Category:三国人物]][[分类:蜀汉]]
[[en:Liu Bei]]
__NOTOC__
"""
TEXT = """刘备\uff08161年-223年\uff0cLiu Bei\uff09\uff0c
字玄德\u3002
他是蜀汉开国君主\u3002H2O\xa0<\u3002
3 < 5

生平

孔明与关羽
CSI:犯罪现场\uff0c网站"""


def test_an_article_becomes_its_running_text() -> None:
    assert wikitext_to_text(ARTICLE) == TEXT


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("甲{{a|{{b|[[c]]}}|{{{d|e}}}}}乙", "甲乙"),
        ("甲{{没有关上[[乙]]", "甲没有关上乙"),
        ("甲}}乙]]丙|}\n|}丁", "甲乙丙|}\n丁"),
        ("甲<ref>[[没有关上</ref>乙{{x}}", "甲乙"),
        ("甲<ref name=a />乙<ref group='b'>丙</ref>丁", "甲乙丁"),
        ("<math>\\frac{{a}{b}</math>甲<gallery>\nFile:a.jpg|b\n</gallery>", "甲"),
        ("<div class='x'>甲</div><!-- 没有关上", "甲\n没有关上"),
        ("-{zh-cn:计算机; zh-tw:電腦;}-与-{zh-hans:软件;zh-hant:軟體}-与-{只此}-", "计算机与软件与只此"),
        ("-{H|zh-cn:甲;zh-tw:乙}-丙-{T|zh:题}--{A|zh-cn:丁;zh-tw:戊}-", "丙丁"),
        ("[[:Category:三国|分类]]、[[文件:a.jpg|缩略图|x]][[w:en:Foo|福]]", "分类、福"),
        ("[http://a.b]甲[http://a.b 乙]丙[http://a.c\n丁", "甲乙丙\n丁"),
        ("甲\uff08\uff09乙\uff08\uff0c\uff09丙()丁\uff08；戊\uff0c\uff09", "甲乙丙丁\uff08戊\uff09"),
        ("thumb|250px|说明\n右|甲\nleft|图", "右|甲"),
        ("== 空 ==\n== 甲 ==\n=== 乙 ===\n丙\n==== 空 ====", "甲\n\n乙\n\n丙"),
        ("{{tsl|en|Foo||甲}}{{lang|en}}{{nowrap|'''乙'''}}", "甲乙"),
        ("&amp;&#x5218;&#xd800;&没有", "&刘?&没有"),
        (":* 甲\n#乙\n;丙:丁\n----\n戊", "甲\n乙\n丙丁\n\n戊"),
        ("", ""),
    ],
)
def test_wikitext(wikitext: str, text: str) -> None:
    assert wikitext_to_text(wikitext) == text


MARKS = ["{{", "}}", "[[", "]]", "{|", "|}", "|", "=", "\n", "''", "'''", "[http://a ", "]", "-{", "}-", "<ref>"]
MARKS += ["</ref>", "<b ", "<!--", "-->", "&#xd800;", "*", "==", "File:", "a", "刘", "<"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(MARKS), max_size=60))
@example(["]", "[[", "[http://a ", "]]"])
def test_any_marks_give_text_without_pairs_of_marks(marks: list[str]) -> None:
    text = wikitext_to_text("".join(marks))
    text.encode("utf-8")
    assert not {"{{", "}}", "[[", "]]", "<ref>"} & {text[index : index + 2] for index in range(len(text))}


@pytest.mark.parametrize(
    "mark", ["{{a|", "[[a|", "[http://a [[", "<div a=", "<b>", "{|\n", "{{lang|en|", "<!--", "<ref>[["]
)
def test_hostile_wikitext_takes_time_in_proportion(mark: str) -> None:
    start = time.process_time()
    wikitext_to_text(mark * 3000 + "]]}}|}</ref>" * 3000)  # a parser that tries again from each mark takes minutes
    assert time.process_time() - start < 1.5


PAGE = "<html><head><meta charset='{}'><title> 三国\n演义</title></head><body>{}</body></html>"


def test_html_gives_title_and_main_content() -> None:
    body = "<nav><a href='/'>首页</a></nav><main><h1>第一回</h1><p>话说天下大势</p></main>"
    body += "<script>x()</script><footer>版权</footer>"
    assert html_to_text(PAGE.format("utf-8", body)) == ("三国 演义", "第一回\n\n话说天下大势")
    assert html_to_text("") == ("", "")


def test_html_nested_too_deeply_is_no_page() -> None:
    assert html_to_text("<div>" * (MAX_NESTING + 1) + "a") is None
    start = time.process_time()
    page = "<div>" * MAX_NESTING + "a" + "</div>" * MAX_NESTING + "<p>话说天下</p><li>大势" * MAX_NESTING
    assert html_to_text(page) is not None  # many elements, none too deep
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("encoding", "declared", "header"),
    [
        ("utf-8", "utf-8", None),
        ("utf-8-sig", "gbk", "gbk"),
        ("gb18030", "gb2312", None),
        ("gb18030", "x", "GBK"),
        ("gb18030", "x", "no such encoding"),
        ("utf-16", "x", None),
    ],
)
def test_pages_are_decoded_as_they_say_or_look(encoding: str, declared: str, header: str | None) -> None:
    page = PAGE.format(declared, "<p>话说天下大势，分久必合，合久必分。</p>")
    assert decode_page(page.encode(encoding), header) == page


def test_traditional_pages_in_big5() -> None:
    page = "<meta charset=big5><title>三國演義</title><p>話說天下大勢，分久必合。滙豐</p>"
    assert decode_page(page.encode("big5hkscs")) == page
