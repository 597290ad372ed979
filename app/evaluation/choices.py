"""Choice benchmarks by lm-evaluation-harness, from local files: CMMLU, C-Eval, and any jsonl of questions.

Prompts, few-shot examples and scoring are the harness's own, from the task files in its package; only where the rows
come from is ours: the csv files as their authors publish them. C-Eval is scored on `val`, as the answers of its
`test` are not public. A model is a function that gives the likelihoods of (context, continuation) pairs.
"""

from __future__ import annotations

import csv
import io
import json
import string
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import yaml
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from app import storage
from app.evaluation.config import ChoiceConfig
from app.evaluation.likelihood import Likelihood

lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)  # else a bar for each subject, in the job's log

Row = dict[str, Any]
Compare = Callable[[list[tuple[str, str]]], list[Likelihood]]
Benchmark = dict[str, list[float]]  # subject -> 1.0 or 0.0 of each question
TASK_FILES = Path(lm_eval.__file__).parent / "tasks"
HARNESS_VERSION = version("lm_eval")
LETTERS = ("A", "B", "C", "D")
PUBLIC = {  # layout -> its task files, and where a subject's questions and examples lie
    "cmmlu": ("cmmlu/cmmlu_*.yaml", "test/{}.csv", "dev/{}.csv"),
    "ceval": ("ceval/ceval-valid_*.yaml", "val/{}_val.csv", "dev/{}_dev.csv"),
}
JSONL_TASK: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def score(config: ChoiceConfig, num_shots: int, compare: Compare) -> tuple[Benchmark, int]:
    """Which questions were answered rightly, by subject, and how many pairs were too long for the model.

    Raises ValueError for a file that is missing or is not in its layout.
    """
    model = _Model(compare)
    tasks = {subject: _Task(_with_shots(task, num_shots), rows) for subject, task, rows in _subjects(config, num_shots)}
    metric = "acc_norm" if config.answer_form == "text" else "acc"
    found = evaluate(lm=model, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0)
    samples = found["samples"]
    answers = {
        subject: [float(one[metric]) for one in sorted(samples[subject], key=lambda one: int(one["doc_id"]))]
        for subject in tasks
    }
    return answers, model.num_cut


def scored_files(config: ChoiceConfig) -> list[str]:
    """The files whose questions are asked. Raises ValueError for one that is missing."""
    if config.layout == "jsonl":
        files = storage.list_files(config.uri)
    else:
        files = [_public_file(config, PUBLIC[config.layout][1], subject) for subject in _wanted(config)]
    if missing := [file for file in files if not storage.exists(file)] or ([] if files else [config.uri]):
        raise ValueError(f"{missing[0]}: no such file; give what is published, or the subjects that are there")
    return files


def describe(config: ChoiceConfig) -> str:
    """What is compared, for the report."""
    if config.answer_form == "text":
        return "the model's; log-likelihood of each choice's text per character"
    return "the model's; log-likelihood of the choices' letters"


