"""The pipeline: every stage in order in one job, and the table that sums it up.

Complete stages are skipped by the stages themselves, so a pipeline that failed goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from app import cluster, storage
from app.artifacts import MANIFEST_NAME, Manifest, read_manifest
from app.config import RunConfig
from app.page import body_of
from app.pipeline.config import PipelineConfig, ShowLineageConfig
from app.pipeline.lineage import model_card, tree
from app.pipeline.report import Made, Row, render
from app.training.config import TrainConfig

logger = logging.getLogger(__name__)

Figures = dict[str, Any]
REPORTS = ("evaluate_model", "evaluate_quantized", "check_parity")  # for the model card


def run(config: PipelineConfig) -> str:
    """Run all stages; the summary table, also written to summary.txt in the storage beside report.html.

    A run that fails leaves report.html as well, with what was made and what went wrong.
    """
    cluster.connect()
    rows: list[Row] = []
    made: dict[str, Made] = {}
    error = ""
    try:
        for name, section in config.sections().items():
            logger.info("%s …", name)
            work, describe = _stage(name)
            started_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
            manifest = work(section)
            if name != "deploy_model":  # it makes no artifact, and tells the model that it serves
                made[name] = Made(manifest, _page(section, manifest))
            skipped = name in made and manifest.created_at < started_at
            rows.append(Row(name, time.monotonic() - began, skipped, *describe(manifest.figures)))
    except Exception as problem:
        error = f"{name}: {problem}"
        raise
    finally:
        storage.write_atomic(config.resolve("report.html"), render(rows, made, error).encode())
    reports = [made[name].manifest for name in REPORTS if name in made]
    _write_card(made["quantize_model"].manifest, reports)
    table = format_table(rows)
    storage.write_atomic(config.resolve("summary.txt"), table.encode())
    return table


def show(config: ShowLineageConfig) -> str:
    """The lineage of an artifact, and its model card if wished. Raises ValueError when it is not complete."""
    manifest = read_manifest(config.resolve(config.artifact_uri), config.kind)
    if config.card:
        if manifest.kind != "model":
            raise ValueError(f"card: {manifest.uri} is a {manifest.kind}; only a model has a card")
        uris = [uri for uri in map(config.resolve, config.report_uris) if storage.exists(f"{uri}/{MANIFEST_NAME}")]
        _write_card(manifest, [read_manifest(uri, "report") for uri in uris])
    return tree(manifest)


def _write_card(model: Manifest, reports: list[Manifest]) -> None:
    storage.write_atomic(f"{model.uri}/README.md", model_card(model, reports).encode())
    logger.info("model card: %s/README.md", model.uri)


def _page(section: RunConfig, manifest: Manifest) -> str:
    """What a stage's own page holds; "" when it has none."""
    folder = section.resolve(section.checkpoints_uri) if isinstance(section, TrainConfig) else manifest.uri
    uri = f"{folder}/report.html"
    if not storage.exists(uri):
        return ""
    with storage.open_file(uri) as file:
        return body_of(file.read().decode())


def format_table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("stage", "seconds", "in → out", "key figure")]
    for row in rows:
        seconds = "skipped" if row.skipped else f"{row.seconds:.1f}"
        lines.append((row.stage, seconds, row.flow, row.key_figure))
    lines.append(("total", f"{sum(row.seconds for row in rows):.1f}", "", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in lines]
    rule = "─" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1], ""])


def _stage(name: str) -> tuple[Callable[[Any], Manifest], Callable[[Figures], tuple[str, str]]]:
    """A stage's run function and how to tell (in → out, key figure) from its figures; imported when it is its turn."""
    if name == "prepare_corpus":
        from app.corpus import stage as corpus

        return corpus.run, lambda f: (f"{f['raw']:,} → {f['clean']:,} documents", f"{f['rejected']:,} rejected")
    if name == "train_tokenizer":
        from app.tokens import stage as tokens

        return tokens.run_tokenizer, lambda f: (
            f"text → {f['vocab_size']:,} tokens",
            f"{f.get('held_out_bytes_per_token', 0):.2f} bytes per token",
        )
    if name == "pack_tokens":
        from app.tokens import stage as tokens

        return tokens.run, lambda f: (
            f"{f['train']['documents']:,} documents → {f['train']['blocks']:,} blocks",
            f"{f['train']['tokens']:,} tokens",
        )
    if name == "train_model":
        from app.training import stage as training

        return training.run, lambda f: (
            f"{f['tokens']:,} tokens → {f['parameters'] / 1e6:.1f} M parameters",
            f"loss {f['train_loss']:.2f}, {f['tokens_per_second']:,} tokens/s",
        )
    if name in ("evaluate_model", "evaluate_quantized"):
        from app.evaluation import stage as evaluation

        return evaluation.run, lambda f: (
            f"{f['documents']:,} held-out documents → report",
            f"{f['bits_per_byte']:.3f} bits per byte (unigram tokens {f['unigram_token_bits_per_byte']:.3f}, "
            f"bytes {f['unigram_byte_bits_per_byte']:.3f})",
        )
    if name == "quantize_model":
        from app.quantization import stage as quantization

        return quantization.run, lambda f: (
            f"{f['linear_float32_bytes'] / 1e6:.1f} → {f['linear_weight_bytes'] / 1e6:.1f} MB of linear weights",
            f"{f['linear_percent']:.1f} % of the size, bits per byte {f['loss_percent']:+.2f} %, "
            f"next tokens {f['same_next_token_percent']:.1f} % alike",
        )
    if name == "check_parity":
        from app.evaluation import served

        return served.run, lambda f: (
            f"{f['prompts']} prompts → endpoint",
            f"logprobs within {f['served']['max_logprob_gap']} of the served artifact's, greedy alike "
            f"{f['served']['greedy_percent']} % (before quantization {f['model']['greedy_percent']} %)",
        )
    from app.serving import stage as serving

    return serving.run, lambda f: ("model → endpoint", f"int4, {f.get('linear_percent', 100):.1f} % of float32")
