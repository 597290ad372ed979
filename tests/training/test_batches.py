"""Blocks are decoded once on a node, whole or not at all, and mapped by every process."""

import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.records import TOKEN_BLOCK
from app.training.batches import Blocks, open_blocks, open_plan
from app.training.config import TrainConfig
from tests.training import tiny

FINGERPRINT = "0123456789abcdef" * 4
CACHED = "0123456789abcdef-train"
BLOCK_TOKENS = 8
FILES: list[list[list[int]]] = [[[0, 3], [], [7]], [], [[1]], [[], [0, 1, 2]]]  # the document starts of all rows
STARTS = [starts for file in FILES for starts in file]


def write_tokens(root: Path, files: list[list[list[int]]] = FILES) -> str:
    """A tokens artifact whose row r holds the tokens 8r..8r+7."""
    first = 0
    (root / "tokens" / "train").mkdir(parents=True)
    for index, starts in enumerate(files):
        ids = np.arange(first, first + len(starts) * BLOCK_TOKENS).reshape(-1, BLOCK_TOKENS)
        first += ids.size
        table = pa.Table.from_pydict({"input_ids": list(ids), "document_starts": starts}, TOKEN_BLOCK)
        pq.write_table(table, root / "tokens" / "train" / f"part-{index:05d}.parquet")
    return str(root / "tokens")


def test_the_same_tokens_come_in_the_same_order_wherever_they_lie(tmp_path: Path) -> None:
    """Their manifests differ, by time and place."""
    plans = []
    for name, hour in (("here", "01"), ("there", "02")):
        tiny.write_inputs(tmp_path / name)
        manifest = tmp_path / name / "tokens" / "manifest.json"
        manifest.write_text(re.sub(r"T\d\d:", f"T{hour}:", manifest.read_text()))
        plans.append(open_plan(TrainConfig.model_validate(tiny.config_of(tmp_path / name, tmp_path))))
    assert plans[0] == plans[1]
    assert '"created_at": "20' in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(f'"bytes": {tiny.HELD_OUT_BYTES}', '"bytes": 1'))
    other = open_plan(TrainConfig.model_validate(tiny.config_of(tmp_path / "there", tmp_path)))
    assert other.fingerprint != plans[1].fingerprint


def assert_whole(blocks: Blocks) -> None:
    assert (len(blocks), blocks.block_tokens) == (6, BLOCK_TOKENS)
    assert blocks.input_ids.ravel().tolist() == list(range(6 * BLOCK_TOKENS))
    assert [blocks.document_starts(row).tolist() for row in range(6)] == STARTS


def test_rows_in_the_order_of_files(tmp_path: Path) -> None:
    blocks = open_blocks(write_tokens(tmp_path), "train", FINGERPRINT, str(tmp_path / "cache"))
    assert_whole(blocks)
    assert blocks.input_ids.dtype == blocks.document_starts(0).dtype == np.int32
    assert not blocks.input_ids.flags.writeable
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_many_rows_of_a_file(tmp_path: Path) -> None:
    """More than are decoded at a time, in several row groups."""
    starts = [[row % BLOCK_TOKENS] * (row % 3 > 0) for row in range(1000)]
    uri = write_tokens(tmp_path, [starts])
    file = Path(uri) / "train" / "part-00000.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=300)
    blocks = open_blocks(uri, "train", FINGERPRINT, str(tmp_path / "cache"))
    assert np.array_equal(blocks.input_ids.ravel(), np.arange(1000 * BLOCK_TOKENS))
    assert [blocks.document_starts(row).tolist() for row in range(1000)] == starts


def test_documents_that_begin_inside_a_block(tmp_path: Path) -> None:
    blocks = open_blocks(write_tokens(tmp_path), "train", FINGERPRINT, str(tmp_path / "cache"))
    rows = np.array([5, 0, 0, 1, 2, 5])
    assert blocks.count_inner_starts(rows) == sum(start > 0 for row in rows for start in STARTS[row])
    no_starts = open_blocks(write_tokens(tmp_path / "b", [[[], []]]), "train", "b" * 64, str(tmp_path / "cache"))
    assert no_starts.count_inner_starts(np.array([1, 0, 1])) == 0


