"""Near-duplicates: ours beside datatrove's MinHash pipeline and Data-Juicer's ray_bts_minhash_deduplicator, end to end.

First what each finds on a planted set, against brute-force Jaccard similarity; then the time on a larger corpus. Same
shingles, permutations, bands and processes; README.md says what differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from competitors import corpus
from competitors.quality import clusters, quality
from competitors.side_by_side import OURS, Tool, arguments, chosen, compare, run

MIN_SIMILARITY = 0.8
PLANTED_DOCUMENTS = 5000
TOOLS = {
    OURS: Tool("", "zero_to_one.py", ("--task", "near_duplicates")),
    "datatrove, five words": Tool("datatrove", "datatrove_near_duplicates.py", ("--words", "--bands", "14")),
    "datatrove": Tool("datatrove", "datatrove_near_duplicates.py", aim=3),
    "Data-Juicer": Tool("data-juicer", "data_juicer_near_duplicates.py", aim=8),
}


def print_quality(tools: Mapping[str, Tool], given: argparse.Namespace) -> None:
    """Recall and precision of every tool on the planted set."""
    documents = corpus.build(given.raw, given.folder / "corpus", PLANTED_DOCUMENTS)
    cluster_of = clusters(documents, MIN_SIMILARITY)
    wanted = len(cluster_of) - len(set(cluster_of.values()))
    print(f"{PLANTED_DOCUMENTS:,} planted documents; brute force at {MIN_SIMILARITY} removes {wanted:,}")
    print(f"{'':34}   removed    recall   precision")
    for name, tool in tools.items():
        answer = run(name, tool, documents, given)
        found = quality(cluster_of, Path(answer["kept_ids"]).read_text().split())
        removed = answer["documents_in"] - answer["documents_out"]
        print(f"{name:34} {removed:9,} {found.recall:9.4f} {found.precision:11.4f}", flush=True)


def main() -> None:
    given = arguments(__doc__, num_documents=100_000, runs=3)
    tools = chosen(TOOLS, given)
    print_quality(tools, given)
    compare(tools, corpus.build(given.raw, given.folder / "corpus", given.documents), given)


if __name__ == "__main__":
    main()