class _Model(LM):  # type: ignore[misc]
    """The harness's view of a model: log-likelihoods only."""

    def __init__(self, compare: Compare) -> None:
        super().__init__()
        self._compare = compare
        self.num_cut = 0

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = self._compare([request.args for request in requests])
        self.num_cut += sum(one.is_cut for one in found)
        return [(one.logprob, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError("choice tasks compare likelihoods")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("choice tasks compare likelihoods")


class _Task(ConfigurableTask):  # type: ignore[misc]
    """A task of the harness whose rows are given instead of downloaded."""

    def __init__(self, config: Mapping[str, Any], rows: Mapping[str, list[Row]]) -> None:
        self._rows = rows
        super().__init__(config=dict(config))

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.dataset = {split: datasets.Dataset.from_list(rows) for split, rows in self._rows.items()}


def _with_shots(task: Mapping[str, Any], num_shots: int) -> dict[str, Any]:
    return {**task, "num_fewshot": num_shots}


def _subjects(config: ChoiceConfig, num_shots: int) -> Iterator[tuple[str, dict[str, Any], dict[str, list[Row]]]]:
    """(subject, its task as the harness describes it, rows by split)."""
    if config.layout == "jsonl":
        yield from _jsonl_subjects(config, num_shots)
        return
    _, questions, examples = PUBLIC[config.layout]
    for subject, task in _wanted(config).items():
        split = task.get("test_split") or task["validation_split"]
        rows = {split: _read_public(_public_file(config, questions, subject))[: config.max_questions]}
        rows[task["fewshot_split"]] = _read_public(_public_file(config, examples, subject))
        if num_shots > len(rows[task["fewshot_split"]]):
            raise ValueError(f"choices.{config.name}: {subject} has fewer than {num_shots} examples to show")
        yield subject, task, rows


def _wanted(config: ChoiceConfig) -> dict[str, dict[str, Any]]:
    """The harness's tasks of the layout by subject, or those of `subjects`."""
    tasks = {task["dataset_name"]: task for task in map(_task_file, sorted(TASK_FILES.glob(PUBLIC[config.layout][0])))}
    if unknown := set(config.subjects) - set(tasks):
        raise ValueError(f"choices.{config.name}.subjects: no {', '.join(sorted(unknown))}; {', '.join(tasks)}")
    return {name: task for name, task in tasks.items() if not config.subjects or name in config.subjects}


def _task_file(path: Path) -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    included = _task_file(path.parent / task.pop("include")) if "include" in task else {}
    return included | task


def _public_file(config: ChoiceConfig, pattern: str, subject: str) -> str:
    return f"{config.uri}/{pattern.format(subject)}"


def _read_public(uri: str) -> list[Row]:
    """Rows of a csv file with question, A to D and answer, under the names that its header has."""
    if not storage.exists(uri):
        raise ValueError(f"{uri}: no such file; give the folder as published, or the subjects that it has")
    with storage.open_file(uri) as file:
        rows = list(csv.DictReader(io.StringIO(file.read().decode("utf-8-sig"), newline="")))
    for number, row in enumerate(rows, start=1):
        known = {str(name).lower(): text for name, text in row.items()}
        if missing := [name for name in ("question", *map(str.lower, LETTERS)) if not known.get(name)]:
            raise ValueError(f"{uri}: row {number} has no {', '.join(missing)}")
        if known.get("answer") not in LETTERS:
            raise ValueError(f"{uri}: row {number} has the answer {known.get('answer')!r}, expected A, B, C or D")
    return [{name: text for name, text in row.items() if name} for row in rows]


def _jsonl_subjects(config: ChoiceConfig, num_shots: int) -> Iterator[tuple[str, dict[str, Any], dict[str, list[Row]]]]:
    by_subject = defaultdict(list)
    for row in _read_jsonl(config.uri, config):
        by_subject[row["subject"]].append(row)
    examples = _read_jsonl(config.examples_uri, config)[:num_shots] if num_shots else []
    if len(examples) < num_shots:
        raise ValueError(f"{config.examples_uri}: fewer than {num_shots} examples to show")
    task = JSONL_TASK | {"test_split": "test", "target_delimiter": "" if config.answer_form == "text" else " "}
    if num_shots:
        task |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    for subject, rows in by_subject.items():
        if not config.subjects or subject in config.subjects:
            splits = {"test": rows[: config.max_questions]} | ({"dev": examples} if examples else {})
            yield subject, task | {"task": f"{config.name} {subject}"}, splits


def _read_jsonl(uri: str, config: ChoiceConfig) -> list[Row]:
    """Rows with prompt, options and the right one's index. Raises ValueError naming file and line."""
    files = storage.list_files(uri)
    if not files:
        raise ValueError(f"choices.{config.name}: no file at {uri}")
    rows = []
    for file in files:
        with storage.open_file(file) as opened:
            lines = opened.read().decode("utf-8-sig").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_jsonl_row(json.loads(line), config.answer_form))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}: line {number} is no question with choices and an answer that is one of them ({error})"
                ) from None
    return rows


def _jsonl_row(given: Mapping[str, Any], answer_form: str) -> Row:
    question, choices, answer = str(given["question"]).strip(), list(map(str, given["choices"])), given["answer"]
    if len(choices) < 2 or not all(choices):
        raise ValueError("choices must be two texts or more")
    letters = list(string.ascii_uppercase[: len(choices)])
    if isinstance(answer, int):
        gold = range(len(choices)).index(answer)
    else:
        gold = letters.index(answer) if answer in letters else choices.index(str(answer))
    subject = str(given.get("subject", "all"))
    if answer_form == "text":
        return {"prompt": f"{question}\n答案：", "options": choices, "gold": gold, "subject": subject}
    lines = [f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True)]
    return {"prompt": "\n".join([question, *lines, "答案："]), "options": letters, "gold": gold, "subject": subject}
