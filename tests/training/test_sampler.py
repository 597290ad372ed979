"""Which rows a step takes: every row once an epoch, of both corpora, whatever the number of workers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training import sampler
from app.training.sampler import Plan, rows_of_rank, rows_of_step

PLAN = Plan(seed=1, fingerprint="c0ffee", num_rows=1000, global_batch=8)


@given(num_rows=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 2**70), fingerprint=st.integers(0))
def test_every_row_once_an_epoch(num_rows: int, batch: int, seed: int, fingerprint: int) -> None:
    plan, epochs = Plan(seed, f"{fingerprint:x}", num_rows, batch), 3
    steps = -(-epochs * num_rows // batch)
    rows = np.concatenate([rows_of_step(plan, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@given(
    num_rows=st.integers(1, 30),
    replay_rows=st.integers(1, 30),
    batch=st.integers(2, 20),
    share=st.floats(0.001, 0.999),
)
def test_each_corpus_is_taken_once_an_epoch(num_rows: int, replay_rows: int, batch: int, share: float) -> None:
    plan = Plan(0, "ab", num_rows, batch, replay_rows, share)
    rows = np.concatenate([rows_of_step(plan, step) for step in range(60)])
    replayed = rows >= num_rows
    assert replayed.reshape(60, batch).sum(1).tolist() == [plan.replay_batch] * 60
    for stream, ids in (
        (rows[~replayed], range(num_rows)),
        (rows[replayed], range(num_rows, num_rows + replay_rows)),
    ):
        for epoch in range(len(stream) // len(ids)):
            assert sorted(stream[epoch * len(ids) : (epoch + 1) * len(ids)]) == list(ids)


@pytest.mark.parametrize(
    ("share", "batch", "replayed"), [(0.0, 8, 0), (0.001, 8, 1), (0.25, 8, 2), (0.3, 8, 2), (0.99, 8, 7), (0.5, 1, 0)]
)
def test_rows_of_the_old_corpus_in_a_batch(share: float, batch: int, replayed: int) -> None:
    plan = Plan(0, "ab", 100, batch, 10, share)
    assert (plan.replay_batch, plan.corpus_batch) == (replayed, batch - replayed)


def test_replay_is_spread_over_the_ranks() -> None:
    plan = Plan(0, "ab", 100, 32, 10, 0.25)
    shares = [rows_of_rank(rows_of_step(plan, 5), rank, 8) for rank in range(8)]
    assert [int((share >= 100).sum()) for share in shares] == [1] * 8


def test_rows_are_a_function_of_the_plan_and_the_step() -> None:
    first = [rows_of_step(PLAN, step).tolist() for step in range(200)]
    sampler._epoch_order.cache_clear()
    assert [rows_of_step(PLAN, step).tolist() for step in reversed(range(200))] == first[::-1]
    for change in ({"seed": 2}, {"fingerprint": "c0ffef"}):
        assert rows_of_step(dataclasses.replace(PLAN, **change), 0).tolist() != first[0]
    assert first[0] == [878, 272, 421, 208, 432, 262, 915, 834]  # a change here breaks the resume of older runs
    with_replay = dataclasses.replace(PLAN, replay_rows=1000, replay_share=0.5)
    assert rows_of_step(with_replay, 0).tolist() == [878, 1832, 272, 1854, 421, 1168, 208, 1902]


def test_the_two_corpora_have_their_own_order() -> None:
    plan = Plan(0, "ab", 100, 20, 100, 0.5)
    rows = rows_of_step(plan, 0)
    assert (rows[rows >= 100] - 100).tolist() != rows[rows < 100].tolist()


@given(batch=st.integers(1, 40), world_size=st.integers(1, 40))
def test_the_shares_of_all_ranks_are_the_batch(batch: int, world_size: int) -> None:
    rows = np.arange(batch) * 3
    shares = [rows_of_rank(rows, rank, world_size) for rank in range(world_size)]
    assert [share.tolist() for share in shares] == [share.tolist() for share in np.array_split(rows, world_size)]
    assert np.concatenate(shares).tolist() == rows.tolist()
