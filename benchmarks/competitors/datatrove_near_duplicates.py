"""datatrove: near-duplicates by its MinHash pipeline of four stages. Runs in its environment: DOCUMENTS OUTPUT.

The same shingles as ours: five characters, whitespace aside, handed to datatrove as one-character "words" through its
WordTokenizer interface, the cheapest tokenizer that is right for Chinese. `--words` takes its own setting for Chinese
(five words of spaCy + jieba, punctuation and digits simplified). datatrove does not verify its candidates.
"""

from __future__ import annotations

import argparse

import report
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

LINES_TO_BUFFER = 10_000  # its default of 5 is meant for very many files and slower here


class Characters(WordTokenizer):
    """Every character that is not whitespace is a word."""

    def word_tokenize(self, text: str) -> list[str]:
        return list("".join(text.split()))

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def run(given: argparse.Namespace) -> None:
    output, workers = given.output, given.workers
    untouched = TextNormConfig(False, False, False, False, False)
    norm_config = TextNormConfig() if given.words else untouched
    config = MinhashConfig(n_grams=5, num_buckets=given.bands, hashes_per_bucket=given.rows, norm_config=norm_config)
    language = "cmn" if given.words else Characters()
    signatures, buckets, removed, kept = (str(output / name) for name in ("signatures", "buckets", "removed", "kept"))
    read = [JsonlReader(str(given.documents), compression=None)]
    buffer = {"lines_to_buffer": LINES_TO_BUFFER}
    stages = [
        (workers, [*read, MinhashDedupSignature(signatures, config=config, language=language)]),
        (given.bands, [MinhashDedupBuckets(signatures, buckets, config=config, **buffer)]),
        (1, [MinhashDedupCluster(buckets, removed, config=config, **buffer)]),
        (workers, [*read, MinhashDedupFilter(removed, **buffer), JsonlWriter(kept, compression=None)]),
    ]
    for index, (tasks, pipeline) in enumerate(stages):
        logs = str(output / f"logs-{index}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(tasks, workers), logging_dir=logs).run()


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--words", action="store_true", help="shingles of segmented words, its own setting for Chinese")
    parser.add_argument("--bands", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    given = parser.parse_args()
    report.measure(
        lambda: run(given), given.documents, given.output, lambda: report.ids_in_jsonl(given.output / "kept")
    )


if __name__ == "__main__":
    main()
