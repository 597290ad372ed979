"""Token blocks of an artifact by row index.

A split is held in memory as one array, 4 bytes a token, in each worker; it is read once at the start.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from app import storage

Blocks = npt.NDArray[np.int32]


def read_blocks(tokens_uri: str, split: str) -> Blocks:
    """All blocks of a split, [N, T], in the order of files and rows. Raises ValueError when there are none."""
    columns = []
    for uri in storage.list_files(f"{tokens_uri}/{split}", ".parquet"):
        with storage.open_file(uri) as file:
            column = pq.read_table(file, columns=["input_ids"]).column(0).combine_chunks()
        columns.append(column.flatten().to_numpy().reshape(len(column), -1))
    if not columns:
        raise ValueError(f"{tokens_uri}/{split}: no token blocks; pack more text")
    return np.concatenate(columns)
