"""datatrove: the five rules and exact deduplication. Runs in datatrove's environment: DOCUMENTS OUTPUT [--workers N].

FTFYFormatter, whitespace, our rules as LambdaFilters, then ExactDedup in its three steps with LocalPipelineExecutors.
Signatures are made in the pass that filters, which saves the extra reading that datatrove's example has.
`--words` takes its Gopher filters over spaCy + jieba words in place of the rules: what it offers for Chinese itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_rules as rules
import report
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import ExactDedupFilter, ExactDedupSignature, ExactFindDedups
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


class WhitespaceFormatter(BaseFormatter):
    """datatrove has none."""

    name = "whitespace"

    def format(self, text: str) -> str:
        return rules.tidy_whitespace(text)


def text_of(document: Document) -> str:
    return document.text


def has_good_length(document: Document) -> bool:
    return rules.has_good_length(document.text)


def is_chinese(document: Document) -> bool:
    return rules.is_chinese(document.text)


def has_few_symbols(document: Document) -> bool:
    return rules.has_few_symbols(document.text)


def is_not_repetitive(document: Document) -> bool:
    return rules.is_not_repetitive(document.text)


def filters(words: bool) -> list[Any]:
    if (
        words
    ):  # bounds fit for Chinese: words of 1.6 characters, punctuation marks count as words, no English stop words
        bounds = {"min_doc_words": 5, "min_avg_word_length": 1, "min_stop_words": 0, "max_non_alpha_words_ratio": 0.5}
        return [GopherQualityFilter(language="cmn", **bounds), GopherRepetitionFilter(language="cmn")]
    checks = (has_good_length, is_chinese, has_few_symbols, is_not_repetitive)
    return [LambdaFilter(check) for check in checks]


def run(documents: Path, output: Path, workers: int, words: bool) -> None:
    config = ExactDedupConfig(content_getter=text_of)
    clean, signatures, duplicates, kept = (str(output / name) for name in ("clean", "signatures", "duplicates", "kept"))
    stages = [
        (
            workers,
            [
                JsonlReader(str(documents), compression=None),
                FTFYFormatter(normalization="NFC"),
                WhitespaceFormatter(),
                *filters(words),
                JsonlWriter(clean, compression=None),
                ExactDedupSignature(signatures, config=config, finder_workers=workers),
            ],
        ),
        (workers, [ExactFindDedups(signatures, duplicates, config=config, lines_to_buffer=10_000)]),
        (
            workers,
            [
                JsonlReader(clean, compression=None),
                ExactDedupFilter(duplicates, config=config),
                JsonlWriter(kept, compression=None),
            ],
        ),
    ]
    for index, (tasks, pipeline) in enumerate(stages):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=str(output / f"logs-{index}")).run()


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--words", action="store_true", help="Gopher filters over segmented words")
    given = parser.parse_args()
    report.measure(
        lambda: run(given.documents, given.output, given.workers, given.words),
        given.documents,
        given.output,
        lambda: report.ids_in_jsonl(given.output / "kept"),
    )


if __name__ == "__main__":
    main()
