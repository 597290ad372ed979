"""A narrow model's best learning rate on wider ones, as it is and transferred, on the demo's text.

Llamas of one depth and three widths are trained with each learning rate; `transferred` gives the matrices of the wide
ones as much less of it as they are wider (`optimizer.found_at_hidden_size`). What the narrow one's best rate costs a
wide one is its held-out loss less the lowest that any rate reached.
One process without Ray trains them, by the parameter groups and schedule of train_model.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from competitors import demo_corpus, demo_training, random_models

from app.training.config import TrainConfig
from app.training.engine import fresh_model, parameter_groups, set_learning_rate
from app.training.schedule import learning_rate

WIDTHS = (64, 128, 256)
HEAD_SIZE, NUM_LAYERS = 32, 4
RATES = [2.0**exponent for exponent in range(-10, -3)]
STEPS, BATCH, BLOCK_TOKENS, HELD_OUT_BLOCKS = 150, 8, 256, 32
AIM_SHARE = 0.25  # of what the rate costs when it is not transferred


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / "learning-rate-transfer"
    parser.add_argument("--folder", type=Path, default=default, help="corpus and tokens")
    parser.add_argument("--runs", type=int, default=1, help="seeds; means are printed")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with demo_training.cluster(given.folder / "cluster") as running:
        demo_corpus.prepare(given.folder, running, BLOCK_TOKENS)
    vocab_size = demo_corpus.vocab_size(given.folder)
    train, held_out = (blocks(given.folder / "tokens" / split) for split in ("train", "held_out"))
    print(random_models.machine())
    print(
        f"held-out loss after {STEPS} steps of {BATCH * BLOCK_TOKENS} tokens, {NUM_LAYERS} layers, seeds: {given.runs}"
    )
    print(f"{'hidden_size':>11} {'':12}" + "".join(f"{rate:9.4f}" for rate in RATES))
    found: dict[tuple[int, bool], list[float]] = {}
    for width in WIDTHS:
        for is_transferred in (False, True)[: 1 if width == WIDTHS[0] else 2]:
            found[width, is_transferred] = [
                statistics.fmean(
                    trained(config(width, rate, is_transferred, seed), vocab_size, train, held_out)
                    for seed in range(given.runs)
                )
                for rate in RATES
            ]
            losses = "".join(f"{loss:9.4f}" for loss in found[width, is_transferred])
            print(f"{width:11} {'transferred' if is_transferred else 'as it is':12}{losses}", flush=True)
    conclude(found)


def config(width: int, rate: float, is_transferred: bool, seed: int) -> TrainConfig:
    """A llama of that width."""
    model = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_layers": NUM_LAYERS,
        "num_heads": width // HEAD_SIZE, "num_key_value_heads": width // HEAD_SIZE,
    }  # fmt: skip
    optimizer = {"learning_rate": rate, "found_at_hidden_size": WIDTHS[0] if is_transferred else 0}
    return TrainConfig.model_validate({"model": model, "optimizer": optimizer, "num_steps": STEPS, "seed": seed})


def blocks(folder: Path) -> np.ndarray:
    """Token ids [N, T]."""
    columns = [pq.read_table(path)["input_ids"] for path in sorted(folder.glob("*.parquet"))]
    return np.stack([np.asarray(ids) for column in columns for ids in column.to_pylist()])


def trained(config: TrainConfig, vocab_size: int, train: np.ndarray, held_out: np.ndarray) -> float:
    """The held-out loss, in nats a token, of a model trained so."""
    torch.manual_seed(config.seed)
    model = fresh_model(config, {"vocab_size": vocab_size, "block_tokens": BLOCK_TOKENS, "end_of_text_id": 0})
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.hidden_size)
    optimizer = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2))
    order = np.random.default_rng(config.seed).permutation(len(train))
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate(step, STEPS, config.optimizer))
        ids = torch.from_numpy(train[order[(np.arange(BATCH) + step * BATCH) % len(order)]])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        ids = torch.from_numpy(held_out[:HELD_OUT_BLOCKS])
        losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) for part in ids.split(BATCH)]
    loss = statistics.fmean(losses)
    print(f"  {config.model.hidden_size} {config.optimizer.learning_rate:.4f} {loss:.4f}", file=sys.stderr, flush=True)
    return loss if math.isfinite(loss) else math.inf


def conclude(found: dict[tuple[int, bool], list[float]]) -> None:
    """The best rates, and what the narrow model's costs the wide ones."""
    narrow = found[WIDTHS[0], False]
    chosen = narrow.index(min(narrow))
    print(f"best of {WIDTHS[0]}: {RATES[chosen]:.4f}")
    for width in WIDTHS[1:]:
        lowest = min(found[width, False] + found[width, True])
        costs = [found[width, is_transferred][chosen] - lowest for is_transferred in (False, True)]
        best = [RATES[losses.index(min(losses))] for losses in (found[width, False], found[width, True])]
        print(
            f"{width}: best {best[0]:.4f} as it is, {best[1]:.4f} transferred; the narrow one's costs {costs[0]:.4f} "
            f"as it is, {costs[1]:.4f} transferred: {costs[1] / costs[0]:.2f} of it   (aim: at most {AIM_SHARE})"
        )


if __name__ == "__main__":
    main()