def test_decoded_once_by_all_that_ask_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="app")
    uri, cache = write_tokens(tmp_path), str(tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:  # each opens the lock file anew, as processes do
        opened = list(pool.map(lambda _: open_blocks(uri, "train", FINGERPRINT, cache), range(8)))
    for blocks in opened:
        assert_whole(blocks)
    assert [record.message for record in caplog.records] == [f"{uri}/train: decoded 6 blocks into {cache}/{CACHED}"]
    (tmp_path / "tokens" / "train" / "part-00000.parquet").unlink()
    assert_whole(open_blocks(uri, "train", FINGERPRINT, cache))


def test_a_killed_holder_leaves_no_lock_and_no_half(tmp_path: Path) -> None:
    uri, cache = write_tokens(tmp_path), tmp_path / "cache"
    partial = cache / f"{CACHED}.partial"
    partial.mkdir(parents=True)
    (partial / "input_ids.int32").write_bytes(b"half")
    (partial / "other").write_bytes(b"half")
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nprint(flush=True)\ninput()"
    )
    command = [sys.executable, "-c", code, f"{cache}/{CACHED}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(open_blocks, uri, "train", FINGERPRINT, str(cache))
            assert not waiting.done()
            holder.kill()
            assert_whole(waiting.result(timeout=60))
    assert sorted(os.listdir(cache)) == [CACHED, f"{CACHED}.lock"]
    assert len(os.listdir(cache / CACHED)) == 3


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond: as on a full disk, a write fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    uri, cache = write_tokens(tmp_path), tmp_path / "cache"
    with largest_file(100), pytest.raises(OSError, match="File too large") as caught:
        open_blocks(uri, "train", FINGERPRINT, str(cache))
    assert caught.value.errno
    assert os.listdir(cache) == [f"{CACHED}.lock"]
    assert_whole(open_blocks(uri, "train", FINGERPRINT, str(cache)))


@pytest.mark.parametrize("files", [[], [[]]])
def test_no_blocks(tmp_path: Path, files: list[list[list[int]]]) -> None:
    uri = write_tokens(tmp_path, files)
    with pytest.raises(ValueError, match=f"{uri}/train: no token blocks; pack more text"):
        open_blocks(uri, "train", FINGERPRINT, str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == [f"{CACHED}.lock"]


def test_blocks_of_different_lengths(tmp_path: Path) -> None:
    uri = write_tokens(tmp_path)
    odd = pa.Table.from_pydict({"input_ids": [[1] * 9], "document_starts": [[0]]}, TOKEN_BLOCK)
    pq.write_table(odd, f"{uri}/train/part-9.parquet")
    with pytest.raises(ValueError, match="blocks of different lengths"):
        open_blocks(uri, "train", FINGERPRINT, str(tmp_path / "cache"))


def test_other_tokens_and_splits_have_their_own_files(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    assert_whole(open_blocks(write_tokens(tmp_path / "a"), "train", FINGERPRINT, cache))
    other = write_tokens(tmp_path / "b", [[[0]]])
    assert len(open_blocks(other, "train", "f" * 64, cache)) == 1
    with pytest.raises(ValueError, match="held_out: no token blocks"):
        open_blocks(other, "held_out", "f" * 64, cache)


def test_blocks_on_remote_storage(tmp_path: Path) -> None:
    local = write_tokens(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(local, "/test_batches/tokens", recursive=True)
    try:
        blocks = open_blocks("memory://test_batches/tokens", "train", FINGERPRINT, str(tmp_path / "cache"))
    finally:
        memory.rm("/test_batches", recursive=True)
    assert_whole(blocks)


@pytest.mark.skipif(os.getuid() == 0, reason="root owns /")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_dir /: belongs to user 0, not to us; choose another folder"):
        open_blocks(write_tokens(tmp_path), "train", FINGERPRINT, "/")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
def test_a_folder_given_to_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, -1)
    with pytest.raises(ValueError, match="cache: belongs to user 12345, not to us; choose another folder"):
        open_blocks(write_tokens(tmp_path), "train", FINGERPRINT, str(tmp_path / "cache"))
