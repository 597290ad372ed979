"""SmolLM2-135M learns a task it fails: LoRA and all weights by ours, with and without replay, beside TRL's LoRA.

All begin with the same model and learn the same conversations for the same steps on two ranks of one thread; one
evaluation judges all of them, on orders that none has seen and on English prose that the model knew before. The clock
of ours is the journal's. TRL pads, ours packs; so the speeds compared are those of tokens that are no padding.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from competitors import demo_training, environments, orders, random_models, smollm2

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import journal
from app.training.config import TrainConfig

BASE, TRL, LORA, ALL = "SmolLM2-135M-Instruct", "TRL, LoRA", "LoRA", "all weights"
TRL_PACKAGES = ("trl==1.16.0",)  # what it needs the project has
ORDERS, HELD_OUT, BLOCK_TOKENS = 600, 0.1, 256
STEPS, WARM_UP, STEP_BLOCKS = 40, 5, 4
REPLAY_SHARE = 0.25
SHARED = {"warmup_steps": 5, "weight_decay": 0.0}
LORA_SETTINGS = {
    "adapter": {"rank": 4, "alpha": 16},
    "optimizer": SHARED | {"learning_rate": 2e-3},
    "output_uri": "adapter",
}
ALL_SETTINGS = {"optimizer": SHARED | {"learning_rate": 2e-4}, "output_uri": "model"}
PROSE_DOCUMENTS, PROSE_CHARACTERS = 16, 2000
AIM_GAIN, AIM_SHARE, AIM_FORGETTING = 0.95, 1.0, 2.0


@dataclass
class Result:
    """How one model does."""

    name: str
    nats: float = 0.0  # a token of a held-out answer
    right: float = 0.0  # share of held-out orders answered to the letter
    prose: float = 0.0  # bits per byte
    step_seconds: float = math.nan
    trained_percent: float = math.nan


def pack(folder: Path, smol: Path, running: LocalCluster) -> None:
    """The orders as conversations, the prose as the old corpus, both in tokens of the model."""
    shared = {"storage_uri": folder, "tokenizer_uri": smol / "model", "block_tokens": BLOCK_TOKENS}
    orders.write(folder / "orders.jsonl", ORDERS)
    demo_training.job(
        "pack_conversations", shared | {"sources": '["orders.jsonl"]', "held_out_fraction": HELD_OUT}, running
    )
    demo_training.job("pack_tokens", shared | {"corpus_uri": smol / "corpus", "output_uri": "prose"}, running)


def settings_of(folder: Path, smol: Path, name: str, **changes: Any) -> TrainConfig:
    """Of one of our runs, which writes into a folder of its own."""
    output = folder / "output" / name.replace(" ", "-").replace(",", "")
    inputs = {"tokens_uri": f"{folder}/conversations", "tokenizer_uri": f"{smol}/model"}
    inputs |= {"init_from_uri": f"{smol}/model", "cache_dir": f"{folder}/cache", "storage_uri": str(output)}
    fixed = {
        "num_steps": STEPS, "global_batch_sequences": STEP_BLOCKS, "micro_batch_sequences": STEP_BLOCKS // 2,
        "num_workers": 2, "zero_stage": 1, "document_masking": True, "wandb_mode": "disabled", "export": "last",
        "checkpoint_interval_steps": STEPS, "evaluation_interval_steps": STEPS,
    }  # fmt: skip
    return TrainConfig.model_validate(inputs | fixed | changes)


def train(config: TrainConfig, running: LocalCluster, result: Result) -> Path:
    """One of our runs; the folder with what it has made."""
    demo_training.finish(demo_training.submit(config, running), config)
    run_uri = config.resolve(config.checkpoints_uri)
    seconds = [line["step_seconds"] - line["evaluation_seconds"] for line in journal.read_log(run_uri)]
    result.step_seconds = statistics.median(seconds[WARM_UP : STEPS - 1])
    (begun,) = journal.read_events(run_uri, "started")
    result.trained_percent = 100 * begun["trainable_parameters"] / begun["all_parameters"]
    return Path(config.resolve(config.output_uri))


def train_trl(config: TrainConfig, folder: Path, batch: int, result: Result) -> Path:
    """TRL's run on the conversations that ours trains on; the folder of its adapter."""
    packages = environments.CACHE / "trl"
    if not (packages / "trl").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, *TRL_PACKAGES], check=True)
    rows = [
        {"input_ids": piece.input_ids.tolist(), "completion_mask": piece.loss_mask.astype(int).tolist()}
        for piece in pieces(folder, config, is_held_out=False)
    ]
    settings = folder / "trl.json"
    given = {"config": config.model_dump(mode="json"), "conversations": rows, "batch": batch, "warm_up": WARM_UP}
    settings.write_text(json.dumps(given))
    output = folder / "output" / "trl"
    script = demo_training.SCRIPTS / "trl_sft.py"
    answers = demo_training.torchrun(script, output, 2, str(settings), packages=packages)
    result.step_seconds = max(answer["step_seconds"] for answer in answers)
    return output / "adapter"


