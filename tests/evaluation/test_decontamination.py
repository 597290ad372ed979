from app.artifacts import EVALUATION, Input, Manifest
from app.evaluation.decontamination import state_of, state_of_corpus, state_of_held_out


def corpus(known: dict[str, str], **config: object) -> Manifest:
    inputs = {f"{EVALUATION} {uri}": Input(uri=uri, digest=digest) for uri, digest in known.items()}
    figures = {"evaluation_items": 40, "evaluation_items_too_short": 3, "by_rule": {"too_short": 9, "contaminated": 2}}
    return Manifest(kind="corpus", uri="/run/corpus", config=config, inputs=inputs, figures=figures)


def files(**digests: str) -> dict[str, Input]:
    return {f"/data/{name}.csv": Input(uri=f"/data/{name}.csv", digest=digest) for name, digest in digests.items()}


def test_files_are_compared_by_name_and_stamp() -> None:
    made = corpus({"/data/law.csv": "10:1", "/data/art.csv": "20:1"})
    assert state_of(files(law="10:1", art="20:1"), made) == "decontaminated against"
    assert state_of(files(law="10:1"), made) == "decontaminated against"
    assert state_of(files(law="10:1", art="20:2"), made) == (
        "1 of 2 files were NOT decontaminated against; 1 changed since the corpus was made"
    )
    assert state_of(files(new="1:1"), made) == "1 of 1 files were NOT decontaminated against"
    assert state_of(files(law="10:1"), corpus({})) == "1 of 1 files were NOT decontaminated against"


def test_held_out_documents_are_as_apart_as_duplicates_were_removed() -> None:
    assert "exact and near duplicates" in state_of_held_out(corpus({}, dedup={"near": True}))
    assert "but not near ones" in state_of_held_out(corpus({}, dedup={"near": False}))


def test_what_the_corpus_was_searched_for_is_told() -> None:
    assert state_of_corpus(corpus({"/data/law.csv": "10:1", "/data/art.csv": "20:1"})) == (
        "40 items of 2 files were looked for, 3 more were too short; 2 documents held one and were left out"
    )
    assert state_of_corpus(corpus({})) == "no evaluation file was named when the corpus was made"
