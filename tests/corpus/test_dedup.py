"""Identity, exact and near-duplicates, clusters and repeated lines, against brute force."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.corpus import dedup
from app.corpus.dedup import Keys

CHARACTERS = (
    "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕"
    "调阳云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光果珍李柰"
)
NOVEL = "话说天下大势，分久必合，合久必分。"


def shingles(text: str, width: int) -> set[str]:
    folded = "".join(text.split()).lower().ljust(width, "\0")
    return {folded[start : start + width] for start in range(len(folded) - width + 1)}


def similarity(left: str, right: str, width: int = 5) -> float:
    mine, yours = shingles(left, width), shingles(right, width)
    return len(mine & yours) / len(mine | yours)


def planted(seed: int, num_originals: int, num_copies: int, length: int = 200) -> list[str]:
    """Random texts, each with copies in which some characters were replaced."""
    generator = random.Random(seed)
    texts = []
    for _ in range(num_originals):
        original = generator.choices(CHARACTERS, k=length)
        texts.append("".join(original))
        for _ in range(num_copies):
            copy = list(original)
            for place in generator.sample(range(length), generator.randint(0, 12)):
                copy[place] = generator.choice(CHARACTERS)
            texts.append("".join(copy))
    generator.shuffle(texts)
    return texts


def test_ids_splits_and_keys() -> None:
    ids = [dedup.document_id(f"{NOVEL}{number}") for number in range(10_000)]
    held_out = sum(dedup.split_of(identity, 0.1) == "held_out" for identity in ids)
    assert 900 < held_out < 1100
    assert dedup.split_of(ids[0], 0.0) == "train"
    keys = dedup.document_keys(3, np.array([0, 7, 1 << 39]))
    assert [dedup.locate(int(key)) for key in keys] == [(3, 0), (3, 7), (3, 1 << 39)]
    with pytest.raises(ValueError, match="too many for one corpus"):
        dedup.document_keys(1 << 24, np.array([0]))


def test_exact_duplicates_keep_the_first() -> None:
    ids = [dedup.document_id(text) for text in "abacab"]
    rows = dedup.identity_rows(ids, np.array([10, 11, 12, 13, 14, 9], np.uint64))
    assert sorted(map(tuple, dedup.exact_duplicates(rows).tolist())) == [(11, 9), (12, 10), (14, 10)]
    assert dedup.exact_duplicates(rows[:0]).shape == (0, 2)


@given(st.lists(st.text(max_size=30), max_size=8), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_shingle_hashes_are_those_of_each_text_alone(texts: list[str], width: int) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    flat, offsets = dedup.shingle_hashes(texts, width)
    assert len(offsets) == len(texts) + 1
    for text, (start, end) in zip(texts, itertools.pairwise(offsets), strict=True):
        alone, _ = dedup.shingle_hashes([text], width)
        assert flat[start:end].tolist() == alone.tolist()
        assert len(set(alone.tolist())) == len(shingles(text, width))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_a_pair_at_the_threshold_nearly_always(threshold: float) -> None:
    bands, rows = dedup.choose_bands(threshold)
    assert bands * rows <= dedup.NUM_PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_near_duplicates_of_planted_texts_equal_brute_force() -> None:
    texts = planted(1, 24, 4)
    truth = {
        (later, earlier)
        for earlier, later in itertools.combinations(range(len(texts)), 2)
        if similarity(texts[earlier], texts[later]) >= 0.8
    }
    assert len(truth) > 40
    bands = dedup.band_keys(texts, 5, 0.8)
    keys = np.arange(len(texts), dtype=np.uint64)
    rows = np.column_stack([bands.ravel(), np.repeat(keys, bands.shape[1])])
    flat, offsets = dedup.shingle_hashes(texts, 5)
    sets = [np.unique(flat[start:end]) for start, end in itertools.pairwise(offsets)]
    found = dedup.similar_pairs(dedup.candidate_pairs(rows), keys, sets, 0.8)
    assert {tuple(pair) for pair in found.tolist()} <= truth  # precision 1: each pair is verified
    assert len(found) >= 0.98 * len(truth)
    assert (dedup.band_keys(texts[7:9], 5, 0.8) == bands[7:9]).all()  # whatever the batch


def clusters_of(edges: Keys, num_partitions: int) -> dict[int, int]:
    """What the stage does with the parts, in one process."""

    def exchange(parts: list[Keys], column: int) -> list[Keys]:
        split = [dedup.split_rows(p, dedup.partition_of(p[:, column], num_partitions), num_partitions) for p in parts]
        return [np.concatenate([one[index] for one in split]) for index in range(num_partitions)]

    parts = exchange([edges], 0)
    before: list[list[list[int]]] = []
    while (now := [part.tolist() for part in parts]) != before:
        before = now
        parts = [dedup.large_star(part) for part in exchange([dedup.both_directions(p) for p in parts], 0)]
        parts = [dedup.small_star(part) for part in exchange(parts, 0)]
    return {child: root for part in parts for child, root in part.tolist()}


def union_find(edges: list[tuple[int, int]]) -> dict[int, int]:
    root = {node: node for edge in edges for node in edge}
    for _ in root:
        for left, right in edges:
            root[left] = root[right] = min(root[left], root[right])
    return {node: smallest for node, smallest in root.items() if node != smallest}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_clusters_are_connected_components_however_partitioned(pairs: list[tuple[int, int]]) -> None:
    edges = [(max(pair), min(pair)) for pair in pairs if pair[0] != pair[1]]
    rows = np.array(edges, np.uint64).reshape(-1, 2)
    expected = union_find(edges)
    assert clusters_of(rows, 1) == clusters_of(rows, 5) == expected


def test_a_chain_of_a_thousand_settles() -> None:
    order = np.random.default_rng(0).permutation(1000).astype(np.uint64)
    pairs = np.column_stack([np.maximum(order[1:], order[:-1]), np.minimum(order[1:], order[:-1])])
    assert clusters_of(pairs, 3) == dict.fromkeys(range(1, 1000), 0)


def test_lines_found_often_are_dropped() -> None:
    footer = "版权所有，未经许可不得转载本站内容"
    texts = [f"第{number}段正文，各不相同的内容在此\n{footer}\n短" for number in range(5)]
    hashes = np.concatenate([dedup.line_hashes(text, 10) for text in [*texts, footer]])
    boilerplate = dedup.frequent(hashes, 5)
    assert len(boilerplate) == 1
    assert dedup.drop_lines(texts[0], boilerplate, 10) == "第0段正文，各不相同的内容在此\n短"
    assert dedup.drop_lines(footer, boilerplate, 10) == footer
    assert len(dedup.frequent(hashes, 6)) == 0
