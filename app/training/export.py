"""From a checkpoint to the model in the Hugging Face layout: whole safetensors weights, config, tokenizer, log.

Works on the checkpoint's files, without the workers that wrote it: the same whole weights are scored while training
goes on and exported at the end. The host needs memory for the whole model in float32.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import storage
from app.models import TURN_END
from app.training import adapter, checkpoint, held_out, journal, stages
from app.training.checkpoint import CheckpointManifest
from app.training.config import TrainConfig
from app.training.families import biases_of, set_biases

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "architecture"  # folder of the run with the model's config


def save_architecture(model_config: Any, class_name: str, run_uri: str) -> None:
    """Keep the model's config in the run's folder; done once, by one rank."""
    with tempfile.TemporaryDirectory() as folder:
        model_config.architectures = [class_name]
        model_config.save_pretrained(folder)
        storage.upload(Path(folder), f"{run_uri}/{ARCHITECTURE}")


def load_whole(run_uri: str, manifest: CheckpointManifest, config: TrainConfig) -> Any:
    """The transformers model with the checkpoint's weights, on the CPU, in the dtype it is trained in.

    Under an adapter, the model that it was begun on, in 4 bits if it was, with the adapter beside its layers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from app import block_qwen3

    disable_progress_bar()
    block_qwen3.register()
    if config.adapter.rank:
        weights = _whole_weights(run_uri, manifest)
        model = load_base(config, attention="sdpa")  # what suits a GPU's workers may not run here
        model.config.use_cache = False  # transformers tells packed documents apart only without one
        adapter.add(model, config.adapter, config.seed)
        model.load_state_dict(adapter.trainable(weights), strict=False)
        return model
    with storage.local_copy(f"{run_uri}/{ARCHITECTURE}") as folder:
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, config.dtype))
    set_biases(model, biases_of(model))
    if config.tensor_parallel > 1:
        weights = _joined_matrices(run_uri, manifest, model)
    elif config.pipeline_stages > 1:
        weights = _joined_stages(run_uri, manifest, model_config.num_hidden_layers)
    else:
        weights = _whole_weights(run_uri, manifest)
    model.load_state_dict(weights, strict=not model_config.tie_word_embeddings)  # tied: the output's own is not stored
    model.tie_weights()
    return model


def export_model(run_uri: str, manifest: CheckpointManifest, config: TrainConfig) -> None:
    """Write model, tokenizer and training log under output_uri; of an adapter that is not merged, the adapter and log.

    An endpoint may be watching the folder: an adapter's settings come last, and at once.
    """
    uri = config.resolve(config.output_uri)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "training_log.jsonl").write_text(journal.to_jsonl(journal.read_log(run_uri)))
        if config.kind == "adapter":
            weights = adapter.trainable(_whole_weights(run_uri, manifest))
            adapter.save(weights, config.adapter, config.resolve(config.init_from_uri), folder)
            settings = (folder / adapter.CONFIG).read_bytes()
            (folder / adapter.CONFIG).unlink()
            storage.upload(folder, uri)
            storage.write_atomic(f"{uri}/{adapter.CONFIG}", settings)
            return
        model = load_whole(run_uri, manifest, config.with_overrides({"adapter.load_in_4bit": False}))
        model = adapter.merge(model) if config.adapter.rank else model
        model.config.use_cache = True
        model.save_pretrained(folder)
        _save_tokenizer(config, model.config.max_position_embeddings, folder)
        storage.upload(folder, uri)


