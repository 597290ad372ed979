"""SmolLM2-135M through the stages that follow training: evaluation, the endpoint, 4 bits, and parity with transformers.

Each is the project's own job on a private cluster; `--quantize` adds the model in 4 bits, whose scales take a CPU some
minutes. The evaluated text is English prose; the endpoint has all its defaults, content filter included.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from competitors import demo_training, random_models, smollm2

from app.artifacts import read_manifest
from app.cluster import LocalCluster

DOCUMENTS = 12
SCORES = ("bits_per_byte", "perplexity", "bleu", "chrf", "rougeL", "bertscore", "distinct_2", "repetition")
AIM_LOSS, AIM_PERCENT, AIM_GAP = 2.0, 14.0, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / "real-model"
    parser.add_argument("--folder", type=Path, default=default, help="what the jobs write; complete steps are skipped")
    parser.add_argument(
        "--quantize", action="store_true", help="also in 4 bits, groups of 64, and 32 where it costs most"
    )
    given = parser.parse_args()
    smol = smollm2.make()
    given.folder.mkdir(parents=True, exist_ok=True)
    shared = {"storage_uri": given.folder, "corpus_uri": smol / "corpus", "model_uri": smol / "model"}
    print(random_models.machine())
    with demo_training.cluster(given.folder / "cluster") as running:
        sizes = {"max_documents": DOCUMENTS, "num_continuations": DOCUMENTS}
        demo_training.job("evaluate_model", shared | sizes, running)
        show_scores(read_manifest(f"{given.folder}/report", "report").figures)
        parity(given.folder, smol, smol / "model", running)
        if given.quantize:
            sizes = {"group_size": 64, "layer_group_sizes": {"re:.*(q|k|v|o|down)_proj": 32}}
            few = {"num_calibration_samples": 1, "num_comparison_documents": DOCUMENTS, **sizes}
            demo_training.job("quantize_model", shared | few, running)
            figures = read_manifest(f"{given.folder}/quantized", "model").figures
            print(f"4 bits: {figures}")
            print(f"4 bits: loss in bits per byte {figures['loss_percent']} %   (aim: below {AIM_LOSS})")
            print(f"4 bits: linear weights {figures['linear_percent']} % of float32's   (aim: at most {AIM_PERCENT})")
            parity(given.folder, smol, given.folder / "quantized", running)


def show_scores(figures: Any) -> None:
    """Each with its bootstrap interval."""
    for name in SCORES:
        interval = figures[f"{name}_interval"]
        print(f"{name:14} {figures[name]:9.4f}   95 %: {interval['low']:.4f} to {interval['high']:.4f}")


def parity(folder: Path, smol: Path, served: Path, running: LocalCluster) -> None:
    """Deploy a model and compare the endpoint's greedy answers with transformers' view of the same model."""
    deployed = {"output_uri": f"{served.name}-deployed.yaml", "port": running.endpoint_port}
    demo_training.job("deploy_model", {"storage_uri": folder, "model_uri": served} | deployed, running)
    models = {"served_uri": served, "model_uri": smol / "model", "corpus_uri": smol / "corpus"}
    output = f"parity-{served.name}"
    settings = {"storage_uri": folder, "output_uri": output, "num_prompts": DOCUMENTS, "max_logprob_gap": 1.0}
    demo_training.job("check_parity", settings | models, running)
    figures = read_manifest(f"{folder}/{output}", "report").figures
    gap = figures["served"]["max_logprob_gap"]  # type: ignore[index, call-overload]
    print(f"endpoint, {served.name}: {figures}")
    print(f"endpoint, {served.name}: largest distance of log-probabilities {gap}   (aim: at most {AIM_GAP} in float32)")


if __name__ == "__main__":
    main()
