import pytest

from app.corpus.language import language_of


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("话说天下大势\uff0c分久必合\uff0c合久必分\u3002", "zh"),
        ("\u5f8c\u4f86\u4ed6\u53bb\u4e86\u81fa\u7063", "zh"),  # traditional
        ("学而时习之\uff0c不亦说乎", "zh"),  # classical
        ("侬好\uff0c阿拉上海人伐欢喜吃辣", "zh"),  # Wu
        ("佢哋喺度做乜嘢呀\uff0c我唔知", "zh"),  # Cantonese
        ("用 Python 写一个排序函数", "zh"),
        ("The quick brown fox jumps over the lazy dog", "en"),
        ("東京は日本の首都であり\u3001世界最大の都市の一つです", "ja"),
        ("안녕하세요 저는 한국 사람입니다", "ko"),
        ("Быстрая коричневая лиса прыгает через ленивую собаку", "ru"),
        ("Le renard brun saute par-dessus le chien paresseux", "fr"),
        ("2024-01-01 \uff01\uff01 123", "und"),
        ("", "und"),
    ],
)
def test_language_of(text: str, code: str) -> None:
    assert language_of(text) == code


def test_only_the_first_thousand_characters_count() -> None:
    assert language_of("天下大势" * 250 + "The quick brown fox " * 500) == "zh"
