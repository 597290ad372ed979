"""The trained model in the Hugging Face layout: whole safetensors weights, config, tokenizer, training log."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import storage
from app.models import TURN_END
from app.training.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def llama_config(config: TrainConfig, vocab_size: int, block_tokens: int, end_of_text_id: int) -> Any:
    """The transformers config of the model; its context is the length of the blocks it is trained on."""
    from transformers import LlamaConfig

    model = config.model
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_key_value_heads,
        max_position_embeddings=block_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        use_cache=False,
    )


def gather_weights(model: PreTrainedModel, keep: bool) -> dict[str, torch.Tensor]:
    """Whole weights by name, one parameter at a time; collective: every rank calls it, those that keep get them."""
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def export_model(model: PreTrainedModel, weights: dict[str, torch.Tensor], log: str, config: TrainConfig) -> None:
    """Write model, tokenizer and training log under output_uri; called by one rank."""
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_torch_state_dict(weights, folder)
        model.config.use_cache = True
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        with storage.local_copy(config.resolve(config.tokenizer_uri)) as tokenizer_dir:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
        GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
        (folder / "training_log.jsonl").write_text(log)
        storage.upload(folder, config.resolve(config.output_uri))
