"""Token blocks of an artifact by row index, memory-mapped: no process holds more than the rows that it reads.

The first process of a node decodes the parquet files of a split once into plain arrays in a local folder, under a
lock and a temporary name; the others wait and map the same files. It deletes nothing: decoded blocks of other artifacts
stay in the folder until the user removes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from app import storage
from app.artifacts import Manifest, read_manifest
from app.training.config import TrainConfig
from app.training.sampler import Plan

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

PAIRS = "pairs"  # figure `kind` of tokens that are preferences
_MASK = "loss_mask"
_NAMES = ("input_ids.int32", "starts.int32", "offsets.int64")
_BATCH_ROWS = 256  # decoded at a time


@dataclass(frozen=True)
class Blocks:
    """input_ids [N, T]; the document starts of row r are starts[offsets[r] : offsets[r + 1]], ascending.

    The last of `starts` belongs to no row: an empty file has no memory map. Blocks of conversations have a loss_mask
    [N, T]: only its tokens are predicted, and none of them begins a document.
    """

    input_ids: Ids
    starts: Ids
    offsets: Offsets
    loss_mask: Mask | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def block_tokens(self) -> int:
        """T, the length of every block."""
        return int(self.input_ids.shape[1])

    def document_starts(self, row: int) -> Ids:
        """Offsets in the block where documents begin; what precedes the first continues an earlier document."""
        return self.starts[self.offsets[row] : self.offsets[row + 1]]

    def count_inner_starts(self, rows: npt.NDArray[np.int64]) -> int:
        """Documents that begin in these rows, but not at offset 0."""
        begins, ends = self.offsets[rows], self.offsets[rows + 1]
        at_zero = (begins < ends) & (self.starts[begins] == 0)
        return int((ends - begins - at_zero).sum())

    def count_labels(self, rows: npt.NDArray[np.int64], document_masking: bool) -> int:
        """Tokens of these rows that are predicted."""
        if self.loss_mask is not None:
            return int(self.loss_mask[rows].sum())
        inner = self.count_inner_starts(rows) if document_masking else 0
        return len(rows) * (self.block_tokens - 1) - inner

    def count_pairs(self, rows: npt.NDArray[np.int64]) -> int:
        """Preferences in these rows of two documents each; the padding behind them is half a pair."""
        return int(((self.offsets[rows + 1] - self.offsets[rows]) // 2).sum())


def open_blocks(tokens_uri: str, split: str, fingerprint: str, cache_dir: str) -> Blocks:
    """The blocks of a split, in the order of files and rows, read-only. Any number of processes may call it at once.

    `fingerprint` is the digest of the tokens. Raises ValueError when there are no blocks or cache_dir belongs to
    somebody else, and OSError when its disk is full.
    """
    _make_private(cache_dir)
    folder = Path(cache_dir) / f"{fingerprint[:16]}-{split}"
    if not folder.exists():
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _decode_atomic(f"{tokens_uri}/{split}", folder)
    ids_path, starts_path, offsets_path = (folder / name for name in _NAMES)
    offsets = np.memmap(offsets_path, np.int64, "r")
    input_ids = np.memmap(ids_path, np.int32, "r").reshape(len(offsets) - 1, -1)
    mask = np.memmap(folder / _MASK, np.bool_, "r").reshape(input_ids.shape) if (folder / _MASK).exists() else None
    return Blocks(input_ids, np.memmap(starts_path, np.int32, "r"), offsets, mask)


def open_plan(config: TrainConfig) -> Plan:
    """The order of a run's data, from the manifests of its tokens. Raises ValueError when they are not there.

    It depends on what was packed, not on where and when: a run repeated elsewhere takes the same rows in turn.
    """
    tokens = read_tokens(config)
    counts: list[Any] = [manifest.figures["train"] for manifest in tokens]
    packed = json.dumps([[manifest.files, manifest.figures] for manifest in tokens], sort_keys=True)
    return Plan(
        seed=config.seed,
        fingerprint=hashlib.sha256(packed.encode()).hexdigest(),
        num_rows=counts[0]["blocks"],
        global_batch=config.global_batch_sequences,
        replay_rows=counts[1]["blocks"] if len(counts) > 1 else 0,
        replay_share=config.replay.share,
    )


def open_train_blocks(config: TrainConfig) -> list[Blocks]:
    """The train split of the corpus and, if there is one, of the old corpus."""
    return [open_blocks(manifest.uri, "train", manifest.digest, config.cache_dir) for manifest in read_tokens(config)]


def read_tokens(config: TrainConfig) -> list[Manifest]:
    """The manifests of the corpus and, if there is one, of the old corpus."""
    uris = [config.tokens_uri, *([config.replay.tokens_uri] if config.replay.tokens_uri else [])]
    return [read_manifest(config.resolve(uri), "tokens") for uri in uris]


def _make_private(folder: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for status in (os.lstat(folder), os.stat(folder)):  # of a link, and of what it points to
        if status.st_uid != os.getuid():
            raise ValueError(f"cache_dir {folder}: belongs to user {status.st_uid}, not to us; choose another folder")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file alone; the kernel releases it when its holder dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _decode_atomic(split_uri: str, folder: Path) -> None:
    partial = folder.with_suffix(storage.PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)  # of a holder that was killed
    partial.mkdir()
    try:
        with ExitStack() as stack:
            names = [*_NAMES, *([_MASK] if _has_mask(split_uri) else [])]
            files = [stack.enter_context(open(partial / name, "wb")) for name in names]
            num_blocks = _decode(split_uri, files)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("%s: decoded %d blocks into %s", split_uri, num_blocks, folder)


def _decode(split_uri: str, files: Sequence[IO[bytes]]) -> int:
    """Write all rows; their number."""
    ids_file, starts_file, offsets_file, *mask_files = files
    block_tokens = num_blocks = end = 0
    offsets_file.write(np.zeros(1, np.int64).tobytes())
    for batch in _batches(split_uri, ["input_ids", "document_starts", *([_MASK] if mask_files else [])]):
        ids, starts = (batch.column(name) for name in ("input_ids", "document_starts"))
        lengths = ids.value_lengths().to_numpy()
        block_tokens = block_tokens or int(lengths[0])
        if (lengths != block_tokens).any():
            raise ValueError(f"{split_uri}: blocks of different lengths; run pack_tokens again")
        offsets = end + np.cumsum(starts.value_lengths().to_numpy(), dtype=np.int64)
        ids_file.write(ids.flatten().to_numpy().tobytes())
        starts_file.write(starts.flatten().to_numpy().tobytes())
        offsets_file.write(offsets.tobytes())
        for mask_file in mask_files:
            mask_file.write(batch.column(_MASK).flatten().to_numpy(zero_copy_only=False).tobytes())
        num_blocks, end = num_blocks + len(lengths), int(offsets[-1])
    if not num_blocks:
        raise ValueError(f"{split_uri}: no token blocks; pack more text")
    starts_file.write(np.full(1, block_tokens, np.int32).tobytes())
    return num_blocks


def _has_mask(split_uri: str) -> bool:
    for uri in storage.list_files(split_uri, ".parquet"):
        with storage.open_file(uri) as file:
            return _MASK in pq.read_schema(file).names
    return False


def _batches(split_uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for uri in storage.list_files(split_uri, ".parquet"):
        with storage.open_file(uri) as file, pq.ParquetFile(file) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns):
                if batch.num_rows:
                    yield batch
