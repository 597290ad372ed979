"""Choice benchmarks: the public layouts are read as published, and answers that are known give exact scores."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.evaluation import choices
from app.evaluation.config import ChoiceConfig
from app.evaluation.likelihood import Likelihood

pytestmark = pytest.mark.slow
ANSWERS = "ABCD"


def write_cmmlu(folder: Path, subjects: Sequence[str], num_questions: int = 4) -> None:
    """As its authors publish it: dev and test, a csv file a subject, the first column without a name."""
    for split, count in (("dev", 5), ("test", num_questions)):
        for subject in subjects:
            rows = [[i, f"{subject}的{split}{i}？", "甲", "乙", "丙", "丁", ANSWERS[i % 4]] for i in range(count)]
            _write(folder / split / f"{subject}.csv", ["", "Question", "A", "B", "C", "D", "Answer"], rows)


def write_ceval(folder: Path, subjects: Sequence[str]) -> None:
    """As its authors publish it: dev with explanations, val, and test without answers."""
    for subject in subjects:
        for split, count in (("dev", 5), ("val", 3), ("test", 2)):
            header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
            header = header[: {"dev": 8, "val": 7, "test": 6}[split]]
            rows = [
                [i, f"{subject}，{split}\n{i}", "甲", "乙", "丙", "丁", ANSWERS[i % 4], "因为"][: len(header)]
                for i in range(count)
            ]
            _write(folder / split / f"{subject}_{split}.csv", header, rows)


def _write(path: Path, header: list[str], rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows])


class Knowing:
    """Prefers one answer always; keeps what it was asked."""

    def __init__(self, preferred: str) -> None:
        self.preferred = preferred
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: list[tuple[str, str]]) -> list[Likelihood]:
        self.asked += pairs
        return [Likelihood(-1.0 if text.strip() == self.preferred else -2.0, False, False) for _, text in pairs]


def test_cmmlu_has_67_subjects_and_is_scored_exactly(tmp_path: Path) -> None:
    config = ChoiceConfig(name="cmmlu", uri=str(tmp_path), layout="cmmlu", shots=(0, 5))
    subjects = [Path(file).stem for file in _files_of(config)]
    assert len(subjects) == 67
    write_cmmlu(tmp_path, subjects)
    assert len(choices.scored_files(config)) == 67
    for shots in config.shots:
        model = Knowing("C")
        found, num_cut = choices.score(config, shots, model)
        assert found == {subject: [0.0, 0.0, 1.0, 0.0] for subject in subjects}
        assert num_cut == 0
        assert len(model.asked) == 67 * 4 * 4
        assert model.asked[0][0].count("答案： ") == shots
    assert model.asked[0] == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
        + "".join(f"agronomy的dev{i}？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案： {'ABCDA'[i]}\n\n" for i in range(5))
        + "agronomy的test0？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",
        " A",
    )


def test_ceval_has_52_subjects_and_is_scored_on_val(tmp_path: Path) -> None:
    config = ChoiceConfig(name="ceval", uri=str(tmp_path), layout="ceval", shots=(0,))
    subjects = [Path(file).stem.removesuffix("_val") for file in _files_of(config)]
    assert len(subjects) == 52
    write_ceval(tmp_path, subjects)
    model = Knowing("A")
    found, _ = choices.score(config, 0, model)
    assert found == {subject: [1.0, 0.0, 0.0] for subject in subjects}
    assert all("val" in context for context, _ in model.asked)
    assert choices.score(config.model_copy(update={"max_questions": 1}), 5, Knowing("A"))[0]["law"] == [1.0]


def _files_of(config: ChoiceConfig) -> list[str]:
    return [choices._public_file(config, choices.PUBLIC[config.layout][1], name) for name in choices._wanted(config)]


def test_some_subjects_only_and_errors_that_name_the_file(tmp_path: Path) -> None:
    config = ChoiceConfig(name="cmmlu", uri=str(tmp_path), layout="cmmlu", subjects=["agronomy", "anatomy"])
    with pytest.raises(ValueError, match=r"test/agronomy\.csv: no such file"):
        choices.scored_files(config)
    write_cmmlu(tmp_path, config.subjects)
    assert list(choices.score(config, 5, Knowing("B"))[0]) == ["agronomy", "anatomy"]
    with pytest.raises(ValueError, match="agronomy has fewer than 6 examples"):
        choices.score(config, 6, Knowing("B"))
    _write(tmp_path / "test/anatomy.csv", ["", "Question", "A", "B", "C", "D", "Answer"], [[0, "？", 1, 2, 3, 4, "E"]])
    with pytest.raises(ValueError, match=r"anatomy\.csv: row 1 has the answer 'E'"):
        choices.score(config, 0, Knowing("B"))
    _write(tmp_path / "test/anatomy.csv", ["", "Question", "A", "B"], [[0, "？", 1, 2]])
    with pytest.raises(ValueError, match=r"anatomy\.csv: row 1 has no c, d"):
        choices.score(config, 0, Knowing("B"))
    with pytest.raises(ValueError, match="no such_subject"):
        choices.scored_files(config.model_copy(update={"subjects": ["such_subject"]}))


def test_any_jsonl_of_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "天空", "choices": ["蓝色", "红", "黄"], "answer": 0},
        {"question": "血", "choices": ["蓝色", "红", "黄"], "answer": "B", "subject": "人体"},
        {"question": "1+1", "choices": [2, 3], "answer": "2", "subject": "人体"},
    ]
    for name, some in (("asked", rows), ("shown", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    config = ChoiceConfig(
        name="own", uri=f"{tmp_path}/asked.jsonl", examples_uri=f"{tmp_path}/shown.jsonl", shots=(0, 1)
    )
    model = Knowing("B")
    assert choices.score(config, 1, model)[0] == {"all": [0.0], "人体": [1.0, 0.0]}
    example = "天空\nA. 蓝色\nB. 红\nC. 黄\n答案： A\n\n"
    assert model.asked[0] == (f"{example}天空\nA. 蓝色\nB. 红\nC. 黄\n答案：", " A")
    assert [len([c for c, _ in model.asked if question in c]) for question in ("血", "1+1")] == [3, 2]
    texts = config.model_copy(update={"answer_form": "text"})
    model = Knowing("蓝色")  # -1 for two characters is more a character than -2 for one
    assert choices.score(texts, 0, model)[0] == {"all": [1.0], "人体": [0.0, 1.0]}
    assert model.asked[0] == ("天空\n答案：", "蓝色")


@pytest.mark.parametrize(
    "row",
    [
        '{"question": "a", "choices": ["b", "c"], "answer": 2}',
        '{"question": "a", "choices": ["b", "c"], "answer": "d"}',
        '{"question": "a", "choices": ["b"], "answer": 0}',
        '{"question": "a", "answer": 0}',
        '["a"]',
        "no json",
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "asked.jsonl").write_text(f"\n{row}\n")
    with pytest.raises(ValueError, match=r"asked\.jsonl: line 2 is no question"):
        choices.score(ChoiceConfig(name="own", uri=str(tmp_path)), 0, Knowing("B"))


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="need examples_uri"):
        ChoiceConfig(name="own", uri="x.jsonl", shots=(5,))
    with pytest.raises(ValueError, match="cmmlu is defined on letters"):
        ChoiceConfig(name="c", uri="x", layout="cmmlu", answer_form="text")