def _save_tokenizer(config: TrainConfig, context_tokens: int, folder: Path) -> None:
    """Beside the model, and the tokens that end an answer: ours, and those of the model that this one began with."""
    from transformers import AutoTokenizer, GenerationConfig

    with storage.local_copy(config.resolve(config.tokenizer_uri)) as tokenizer_dir:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    tokenizer.model_max_length = context_tokens
    tokenizer.save_pretrained(folder)
    stops = {tokenizer.eos_token_id, tokenizer.get_vocab().get(TURN_END)} - {None}
    settings = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    before = config.resolve(config.init_from_uri) if config.init_from_uri else ""
    if before and storage.exists(f"{before}/generation_config.json"):
        with storage.local_copy(before) as base:
            settings = GenerationConfig.from_pretrained(base)
        found = settings.eos_token_id
        stops |= set(found if isinstance(found, list) else [found]) - {None}
    settings.eos_token_id = sorted(stops)
    settings.save_pretrained(folder)


def load_base(config: TrainConfig, attention: str) -> Any:
    """The model that the run began with, under that implementation of attention; in 4 bits, on the device at once."""
    import torch
    from transformers import AutoModelForCausalLM

    from app import block_qwen3

    block_qwen3.register()
    with storage.local_copy(config.resolve(config.init_from_uri)) as folder:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **(_in_4bit(config.dtype) if config.adapter.load_in_4bit else {}),
        )


def _in_4bit(dtype: str) -> dict[str, Any]:
    """NF4 with its scales quantized too, as in the paper; what is computed is computed in `dtype`."""
    import torch
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def score_checkpoint(run_uri: str, step: int, config: TrainConfig) -> dict[str, float]:
    """Held-out figures of a complete checkpoint, written where `read_scores` finds them; {} when it is gone."""
    import torch

    found = [manifest for manifest in checkpoint.find_complete(run_uri) if manifest.step == step]
    if not found:
        return {}
    model = load_whole(run_uri, found[0], config).to("cuda" if torch.cuda.is_available() else "cpu")
    figures = held_out.score(held_out.open_all(config), model, config.micro_batch_sequences)
    checkpoint.write_scores(run_uri, step, figures)
    return figures


@contextlib.contextmanager
def _files_of(run_uri: str, manifest: CheckpointManifest) -> Iterator[Path]:
    if damage := checkpoint.find_damage(run_uri, manifest):
        raise ValueError(f"{damage}; submit the job again to go on from the checkpoint before")
    with storage.local_copy(f"{checkpoint.folder(run_uri)}/{manifest.name}") as folder:
        yield folder


def _joined_matrices(run_uri: str, manifest: CheckpointManifest, model: Any) -> dict[str, Any]:
    """Of a model whose matrices are cut: each tensor-parallel rank's file holds its part of all of them."""
    import torch

    with _files_of(run_uri, manifest) as folder:
        files = sorted(folder.glob("mp_rank_*_model_states.pt"))
        assert len(files) == manifest.config["tensor_parallel"], files
        parts = [torch.load(file, map_location="cpu", weights_only=False)["module"] for file in files]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {name: join([part[name] for part in parts], shapes[name]) for name in parts[0]}


def _joined_stages(run_uri: str, manifest: CheckpointManifest, num_layers: int) -> dict[str, Any]:
    """Of a pipeline, which writes a file for each of its parts; tied weights are there once."""
    import torch

    weights = {}
    with _files_of(run_uri, manifest) as folder:
        for path in sorted(folder.glob("layer_*-model_states.pt")):
            index = int(path.name.removeprefix("layer_").split("-")[0])
            for name, tensor in torch.load(path, map_location="cpu", weights_only=False).items():
                weights[stages.exported_name(name, index, num_layers)] = tensor
    return weights


def join(parts: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The tensor of that shape from what each tensor-parallel rank has: all of it, or a part along one dimension."""
    import torch

    short = [dimension for dimension, size in enumerate(shape) if parts[0].shape[dimension] != size]
    assert len(short) <= 1, (parts[0].shape, shape)
    return torch.cat(list(parts), short[0]) if short else parts[0]


def _whole_weights(run_uri: str, manifest: CheckpointManifest) -> Any:
    import torch

    with _files_of(run_uri, manifest) as folder:
        if manifest.zero_stage == 0:
            return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints bars
            return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
