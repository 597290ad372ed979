"""From a base model that answers nothing to one that does: all weights, LoRA, resumed LoRA, merged, and preferences."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from app.artifacts import Manifest, read_manifest
from app.cluster import LocalCluster
from app.conversations import stage as conversations
from app.conversations.config import PackConversationsConfig
from app.conversations.examples import Example, is_held_out, read_example
from app.serving.catalog import Adapters
from app.training import checkpoint, held_out, journal, stage
from app.training.config import TrainConfig
from tests.conversations.tiny import CONTEXT_TOKENS, preferences, records, write_base, write_jsonl, write_tokenizer
from tests.training.runs import finish, start, wait_for_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS, HELD_OUT = 320, 0.1  # an adapter of rank 1 needs them to tell the answers apart
ADAPTER: dict[str, Any] = {
    "adapter": {"rank": 1, "alpha": 8},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 20, "weight_decay": 0.0},
    "correction": {"spike_score": 0},  # so few weights at so high a rate: the loss jumps, and comes back by itself
}


def settings(inputs: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A tuning run in `root` on the inputs' conversations, begun on their base model."""
    given = {
        "storage_uri": str(root),
        "tokens_uri": f"{inputs}/conversations",
        "tokenizer_uri": f"{inputs}/tokenizer",
        "init_from_uri": f"{inputs}/base",
        "cache_dir": f"{inputs}/cache",
        "document_masking": True,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5, "weight_decay": 0.0},
        "num_steps": STEPS,
        "global_batch_sequences": 8,
        "micro_batch_sequences": 4,
        "checkpoint_interval_steps": 40,
        "evaluation_interval_steps": 80,
        "wandb_mode": "disabled",
    }
    return {**given, **changes}


def train(inputs: Path, root: Path, **changes: Any) -> Manifest:
    return stage.run(TrainConfig.model_validate(settings(inputs, root, **changes)))


