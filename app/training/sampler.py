"""Which token blocks a step trains on: a pure function of (seed, step), whatever the number of workers.

Each epoch is a permutation of all rows; steps take the rows of the endless sequence of epochs in turn. Resuming needs
the step and nothing else.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> Rows:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def rows_of_step(seed: int, step: int, num_rows: int, global_batch: int) -> Rows:
    """Row indices [global_batch] of the step, in order; a batch may span the border of two epochs."""
    positions = step * global_batch + np.arange(global_batch)
    rows = np.empty(global_batch, np.int64)
    for epoch in range(positions[0] // num_rows, positions[-1] // num_rows + 1):
        inside = positions // num_rows == epoch
        rows[inside] = _epoch_order(seed, int(epoch), num_rows)[positions[inside] % num_rows]
    return rows


def rows_of_rank(rows: Rows, rank: int, world_size: int) -> Rows:
    """The contiguous share of a rank; the shares of all ranks in order are the rows."""
    share = len(rows) // world_size
    return rows[rank * share : (rank + 1) * share]
