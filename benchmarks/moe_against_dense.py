"""Held-out bits per byte of a mixture of experts beside a dense model of as many active parameters, on the demo text.

The mixture is DeepSeek's: of sixteen experts three work on a token, and one always does; each is a quarter of the dense
layer's width, so that a token is multiplied with as many parameters (less some of attention's, and the router's). Both
see the same tokens in the same order. It makes the corpus once; `--runs` seeds, of which it prints the mean difference
and its 95 % interval (Student's t).
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from competitors import demo_corpus, demo_training

from app.training.config import ModelConfig
from app.training.sizes import count_parameters

STEPS, BLOCK_TOKENS = 1000, 512
OPTIMIZER = {"learning_rate": 6e-3, "warmup_steps": 20}
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 4, "num_heads": 2, "tie_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SIZES | {"architecture": "qwen3", "num_key_value_heads": 2},
    "16 experts, 3 + 1 active": SIZES
    | {
        "architecture": "deepseek_v3",
        "num_experts": 16,
        "experts_per_token": 3,
        "num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "routed_scaling_factor": 3.0,  # on weights that sum to 1, so that experts count as the parts of a dense layer
        "latent": {"key_value_rank": 32, "rope_head_size": 16, "plain_head_size": 16, "value_head_size": 32},
    },
}


def main() -> None:
    given = demo_training.arguments(__doc__, "moe-against-dense")
    given.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    with demo_training.cluster(given.folder / "cluster") as running:
        demo_corpus.prepare(given.folder, running, BLOCK_TOKENS)
        for seed in range(given.runs):
            for name, model in MODELS.items():
                output = f"{name.split()[0]}-{seed}"
                config = demo_corpus.settings(given.folder, output, STEPS, model=model, seed=seed, optimizer=OPTIMIZER)
                found[name].append(demo_corpus.train(config, running))
                print(f"  seed {seed}: {name} {found[name][-1]}", file=sys.stderr, flush=True)
    vocab_size = demo_corpus.vocab_size(given.folder)
    print(f"{STEPS} steps, {found['dense'][0]['tokens']:,.0f} tokens, seeds 0 to {given.runs - 1}")
    print(f"{'':24} {'parameters':>11} {'multiplied':>11} {'bits per byte':>14} {'tokens/s':>9}")
    for name, runs in found.items():
        count = count_parameters(ModelConfig.model_validate(MODELS[name]), vocab_size)
        score, speed = (
            statistics.fmean(run[key] for run in runs) for key in ("held_out_bits_per_byte", "tokens_per_second")
        )
        print(f"{name:24} {count.total:11,} {count.multiplied:11,} {score:14.4f} {speed:9.0f}")
    dense, mixture = ([run["held_out_bits_per_byte"] for run in runs] for runs in found.values())
    mean, half = demo_corpus.interval([after - before for before, after in zip(dense, mixture, strict=True)])
    print(f"mixture less dense: {mean:+.4f} bits per byte, 95 % interval {mean - half:+.4f} to {mean + half:+.4f}")
    print(f"busiest expert over the mean at the end: {max(run['expert_load_max'] for run in found[name]):.2f}")
    print(f"dense / mixture, bits per byte: {statistics.fmean(dense) / statistics.fmean(mixture):.4f}")


if __name__ == "__main__":
    main()
