"""The walk from a quantized model to its raw files, and the card that is made of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.artifacts import Input, Manifest, publish
from app.config import RunConfig
from app.pipeline import stage
from app.pipeline.config import ShowLineageConfig
from app.pipeline.lineage import ancestors, tree


def made(root: Path, kind: Any, name: str, figures: dict[str, Any], **inputs: Manifest | Input) -> Manifest:
    (root / name).mkdir()
    given = {key: one.as_input() if isinstance(one, Manifest) else one for key, one in inputs.items()}
    return publish(Manifest.draft(kind, str(root / name), RunConfig(), given), figures)


@pytest.fixture(name="quantized")
def quantized_fixture(tmp_path: Path) -> Manifest:
    raw = Input(uri="/somewhere/raw.jsonl", digest="12-34")
    figures = {"raw": 10, "clean": 7, "by_rule": {"too_short": 2, "not|zh": 1}}
    corpus = made(tmp_path, "corpus", "corpus", figures, raw=raw)
    tokenizer = made(tmp_path, "tokenizer", "tokenizer", {"vocab_size": 300}, corpus=corpus)
    tokens = made(tmp_path, "tokens", "tokens", {}, corpus=corpus, tokenizer=tokenizer)
    model = made(tmp_path, "model", "model", {"train_loss": 2.5}, tokens=tokens, tokenizer=tokenizer)
    made(tmp_path, "report", "report", {"bits_per_byte": 1.25}, model=model, corpus=corpus)
    figures = {"gate": "passed", "loss_percent": 0.4}
    return made(tmp_path, "model", "quantized", figures, model=model, corpus=corpus)


def test_the_tree_goes_down_to_the_raw_file_and_the_rules(quantized: Manifest) -> None:
    lines = tree(quantized).splitlines()
    assert lines[0].startswith(f"model: {quantized.uri}  {quantized.digest[:12]}  model, ")
    assert "gate passed" in lines[1]
    assert any(line.strip().startswith("from: /somewhere/raw.jsonl  12-34") for line in lines)
    assert any('"too_short": 2' in line for line in lines)
    assert {"corpus", "tokenizer", "tokens", "source model"} <= set(ancestors(quantized))


def test_what_was_made_anew_is_told_by_its_digest_alone(quantized: Manifest, tmp_path: Path) -> None:
    (tmp_path / "model" / "manifest.json").unlink()
    lines = tree(quantized).splitlines()
    assert f"    from: {tmp_path}/model  {quantized.inputs['model'].digest[:12]}" in lines
    assert "source model" not in ancestors(quantized)


def test_the_card_has_the_figures_of_every_stage(quantized: Manifest, tmp_path: Path) -> None:
    config = ShowLineageConfig(storage_uri=str(tmp_path), card=True)
    assert stage.show(config) == tree(quantized)
    card = (tmp_path / "quantized" / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    for line in (
        "7 of 10 documents after cleaning.",
        "| too_short | 2 |",
        "| not\\|zh | 1 |",
        "| vocab_size | 300 |",
        "| train_loss | 2.5 |",
        "| bits_per_byte | 1.25 |",
        "Of the model before quantization.",
        "Gate: passed.",
        "| loss_percent | 0.4 |",
    ):
        assert line in body.splitlines()
    assert stage.show(config)  # the card harms no later reader


def test_only_a_model_has_a_card(quantized: Manifest, tmp_path: Path) -> None:
    config = ShowLineageConfig(storage_uri=str(tmp_path), artifact_uri="corpus", kind="corpus", card=True)
    with pytest.raises(ValueError, match="only a model has a card"):
        stage.show(config)
