"""Which token blocks a step trains on: a pure function of (seed, data step, tokens), whatever the number of workers.

Each epoch is a permutation of all rows; steps take the rows of the endless sequence of epochs in turn. Rows of an old
corpus are a second such sequence, spread evenly over each batch. Resuming needs the data step and nothing else. It
reads no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_CORPUS, _REPLAY = 0, 1


@dataclass(frozen=True)
class Plan:
    """What the order of the data depends on. `fingerprint` is that of the tokens, in hexadecimal.

    Rows of the corpus are 0..num_rows-1, those of the old corpus follow them.
    """

    seed: int
    fingerprint: str
    num_rows: int
    global_batch: int
    replay_rows: int = 0
    replay_share: float = 0.0

    @property
    def replay_batch(self) -> int:
        """Rows of the old corpus in each batch: at least one if it has a share, and never all."""
        wanted = max(1, round(self.replay_share * self.global_batch)) if self.replay_share else 0
        return min(wanted, self.global_batch - 1)

    @property
    def corpus_batch(self) -> int:
        """Rows of the corpus in each batch."""
        return self.global_batch - self.replay_batch


@lru_cache(maxsize=4)  # of both streams, the epochs on the two sides of a border
def _epoch_order(plan: Plan, stream: int, epoch: int) -> Rows:
    seed = np.random.SeedSequence([plan.seed, epoch, int(plan.fingerprint, 16), stream])
    num_rows = plan.replay_rows if stream == _REPLAY else plan.num_rows
    return np.random.Generator(np.random.Philox(seed)).permutation(num_rows)


def _take(plan: Plan, stream: int, first: int, count: int) -> Rows:
    """`count` rows of the endless stream from position `first` on; they may span borders of epochs."""
    num_rows = plan.replay_rows if stream == _REPLAY else plan.num_rows
    positions = np.arange(first, first + count)
    rows = np.empty(count, np.int64)
    for epoch in range(first // num_rows, (first + count - 1) // num_rows + 1):
        inside = positions // num_rows == epoch
        rows[inside] = _epoch_order(plan, stream, epoch)[positions[inside] % num_rows]
    return rows


def rows_of_step(plan: Plan, data_step: int) -> Rows:
    """Global row ids [global_batch] of the data step, in order."""
    due = np.arange(plan.global_batch + 1) * plan.replay_batch // plan.global_batch
    is_replay = np.diff(due) > 0
    rows = np.empty(plan.global_batch, np.int64)
    rows[~is_replay] = _take(plan, _CORPUS, data_step * plan.corpus_batch, plan.corpus_batch)
    if plan.replay_batch:
        replayed = _take(plan, _REPLAY, data_step * plan.replay_batch, plan.replay_batch)
        rows[is_replay] = plan.num_rows + replayed
    return rows


def rows_of_rank(rows: Rows, rank: int, world_size: int) -> Rows:
    """The contiguous share of a rank; the first ranks get one row more when it does not divide.

    The shares of all ranks in order are the rows.
    """
    share, rest = divmod(len(rows), world_size)
    first = rank * share + min(rank, rest)
    return rows[first : first + share + (rank < rest)]