@pytest.fixture(scope="module")
def inputs(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, base model, and packed conversations and preferences."""
    root = tmp_path_factory.mktemp("tuning")
    write_base(write_tokenizer(root / "tokenizer"), root / "base")
    for name, rows in (("conversations", records()), ("preferences", preferences())):
        write_jsonl(root / f"{name}.jsonl", rows)
        given = {"storage_uri": str(root), "sources": [f"{name}.jsonl"], "block_tokens": CONTEXT_TOKENS}
        given |= {"output_uri": name, "held_out_fraction": HELD_OUT}
        conversations.run(PackConversationsConfig.model_validate(given))
    return root


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights tuned, by one worker: half the time of two."""
    root = tmp_path_factory.mktemp("whole")
    train(inputs, root, num_workers=1, micro_batch_sequences=8, zero_stage=0)
    return root


@pytest.fixture(scope="module")
def adapted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained, undisturbed."""
    root = tmp_path_factory.mktemp("adapted")
    train(inputs, root, **ADAPTER, output_uri="adapters/json")
    return root


def answered_right(model: Any, inputs: Path) -> float:
    """Share of the held-out questions whose greedy answer is the right one, to the end of the turn."""
    import torch

    from app.conversations.rendering import load_chat_tokenizer

    chat = load_chat_tokenizer(inputs / "tokenizer")
    given = PackConversationsConfig(block_tokens=CONTEXT_TOKENS)
    right = []
    for record in records():
        example = read_example(json.dumps(record), chat, given)
        if isinstance(example, Example) and is_held_out(example, HELD_OUT):
            ids = chat.apply_chat_template(record["messages"][:-1], add_generation_prompt=True, return_dict=False)
            with torch.no_grad():
                made = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=3)
            right.append(chat.decode(made[0, len(ids) :]) == f"{record['messages'][-1]['content']}<|im_end|>")
    assert len(right) > 40
    return sum(right) / len(right)


def load(folder: Path, adapter: Path | None = None) -> Any:
    """By transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False  # transformers tells packed documents apart only without one
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def first_loss(inputs: Path) -> float:
    """Bits per byte of the held-out answers under the base, as the trainer scores them."""
    given = TrainConfig.model_validate(settings(inputs, inputs))
    return held_out.score(held_out.open_all(given), load(inputs / "base"), 8)["held_out_bits_per_byte"]


def test_all_weights_learn_the_answers(inputs: Path, whole: Path) -> None:
    figures = read_manifest(f"{whole}/model", "model").figures
    assert answered_right(load(inputs / "base"), inputs) == 0.0
    assert answered_right(load(whole / "model"), inputs) > 0.9
    assert float(str(figures["held_out_bits_per_byte"])) < 0.1 * first_loss(inputs)


def test_an_adapter_of_one_percent_gains_as_much(inputs: Path, whole: Path, adapted: Path) -> None:
    """At the same steps, at least 95 % of what all weights gain; what is served is PEFT's folder."""
    figures = read_manifest(f"{adapted}/adapters/json", "adapter").figures
    assert float(str(figures["trainable_percent"])) <= 1
    assert figures["trainable_parameters"] == figures["parameters"]
    before = first_loss(inputs)
    gains = [
        before - float(str(read_manifest(uri, kind).figures["held_out_bits_per_byte"]))
        for uri, kind in ((f"{whole}/model", "model"), (f"{adapted}/adapters/json", "adapter"))
    ]
    assert gains[1] > 0.95 * gains[0]
    assert answered_right(load(inputs / "base", adapted / "adapters" / "json"), inputs) > 0.6  # by chance a third
    assert Adapters(str(adapted / "adapters"), max_rank=8).names() == {"json"}
    checkpoints = sum(path.stat().st_size for path in (adapted / "checkpoints" / "checkpoints").rglob("*.pt"))
    assert checkpoints < 0.5 * (inputs / "base" / "model.safetensors").stat().st_size  # of all kept together


def test_a_merged_adapter_says_the_same(inputs: Path, adapted: Path) -> None:
    """The finished run is submitted again, to merge: nothing is trained anew, and no other run is needed."""
    import torch

    given = ADAPTER | {"adapter": ADAPTER["adapter"] | {"merge": True}}
    merged = train(inputs, adapted, **given, output_uri="merged")
    assert merged.kind == "model"
    assert len(journal.read_events(f"{adapted}/checkpoints", "first_step")) == 1
    beside = load(inputs / "base", adapted / "adapters" / "json").double()  # rounding is the merged weights' alone
    ids = torch.randint(4, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found, base = (
            model(ids).logits for model in (beside, load(adapted / "merged").double(), load(inputs / "base").double())
        )
    assert (expected - found).abs().max() < 1e-4
    assert (expected - base).abs().max() > 0.1


@pytest.mark.long
def test_a_killed_adapter_run_submitted_again_changes_nothing(
    inputs: Path, adapted: Path, cluster: LocalCluster, tmp_path: Path
) -> None:
    given = settings(inputs, tmp_path, **ADAPTER, output_uri="adapters/json")
    job = start(tmp_path, inputs, cluster, **given)
    wait_for_checkpoint(tmp_path, job, 40)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    said = finish(start(tmp_path, inputs, cluster, **given))
    assert "resuming after step" in said
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (root / "adapters" / "json" / name for root in (tmp_path, adapted))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.long
def test_an_adapter_run_goes_on_with_other_workers(inputs: Path, adapted: Path, tmp_path: Path) -> None:
    """From two workers to one, at the last checkpoint but one: the adapter differs by rounding only."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(adapted / "checkpoints", tmp_path / "checkpoints")
    newest, *_ = checkpoint.find_complete(f"{tmp_path}/checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoints" / newest.name)
    train(inputs, tmp_path, **ADAPTER, output_uri="adapters/json", num_workers=1)
    one, other = (load_file(root / "adapters" / "json" / "adapter_model.safetensors") for root in (tmp_path, adapted))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    log = journal.read_log(f"{tmp_path}/checkpoints")
    assert {line["world_size"] for line in log} == {1.0, 2.0}


def test_an_adapter_is_learned_beside_weights_of_4_bits(inputs: Path, tmp_path: Path) -> None:
    """What is reported is what the 4-bit base with the adapter scores; it is merged into the weights as they were."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given = ADAPTER | {"adapter": ADAPTER["adapter"] | {"load_in_4bit": True}, "zero_stage": 2}
    given |= {"num_steps": STEPS // 2}
    manifest = train(inputs, tmp_path, **given, output_uri="adapters/json")
    reported = float(str(manifest.figures["held_out_bits_per_byte"]))
    assert reported < 0.2 * first_loss(inputs)
    assert float(str(manifest.figures["trainable_percent"])) <= 1  # of the weights, not of the bytes that hold them
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(inputs / "base", quantization_config=packed, device_map={"": "cpu"})
    base.config.use_cache = False
    scored = held_out.open_all(TrainConfig.model_validate(settings(inputs, inputs)))
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert held_out.score(scored, base, 8)["held_out_bits_per_byte"] > 5 * reported
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters" / "json")
    assert held_out.score(scored, adapted, 8)["held_out_bits_per_byte"] == pytest.approx(reported, abs=1e-4)
    train(inputs, tmp_path, **given | {"adapter": given["adapter"] | {"merge": True}}, output_uri="merged")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", inputs / "base"))
    assert {name for name in one if not torch.equal(one[name], other[name])} == {
        name for name in one if name.endswith("_proj.weight")
    }


def test_preferences_are_learned_and_told_right(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Begun on the tuned model; what was never seen is told right far more often than by chance."""
    given = {**ADAPTER, "tokens_uri": f"{inputs}/preferences", "init_from_uri": f"{whole}/model"}
    manifest = train(inputs, tmp_path, **given, output_uri="adapters/polite", num_steps=40)
    log = journal.read_log(f"{tmp_path}/checkpoints")
    assert log[0]["preference_accuracy"] == 0.0  # no pair has gained anything before the first step
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log[-1]["reward_margin"] > 0.1
    assert float(str(manifest.figures["held_out_preference_accuracy"])) > 0.9
    assert float(str(manifest.figures["held_out_preference_loss"])) < 0.9 * math.log(2)


def test_what_does_not_fit_together_is_refused(inputs: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"document_masking": False}, "document_masking: .* holds conversations, packed together"),
        ({"tokens_uri": f"{inputs}/preferences"}, "holds preferences: they are learned by an adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            train(inputs, tmp_path / said[:5], **changes)
