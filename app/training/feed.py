"""The batches of a rank as torch tensors, made by a background thread so that a step need not wait for them.

Every rank gets as many micro-batches of the same shape; where its share of the batch is smaller, it is filled up with
rows that have no labels. The rows are the sampler's; it decides nothing about the order and moves nothing to a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from app.training.batches import Blocks
from app.training.ledger import Window, digest_rows
from app.training.sampler import Plan, Rows, rows_of_rank, rows_of_step

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int64]

IGNORED = -100  # the label of what is not predicted
DEPTH = 2  # steps made ahead


@dataclass(frozen=True)
class Share:
    """A rank's part of each step. With `pairs`, the blocks hold preferences, and these are what is counted."""

    rank: int
    world_size: int
    micro_batch: int
    accumulation_steps: int
    document_masking: bool
    pairs: bool = False


@dataclass
class StepData:
    """A step of one rank. `rows_digest` is that of its own rows, `num_labels` counts over the whole global batch:
    predicted tokens, or pairs.

    A micro-batch has input_ids and labels, and with document masking position_ids, all int64 [B, T].
    """

    data_step: int
    micro_batches: list[dict[str, torch.Tensor]]
    rows_digest: int
    num_labels: int


class Feed:
    """The steps from `first_data_step` on, without those in `skipped` (ascending). Close it, or use it in a `with`.

    `sources` are the blocks of the corpus, then those of the old corpus, if any. Raises ValueError when the lengths of
    their blocks differ.
    """

    def __init__(
        self, sources: Sequence[Blocks], plan: Plan, share: Share, first_data_step: int, skipped: Sequence[Window] = ()
    ) -> None:
        if len({blocks.block_tokens for blocks in sources}) != 1:
            raise ValueError("tokens_uri and replay.tokens_uri: their block_tokens differ; pack one of them again")
        sizes = [plan.num_rows, plan.replay_rows] if plan.replay_rows else [plan.num_rows]
        assert [len(blocks) for blocks in sources] == sizes, "the plan is not of these blocks"
        self._sources, self._plan, self._share, self._skipped = sources, plan, share, skipped
        self._queue: Queue[StepData | Exception] = Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first_data_step,), name="feed", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> StepData:
        """The next step; an error of the thread is raised here, now and at every later call."""
        assert not self._closed.is_set(), "the feed is closed"
        made = self._queue.get()
        if isinstance(made, Exception):
            self._queue.put(made)  # the thread has ended: nothing else comes
            raise made
        return made

    def close(self) -> None:
        """End the thread; what it has made is dropped."""
        self._closed.set()
        while not self._queue.empty():  # the thread puts one more at most, and there is room for it
            self._queue.get()
        self._thread.join()

    def _fill(self, data_step: int) -> None:
        try:
            while not self._closed.is_set():
                for first, last in self._skipped:
                    if first <= data_step <= last:
                        data_step = last + 1
                self._queue.put(self._make(data_step))
                data_step += 1
        except Exception as error:
            self._queue.put(error)

    def _make(self, data_step: int) -> StepData:
        import torch

        share = self._share
        rows = rows_of_step(self._plan, data_step)
        mine = rows_of_rank(rows, share.rank, share.world_size)
        made = [
            {name: torch.from_numpy(array) for name, array in self._micro_batch(part).items()}
            for part in _cut(mine, share.micro_batch, share.accumulation_steps)
        ]
        return StepData(data_step, made, digest_rows(mine), self._count_labels(rows))

    def _micro_batch(self, rows: Rows) -> dict[str, Tokens]:
        """The model's inputs; a micro-batch of fewer rows is filled up with row 0, which has no labels."""
        given = np.zeros(self._share.micro_batch, np.int64)
        given[: len(rows)] = rows
        found = [self._find(row) for row in given.tolist()]
        return batch_of(found, len(rows), self._share.document_masking)

    def _count_labels(self, rows: Rows) -> int:
        """Labels of the rows, or pairs, without reading their tokens."""
        replayed = rows >= self._plan.num_rows
        parts = rows[~replayed], rows[replayed] - self._plan.num_rows
        if self._share.pairs:
            return sum(blocks.count_pairs(part) for blocks, part in zip(self._sources, parts, strict=False))
        masking = self._share.document_masking
        return sum(blocks.count_labels(part, masking) for blocks, part in zip(self._sources, parts, strict=False))

    def _find(self, row: int) -> tuple[Blocks, int]:
        replayed = row - self._plan.num_rows
        return (self._sources[0], row) if replayed < 0 else (self._sources[1], replayed)


def batch_of(found: Sequence[tuple[Blocks, int]], num_rows: int, document_masking: bool = True) -> dict[str, Tokens]:
    """The model's inputs from blocks and rows; those after the first num_rows have no labels."""
    input_ids = np.stack([blocks.input_ids[row] for blocks, row in found]).astype(np.int64)  # [B, T]
    labels = input_ids.copy()
    labels[:, 0] = IGNORED  # nothing precedes it; also when the rows are joined to one
    labels[num_rows:] = IGNORED
    for index, (blocks, row) in enumerate(found):
        if blocks.loss_mask is not None:
            labels[index, ~blocks.loss_mask[row]] = IGNORED
    if not document_masking:
        return {"input_ids": input_ids, "labels": labels}
    for index, (blocks, row) in enumerate(found):
        labels[index, blocks.document_starts(row)] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions_of(found, input_ids.shape[1])}


def positions_of(rows: Sequence[tuple[Blocks, int]], block_tokens: int) -> Tokens:
    """[B, T], the position of each token in its document: what tells attention where documents begin."""
    begins = np.zeros((len(rows), block_tokens), np.int64)
    for index, (blocks, row) in enumerate(rows):
        starts = blocks.document_starts(row)
        begins[index, starts] = starts
    positions: Tokens = np.arange(block_tokens) - np.maximum.accumulate(begins, axis=1)
    return positions


def _cut(rows: Rows, micro_batch: int, accumulation_steps: int) -> list[Rows]:
    assert len(rows) <= micro_batch * accumulation_steps, "accumulation_steps is too small for this share"
    return [rows[index * micro_batch : (index + 1) * micro_batch] for index in range(accumulation_steps)]
