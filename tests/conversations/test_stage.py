"""The stage and the look before it: kept and rejected add up, blocks hold what was rendered, reruns change nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.conversations import stage
from app.conversations.config import CheckConversationsConfig, PackConversationsConfig
from app.conversations.rendering import load_chat_tokenizer
from tests.conversations.tiny import preferences, records, write_jsonl, write_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.slow]
T = 96


@pytest.fixture(scope="module")
def root(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conversations")
    write_tokenizer(root / "tokenizer")
    long = {"instruction": "念", "output": "刘备" * 100}
    private = {"instruction": "电话", "output": "打13812345678。"}
    late = {"instruction": "刘备" * 100, "output": "好"}
    write_jsonl(root / "raw" / "a.jsonl", [*records()[:700], records()[0], long, private, late, {"text": "?"}])
    write_jsonl(root / "raw" / "b.jsonl", records()[:50])
    write_jsonl(root / "pairs.jsonl", preferences())
    return root


def pack(root: Path, **changes: Any) -> Any:
    given = {"storage_uri": str(root), "sources": ["raw/*.jsonl"], "block_tokens": T, "held_out_fraction": 0.1}
    return stage.run(PackConversationsConfig.model_validate({**given, **changes}))


def test_what_is_kept_and_what_is_rejected_are_all_records(root: Path) -> None:
    manifest = pack(root)
    figures = manifest.figures
    assert figures["records"] == 755
    assert figures["rejected"] == {"duplicate": 51, "unanswered": 1, "malformed": 1}
    train, held_out = figures["train"], figures["held_out"]
    assert train["documents"] + held_out["documents"] == 702
    assert 40 < held_out["documents"] < 100
    assert train["truncated"] + held_out["truncated"] == 1
    chat = load_chat_tokenizer(root / "tokenizer")
    labels = tokens = 0
    for split in ("train", "held_out"):
        rows = pq.read_table(root / "conversations" / split / "part-00000.parquet").to_pylist()
        assert len(rows) == figures[split]["blocks"]
        for row in rows:
            ids, mask, starts = (np.array(row[name]) for name in ("input_ids", "loss_mask", "document_starts"))
            assert len(ids) == len(mask) == T
            assert not mask[starts].any()
            assert not mask[ids == chat.pad_token_id].any()
            labels, tokens = labels + int(mask.sum()), tokens + int((ids != chat.pad_token_id).sum())
    assert labels == train["labels"] + held_out["labels"]
    assert tokens == train["tokens"] + held_out["tokens"]
    for split in (train, held_out):
        assert split["tokens"] + split["padding_tokens"] == split["blocks"] * T
    assert pack(root) == manifest  # skipped
    assert read_manifest(f"{root}/conversations", "tokens").digest == manifest.digest


def test_settings_say_what_is_dropped(root: Path) -> None:
    figures = pack(root, output_uri="dropped", too_long="drop", pii="drop", sources=["raw/a.jsonl"]).figures
    assert figures["rejected"] == {"duplicate": 1, "too_long": 2, "personal": 1, "malformed": 1}
    pack(root, output_uri="masked", pii="mask", sources=["raw/a.jsonl"], held_out_fraction=0.0)
    chat = load_chat_tokenizer(root / "tokenizer")
    rows = pq.read_table(root / "masked" / "train" / "part-00000.parquet").column("input_ids").to_pylist()
    text = chat.decode([token for row in rows for token in row])
    assert "打[MOBILE]。" in text
    assert "13812345678" not in text


def test_pairs_lie_side_by_side(root: Path) -> None:
    figures = pack(root, output_uri="pairs", sources=["pairs.jsonl"]).figures
    assert figures["kind"] == "pairs"
    chat = load_chat_tokenizer(root / "tokenizer")
    rows = pq.read_table(root / "pairs" / "train" / "part-00000.parquet").to_pylist()
    num_pairs = 0
    for row in rows:
        parts = np.split(np.array(row["input_ids"]), row["document_starts"][1:])
        for chosen, rejected in zip(parts[0::2], parts[1::2], strict=False):
            better, worse = (chat.decode(part).split("<|im_end|>")[-2] for part in (chosen, rejected))
            assert better.replace("回主公，", "") == worse
            num_pairs += 1
    assert num_pairs == figures["train"]["documents"]


def test_a_look_before_shows_lengths_doubts_and_renderings(root: Path) -> None:
    given = {"storage_uri": str(root), "sources": ["raw/a.jsonl"], "block_tokens": T, "examples": 1}
    said = stage.check(CheckConversationsConfig.model_validate(given))
    for line in (
        "records           705",
        "  kept            702",
        "  duplicate       1",
        "  malformed       1",
        "layouts           alpaca: 2, openai: 700",
        "truncated         1 are longer than block_tokens 96 allows",
        "personal data     mobile: 1",
        "<|im_start|>assistant\n⟦{",
        "⟧\n",
    ):
        assert line in said, said


def test_what_does_not_fit_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"sources: \S+/none.jsonl does not exist"):
        pack(root, sources=["none.jsonl"])
    write_jsonl(root / "bad.jsonl", [{"text": "x"}] * 3 + records()[:3])
    with pytest.raises(ValueError, match=r"3 of 6 records cannot be used \(max_malformed_percent 1\), most often"):
        pack(root, sources=["bad.jsonl"], output_uri="bad")
    with pytest.raises(ValueError, match="conversations and preference pairs; pack them one by one"):
        pack(root, sources=["raw/a.jsonl", "pairs.jsonl"], output_uri="bad")
    with pytest.raises(ValueError, match=r"\S+/raw/tokenizer.json does not exist"):
        pack(root, tokenizer_uri="raw", output_uri="bad")
