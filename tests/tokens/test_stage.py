"""Tokenizer and packing stages on the shared cluster."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.artifacts import Manifest, publish
from app.config import RunConfig
from app.records import CLEAN_DOCUMENT
from app.tokens import stage
from app.tokens.config import PackConfig, TokenizerConfig

pytestmark = pytest.mark.ray


def write_corpus(root: Path, num_files: int = 3) -> Manifest:
    texts = [f"话说天下大势，分久必合，合久必分，此乃第{number}回。" * (1 + number % 3) for number in range(90)]
    for split, chosen in (("train", texts[:80]), ("held_out", texts[80:])):
        for index in range(num_files):
            rows = [{"id": text[:8], "text": text, "source": "novel"} for text in chosen[index::num_files]]
            (root / "corpus" / split).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, CLEAN_DOCUMENT), root / "corpus" / split / f"{index}.parquet")
    return publish(Manifest.draft("corpus", str(root / "corpus"), RunConfig(), {}), {"raw": 90})


def test_tokens_in_are_tokens_out_plus_tail(cluster: object, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    made = stage.run_tokenizer(TokenizerConfig(storage_uri=str(tmp_path), vocab_size=400))
    assert 300 < made.figures["vocab_size"] <= 400
    config = PackConfig(storage_uri=str(tmp_path), block_tokens=16)
    figures = stage.run(config).figures
    train = figures["train"]
    blocks = [
        row
        for file in sorted((tmp_path / "tokens" / "train").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    assert all(len(row["input_ids"]) == 16 for row in blocks)
    assert len(blocks) == train["blocks"]
    assert train["tokens"] == 16 * train["blocks"] + train["tail_tokens"]
    assert train["documents"] == 80
    ends = sum(row["input_ids"].count(0) for row in blocks)
    assert 80 - train["tail_tokens"] <= ends <= 80
    assert stage.run(config).figures == figures

    folder = tmp_path / "model-of-others"
    shutil.copytree(tmp_path / "tokenizer", folder)
    (folder / "manifest.json").unlink()
    others = config.with_overrides({"tokenizer_uri": "model-of-others", "output_uri": "tokens-for-it"})
    assert stage.run(others).figures == figures


def test_a_corpus_that_fills_no_block_and_a_wrong_kind_are_refused(cluster: object, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    stage.run_tokenizer(TokenizerConfig(storage_uri=str(tmp_path), vocab_size=400))
    with pytest.raises(ValueError, match="fewer than block_tokens=100000 tokens"):
        stage.run(PackConfig(storage_uri=str(tmp_path), block_tokens=100_000))
    with pytest.raises(ValueError, match="is a corpus artifact, expected tokenizer"):
        stage.run(PackConfig(storage_uri=str(tmp_path), tokenizer_uri="corpus"))
