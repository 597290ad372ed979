"""Micro-batches of all ranks are the step's rows, whatever their number; the thread ends and its errors are heard."""

import math
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from app.training.batches import Blocks
from app.training.feed import Feed, Share, StepData
from app.training.ledger import combine, digest_rows
from app.training.sampler import Plan, rows_of_step

T = 6
STARTS = [[], [0], [0, 1, 2], [3], [0, 5], [2, 3]]  # by row, in turn


def make_blocks(num_rows: int, first_token: int = 0) -> Blocks:
    """Row r holds the tokens first_token + T * r and so on."""
    starts = [STARTS[row % len(STARTS)] for row in range(num_rows)]
    flat = np.array([*(start for row in starts for start in row), T], np.int32)
    offsets = np.cumsum([0, *map(len, starts)], dtype=np.int64)
    return Blocks(np.arange(first_token, first_token + num_rows * T, dtype=np.int32).reshape(-1, T), flat, offsets)


def step_of_all_ranks(plan: Plan, sources: Sequence[Blocks], world_size: int, masking: bool) -> list[StepData]:
    """Data step 3, on each rank."""
    steps = math.ceil(math.ceil(plan.global_batch / world_size) / 2)
    made = []
    for rank in range(world_size):
        with Feed(sources, plan, Share(rank, world_size, 2, steps, masking), 3) as feed:
            made.append(feed.next())
        assert [tuple(batch["input_ids"].shape) for batch in made[-1].micro_batches] == [(2, T)] * steps
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("masking", [False, True])
def test_the_ranks_train_on_the_rows_of_the_step(world_size: int, masking: bool) -> None:
    plan = Plan(0, "ab", num_rows=40, global_batch=7, replay_rows=9, replay_share=0.3)
    ranks = step_of_all_ranks(plan, [make_blocks(40), make_blocks(9, 40 * T)], world_size, masking)
    rows = rows_of_step(plan, 3)
    assert combine(made.rows_digest for made in ranks) == digest_rows(rows)
    batches = [batch for made in ranks for batch in made.micro_batches]
    counted = [row for batch in batches for row in zip(batch["input_ids"], batch["labels"], strict=True)]
    with_labels = [(ids, labels) for ids, labels in counted if (labels != -100).any()]
    assert [int(ids[0]) // T for ids, _ in with_labels] == rows.tolist()  # so the blocks of both sources, in order
    for ids, labels in with_labels:
        assert ((labels == ids) | (labels == -100)).all()
    assert all(ids.tolist() == list(range(T)) for ids, labels in counted if (labels == -100).all())
    num_labels = sum(int((labels[1:] != -100).sum()) for _, labels in counted)
    assert [made.num_labels for made in ranks] == [num_labels] * world_size
    inner = sum(start > 0 for row in rows for start in STARTS[(row if row < 40 else row - 40) % 6])
    assert num_labels == 7 * (T - 1) - inner * masking


def test_positions_restart_and_no_label_crosses_a_border() -> None:
    plan = Plan(0, "ab", num_rows=6, global_batch=6)
    with Feed([make_blocks(6)], plan, Share(0, 1, 6, 1, True), 0) as feed:
        (batch,) = feed.next().micro_batches
    by_row = {int(ids[0]) // T: index for index, ids in enumerate(batch["input_ids"])}
    positions = [batch["position_ids"][by_row[row]].tolist() for row in range(6)]
    assert positions == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 0, 1, 2, 3],
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2, 3, 4, 0],
        [0, 1, 0, 0, 1, 2],
    ]
    labels = batch["labels"][[by_row[row] for row in range(6)]]
    assert ((labels == -100) == (np.array(positions) == 0)).all()
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
    with Feed([make_blocks(6)], plan, Share(0, 1, 6, 1, False), 0) as feed:
        (plain,) = feed.next().micro_batches
    assert set(plain) == {"input_ids", "labels"}
    assert (plain["labels"][:, 1:] == plain["input_ids"][:, 1:]).all()


def test_steps_follow_each_other_without_those_skipped() -> None:
    plan = Plan(0, "ab", num_rows=10, global_batch=2)
    with Feed([make_blocks(10)], plan, Share(0, 1, 2, 1, False), 2, [(0, 0), (4, 6), (7, 7)]) as feed:
        made = [feed.next() for _ in range(4)]
    assert [step.data_step for step in made] == [2, 3, 8, 9]
    for step in made:
        assert step.rows_digest == digest_rows(rows_of_step(plan, step.data_step))


def test_conversations_and_an_old_corpus_are_counted_each_by_its_labels() -> None:
    """Of conversations the marked tokens, of replayed text all that something precedes; on every rank the same."""
    mask = np.zeros((6, T), np.bool_)
    mask[:, 4] = True
    given = make_blocks(6)
    marked = Blocks(given.input_ids, np.array([*[0] * 6, T], np.int32), np.arange(7), mask)
    plan = Plan(0, "ab", num_rows=6, global_batch=4, replay_rows=6, replay_share=0.5)
    ranks = step_of_all_ranks(plan, [marked, make_blocks(6, 6 * T)], 2, masking=True)
    rows = rows_of_step(plan, 3)
    expected = sum(1 if row < 6 else T - 1 - sum(start > 0 for start in STARTS[row - 6]) for row in rows)
    assert [made.num_labels for made in ranks] == [expected] * 2
    batches = [batch for made in ranks for batch in made.micro_batches]
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == expected
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if int(ids[0]) < 6 * T and (labels != -100).any():
                assert (labels != -100).nonzero().tolist() == [[4]]


class BrokenDisk:
    """Token ids [4, T] that cannot be read."""

    shape = (4, T)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: object) -> object:
        raise OSError(5, "the disk is broken")


def test_an_error_of_the_thread_is_raised_at_every_call() -> None:
    sound = make_blocks(4)
    blocks = Blocks(cast(Any, BrokenDisk()), sound.starts, sound.offsets)
    with Feed([blocks], Plan(0, "ab", 4, 2), Share(0, 1, 2, 1, False), 0) as feed:
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is broken"):
                feed.next()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_thread_of_a_full_queue(taken: int) -> None:
    feed = Feed([make_blocks(4)], Plan(0, "ab", 4, 2), Share(0, 1, 2, 1, False), 0)
    for _ in range(taken):
        feed.next()
    while not feed._queue.full():
        time.sleep(0.001)
    feed.close()
    assert not feed._thread.is_alive()
    feed.close()
    with pytest.raises(AssertionError, match="the feed is closed"):
        feed.next()


def test_what_does_not_fit_is_refused() -> None:
    wide = Blocks(np.zeros((4, T + 1), np.int32), np.zeros(1, np.int32), np.zeros(5, np.int64))
    plan = Plan(0, "ab", 4, 2, replay_rows=4, replay_share=0.5)
    with pytest.raises(ValueError, match="their block_tokens differ"):
        Feed([make_blocks(4), wide], plan, Share(0, 1, 2, 1, False), 0)
    with pytest.raises(AssertionError, match="the plan is not of these blocks"):
        Feed([make_blocks(4), make_blocks(5)], plan, Share(0, 1, 2, 1, False), 0)
    with (
        Feed([make_blocks(4), make_blocks(4)], plan, Share(0, 1, 1, 1, False), 0) as feed,
        pytest.raises(AssertionError, match="accumulation_steps is too small"),
    ):
        feed.next()
