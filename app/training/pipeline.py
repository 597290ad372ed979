"""A transformers model as the stages of a DeepSpeed pipeline, its steps and its scores.

Every rank builds the whole model from the seed, or reads it, so that its weights are those of a run without stages; it
keeps its stage's modules, transformers' own, and lets the others go. Until then the host needs memory for the whole
model. DeepSpeed drives the micro-batches through the stages (one forward, one backward; Narayanan et al. 2021,
arXiv:2104.04473). Tied embeddings are held by the first and the last stage, which add up their gradients.
It knows llama and qwen3 whose layers see all; stages.py decides the cut, refusals.py what does not go with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.runtime.pipe import module, topology
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from app.training.config import TrainConfig
from app.training.held_out import HeldOut, nats_of
from app.training.layout import Layout
from app.training.stages import Costs, Stages, balance, describe, exported_name

logger = logging.getLogger(__name__)

EMBEDDING = "embed_tokens"


class Staged(PipelineModule):  # type: ignore[misc]
    """This rank's part of a causal language model. `whole` is all of it without its weights, on the meta device."""

    def __init__(self, model: Any, stages: Stages, with_positions: bool) -> None:
        """Takes the model's modules; `model` is not to be used any more."""
        self.with_positions = with_positions
        self._bounds = stages.bounds
        for noisy in (module, topology):
            noisy.print = lambda *_: None  # Ray Train would log what is printed, wherever stdout goes
        super().__init__(_specs(model), num_stages=len(stages.costs), loss_fn=Loss(model.loss_function))
        self._layer_specs = [None] * self._num_layers  # lets the modules of other stages go
        self.rotary = model.model.rotary_emb
        self.config = model.config
        with torch.device("meta"):
            self.whole = [type(model)(model.config)]  # in a list: its parameters are not this module's

    def _partition_layers(self, method: Any = None) -> None:
        """Ours instead of DeepSpeed's, which would build every layer to count it. Part 0 is the embedding."""
        first, *inner, last = self._bounds
        self.parts = [first, *(bound + 1 for bound in inner), last + 3]
        self._set_bounds(*list(pairwise(self.parts))[self.stage_id])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """DeepSpeed's, which forgets that autograd looks on."""
        super()._synchronize_tied_weights()

    @property
    def _is_first(self) -> bool:
        return bool(self._local_start == 0)

    @property
    def _is_last(self) -> bool:
        return bool(self._local_stop == self._num_layers)

    def forward(self, given: Any) -> Any:
        """Token ids [B, T], or the hidden states [B, T, H] of the stage before, to hidden states or logits [B, T, V].

        With positions [B, T] in a tuple, which are passed on, documents do not see each other.
        """
        from transformers.masking_utils import create_causal_mask

        hidden, given_positions = given if isinstance(given, tuple) else (given, None)
        parts = list(self.forward_funcs)
        if self._is_first:
            hidden = parts.pop(0)(hidden)
        last = parts[-2:] if self._is_last else []
        positions = given_positions
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        rotary = self.rotary(hidden, position_ids=positions)
        for layer in parts[: len(parts) - len(last)]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        for part in last:
            hidden = part(hidden)
        return hidden if self._is_last or given_positions is None else (hidden, given_positions)

    def exported_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters by their names in the whole model."""
        for index, part in enumerate(self.forward_funcs, self._local_start):
            is_tied = isinstance(part, partial)  # a head that is the embedding
            for name, parameter in (part.args[0] if is_tied else part).named_parameters():
                yield exported_name(name, 0 if is_tied else index, self._num_layers - 3), parameter


class Loss:
    """The last stage's: the sum over the labels divided by `weight`, as transformers computes it; in a scoring nats."""

    def __init__(self, of_model: Any) -> None:
        self._of_model = of_model
        self.weight = 1.0

    def __call__(self, logits: torch.Tensor, target: Any) -> torch.Tensor:
        """`target` is the labels [B, T]; or, in a tuple, the token after each that counts."""
        if isinstance(target, tuple):
            return nats_of(logits, *target)
        loss: torch.Tensor = self._of_model(
            logits=logits, labels=target, vocab_size=logits.shape[-1], num_items_in_batch=self.weight
        )
        return loss


def cut(model: Any, config: TrainConfig) -> Staged:
    """This rank's stage of the model; collective."""
    costs = Costs(_size(model.model.embed_tokens), tuple(map(_size, model.model.layers)), _head_size(model))
    stages = balance(costs, config.pipeline_stages)
    if torch.distributed.get_rank() == 0:
        logger.info("pipeline: %s", describe(stages))
    return Staged(model, stages, config.document_masking)


def train_step(engine: Any, micro_batches: Sequence[Mapping[str, torch.Tensor]], weight: float) -> float:
    """A step with its optimizer; the sum over micro-batches of the replicas' mean loss, on every rank; collective."""
    engine.module.loss_fn.weight = weight
    batches = ((_inputs(batch["input_ids"], batch.get("position_ids")), batch["labels"]) for batch in micro_batches)
    return float(engine.train_batch(batches)) * len(micro_batches)


def score(texts: Mapping[str, HeldOut], engine: Any, micro_batch: int, layout: Layout) -> dict[str, float]:
    """Bits per byte of each text, as held_out.score gives them; collective."""
    figures = {}
    for name, text in texts.items():
        batches = (_scored(batch, engine.module.with_positions) for batch in text.batches(micro_batch, layout))
        num_passes = text.num_passes(micro_batch, layout)
        nats = engine.eval_batch(batches, reduce_output=None, bcast_loss=False, num_micro_batches=num_passes)
        summed = torch.zeros((), dtype=torch.float64, device=engine.device)
        if nats is not None:  # on the last stage
            summed += torch.stack(nats).sum()
        torch.distributed.all_reduce(summed)
        figures[name] = text.bits_per_byte_of(float(summed))
    engine.module.train()
    return figures


def _scored(batch: Mapping[str, torch.Tensor], with_positions: bool) -> tuple[Any, Any]:
    """Inputs and target of a scoring pass, the inputs in the form of a step's: buffers are made for it."""
    ids = batch["input_ids"]
    positions = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids).contiguous())
    return _inputs(ids, positions if with_positions else None), (batch["targets"],)


def _inputs(input_ids: torch.Tensor, positions: torch.Tensor | None) -> Any:
    return input_ids if positions is None else (input_ids, positions)


class _Part(LayerSpec):  # type: ignore[misc]
    """A module that is there already."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(nn.Module)
        self._part = part

    def build(self, log: bool = False) -> nn.Module:
        return self._part


class _TiedPart(TiedLayerSpec):  # type: ignore[misc]
    def __init__(self, part: nn.Module, forward: Any = None) -> None:
        super().__init__(EMBEDDING, nn.Module, forward_fn=forward)
        self._part = part

    def build(self, log: bool = False) -> nn.Module:
        return self._part


def _specs(model: Any) -> list[LayerSpec]:
    """Embedding, layers, norm, head."""
    inner = model.model
    layers = [_Part(layer) for layer in (*inner.layers, inner.norm)]
    if not model.config.tie_word_embeddings:
        return [_Part(inner.embed_tokens), *layers, _Part(model.lm_head)]
    return [_TiedPart(inner.embed_tokens), *layers, _TiedPart(inner.embed_tokens, _project)]


def _project(embedding: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of a head that is the embedding."""
    return nn.functional.linear(hidden, embedding.weight)  # type: ignore[arg-type]


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _head_size(model: Any) -> int:
    return _size(model.model.norm) + _size(model.lm_head)
