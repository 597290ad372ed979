"""Evaluation items are found in documents, in the public layouts of CMMLU and C-Eval."""

import json
from pathlib import Path

import pytest

from app.corpus.decontaminate import fold, load_items

QUESTION = "三国时期，赤壁之战中提出火攻之计并诈降曹操的东吴将领是哪一位"
OTHER = "下列关于细胞膜结构与功能的叙述中，哪一项符合流动镶嵌模型的基本观点"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "cmmlu.csv").write_text(
        f',Question,A,B,C,D,Answer\n0,"{QUESTION}",黄盖,周瑜,鲁肃,吕蒙,A\n1,一加一,二,三,四,五,A\n',
        encoding="utf-8-sig",
    )
    item = {"id": 0, "question": OTHER, "choices": ["磷脂双分子层是静止的", "蛋白质分子可以运动"], "answer": "B"}
    (tmp_path / "own.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n\n")
    return [str(tmp_path / "cmmlu.csv"), str(tmp_path / "*.jsonl")]


def test_an_item_is_found_whatever_its_punctuation(files: list[str]) -> None:
    items = load_items(files, 13)
    assert items.names == ["cmmlu.csv#1", "own.jsonl#1"]
    assert items.num_too_short == 1
    leaked = f"题库：{QUESTION.replace('，', ' ')}？ A.黄盖 B.周瑜 C.鲁肃 D.吕蒙 答案：A"
    texts = ["却说曹操引兵南下，刘备问计于孔明。" * 9, leaked, QUESTION[:14], "", OTHER[2:]]
    assert items.find(texts, 0.5) == ["", "cmmlu.csv#1", "", "", "own.jsonl#1"]
    assert items.find(texts, 0.95) == ["", "cmmlu.csv#1", "", "", ""]
    assert items.find([text for text in texts for _ in range(3)], 0.5)[3:6] == ["cmmlu.csv#1"] * 3


def test_without_files_nothing_is_found() -> None:
    assert load_items([], 13).find(["任何文本" * 20], 0.0) == [""]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decontamination\.uris: no file at .*none\.csv"):
        load_items([str(tmp_path / "none.csv")], 13)
    for name, content in (("a.jsonl", b"{broken"), ("b.jsonl", b"[1]"), ("c.csv", b"\xff\xfe\xfd"), ("d.pdf", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as evaluation items"):
            load_items([str(tmp_path / name)], 13)


def test_folding_keeps_letters_digits_and_chinese() -> None:
    assert fold("《三国》 ABC_123，Ω。") == "三国abc123ω"