def pieces(folder: Path, config: TrainConfig, is_held_out: bool) -> list[Any]:
    """The token ids and masks of one split's conversations, as the packing stage sees them."""
    from app.conversations import examples
    from app.conversations.config import ConversationsConfig
    from app.conversations.rendering import load_chat_tokenizer

    chat = load_chat_tokenizer(Path(config.tokenizer_uri))
    settings = ConversationsConfig(storage_uri=str(folder), block_tokens=BLOCK_TOKENS)
    lines = (folder / "orders.jsonl").read_text().splitlines()
    found = [examples.read_example(line, chat, settings) for line in lines]
    assert all(isinstance(one, examples.Example) for one in found)
    return [one.pieces[0] for one in found if examples.is_held_out(one, HELD_OUT) == is_held_out]


def judge(model_dir: Path, smol: Path, held_out: list[Any], result: Result) -> None:
    """Loss and exactness on held-out orders, bits per byte of prose, of a model or of an adapter on SmolLM2."""
    from app.documents import sample_texts
    from app.models import load_model, load_tokenizer
    from app.quantization.comparison import bits_per_byte

    is_adapter = (model_dir / "adapter_config.json").exists()
    model: Any = load_model(smol / "model" if is_adapter else model_dir)
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(model_dir)).merge_and_unload()
    result.nats, result.right = answers(model, held_out)
    texts = [text[:PROSE_CHARACTERS] for text in sample_texts(str(smol / "corpus"), "held_out", PROSE_DOCUMENTS)]
    result.prose = bits_per_byte(model, load_tokenizer(smol / "model"), texts)


def answers(model: Any, held_out: list[Any]) -> tuple[float, float]:
    """Nats a token of the true answers; share of answers that greedy decoding gives to the letter."""
    import torch

    nats, tokens, right = 0.0, 0, 0
    for piece in held_out:
        ids = torch.from_numpy(piece.input_ids).long()[None]  # [1, T]
        mask = torch.from_numpy(piece.loss_mask)
        begin, length = int(mask.nonzero()[0]), int(mask.sum())
        with torch.inference_mode():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            said = model.generate(
                ids[:, :begin], attention_mask=torch.ones_like(ids[:, :begin]), max_new_tokens=length,
                do_sample=False, eos_token_id=int(ids[0, begin + length - 1]), pad_token_id=0,
            )  # fmt: skip
        nats += float(losses[mask[1:]].sum())
        tokens += length
        right += said[0, begin:].tolist() == ids[0, begin : begin + length].tolist()
    return nats / tokens, right / len(held_out)


def measure(folder: Path) -> tuple[list[Result], float]:
    """All models; and how many times TRL's tokens per second ours gives."""
    smol = smollm2.make()
    results = [Result(name) for name in (BASE, LORA, f"{LORA}, replay", ALL, f"{ALL}, replay", TRL)]
    replay = {"replay": {"tokens_uri": f"{folder}/prose", "share": REPLAY_SHARE}}
    changes = [LORA_SETTINGS, LORA_SETTINGS | replay, ALL_SETTINGS, ALL_SETTINGS | replay]
    made = {BASE: smol / "model"}
    with demo_training.cluster(folder / "cluster") as running:
        pack(folder, smol, running)
        for result, settings in zip(results[1:5], changes, strict=True):
            made[result.name] = train(settings_of(folder, smol, result.name, **settings), running, result)
            print(f"  {result.name}: {result.step_seconds:.2f} s a step", file=sys.stderr, flush=True)
    figures: Any = read_manifest(f"{folder}/conversations", "tokens").figures["train"]
    conversations = STEP_BLOCKS * figures["documents"] / figures["blocks"]
    config = settings_of(folder, smol, TRL, **LORA_SETTINGS)
    batch = round(conversations / 2)
    made[TRL] = train_trl(config, folder, batch, results[-1])
    held_out = pieces(folder, config, is_held_out=True)
    for result in results:
        judge(made[result.name], smol, held_out, result)
    ours, theirs = results[1].step_seconds / conversations, results[-1].step_seconds / (2 * batch)
    return results, theirs / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / "assistant"
    parser.add_argument("--folder", type=Path, default=default, help="inputs and outputs; emptied first")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    results, speed = measure(given.folder)
    base, lora, _, whole, whole_replay, _ = results
    print(random_models.machine())
    work = f"{STEPS} steps of {STEP_BLOCKS} blocks of {BLOCK_TOKENS} tokens, one run"
    print(f"{ORDERS} orders, {HELD_OUT:.0%} held out; {work}")
    print(f"{'':26}{'trained':>9}{'nats a token':>14}{'right':>8}{'prose, bits/byte':>18}{'s a step':>10}")
    for one in results:
        change = f"{one.prose:.4f} ({100 * (one.prose / base.prose - 1):+.1f} %)"
        share = "" if math.isnan(one.trained_percent) else f"{one.trained_percent:.2f} %"
        step = "" if math.isnan(one.step_seconds) else f"{one.step_seconds:.2f}"
        print(f"{one.name:26}{share:>9}{one.nats:14.4f}{one.right:8.0%}{change:>18}{step:>10}")
    gain = (base.nats - lora.nats) / (base.nats - whole.nats)
    print(f"parameters that LoRA trains: {lora.trained_percent:.2f} % (aim: at most {AIM_SHARE:g} %)")
    forgotten = 100 * (whole_replay.prose / base.prose - 1)
    print(f"prose after {ALL} with replay: {forgotten:+.1f} % bits per byte (aim: within {AIM_FORGETTING:g} %)")
    print(f"LoRA's gain / that of {ALL}: {gain:.3f} (aim {AIM_GAIN:g})")
    print(f"tokens per second, ours / TRL's, both LoRA: {speed:.2f}")


if __name__ == "__main__":
    main()
