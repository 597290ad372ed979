"""Cleaning and exact deduplication: ours beside datatrove and Data-Juicer, same corpus, same rules, same processes.

Each competitor lives in its own environment, which the first run makes; README.md says what differs between them.
"""

from competitors import corpus
from competitors.side_by_side import OURS, Tool, arguments, chosen, compare

TOOLS = {
    OURS: Tool("", "zero_to_one.py", ("--task", "cleaning")),
    "Data-Juicer": Tool("data-juicer", "data_juicer_cleaning.py", aim=5),
    "datatrove, Gopher over words": Tool("datatrove", "datatrove_cleaning.py", ("--words",)),
    "datatrove": Tool("datatrove", "datatrove_cleaning.py", aim=3),
}


def main() -> None:
    given = arguments(__doc__, num_documents=100_000, runs=3)
    tools = chosen(TOOLS, given)
    documents = corpus.build(given.raw, given.folder / "corpus", given.documents, dirty_share=0.05)
    compare(tools, documents, given)


if __name__ == "__main__":
    main()
