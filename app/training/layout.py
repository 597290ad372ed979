"""A rank's place among those that share a model, and which rows and tokens are its own: pure arithmetic.

Neighbours share each layer's matrices (tensor), groups of such neighbours the tokens of a block (sequence), groups of
those share out the batch (data), and what is left the layers (stages): num_workers is the product. The order is that in
which DeepSpeed makes its groups.
It moves no tensors between ranks: DeepSpeed does, for tokens after Jacobs et al. 2023 (Ulysses, arXiv:2309.14509), for
matrices after Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from app.training.config import TrainConfig

SHAREABLE = ("llama", "qwen3")  # families whose sharing is tested, all of whose layers see all tokens


@dataclass(frozen=True)
class Layout:
    """One rank of `world_size`; the sizes are the degrees of the config, and divide it."""

    rank: int = 0
    world_size: int = 1
    sequence_size: int = 1
    tensor_size: int = 1
    num_stages: int = 1

    @classmethod
    def of(cls, config: TrainConfig, rank: int, world_size: int) -> Self:
        """Raises ValueError when the workers that there are cannot share the model so."""
        if world_size % config.workers_per_replica:
            raise ValueError(
                f"sequence_parallel ({config.sequence_parallel}) x tensor_parallel ({config.tensor_parallel}) x "
                f"pipeline_stages ({config.pipeline_stages}) does not divide the number of workers ({world_size})"
            )
        return cls(rank, world_size, config.sequence_parallel, config.tensor_parallel, config.pipeline_stages)

    @property
    def sharers(self) -> int:
        """Neighbours that see the same rows as this one in the same stage, itself included."""
        return self.sequence_size * self.tensor_size

    @property
    def stage(self) -> int:
        """Which part of the layers it has."""
        return self.rank // (self.sharers * self.data_size)

    @property
    def data_rank(self) -> int:
        """Which part of the batch it has."""
        return self.rank // self.sharers % self.data_size

    @property
    def data_size(self) -> int:
        """In how many parts the batch is shared out."""
        return self.world_size // (self.sharers * self.num_stages)

    @property
    def sequence_rank(self) -> int:
        """Which part of each block it has."""
        return self.rank // self.tensor_size % self.sequence_size

    @property
    def tensor_rank(self) -> int:
        """Which part of each matrix it has."""
        return self.rank % self.tensor_size

    @property
    def is_first(self) -> bool:
        """Whether it speaks for the ranks that see the same rows: one has to, for each row to count once."""
        return self.rank % self.sharers == 0 and self.stage == 0

    @property
    def same_loss(self) -> int:
        """Ranks that report this one's loss again; those of sequence ranks are parts of one."""
        return self.tensor_size * self.num_stages

    def tokens(self, block_tokens: int) -> slice:
        """Its tokens of a block; those of the sequence ranks in order are the block."""
        assert block_tokens % self.sequence_size == 0, "refused when the engine is built"
        share = block_tokens // self.sequence_size
        return slice(self.sequence_rank * share, (self.sequence_rank + 1) * share)

    def averaged_ranks(self, zero_stage: int) -> int:
        """Over how many ranks DeepSpeed takes the mean of the gradients.

        Those of ranks that share tokens are parts of one sum: it divides by the data-parallel degree. Not under
        ZeRO-3, where DeepSpeed 0.19.8 divides by all ranks that hold a shard.
        """
        return self.data_size * (self.sequence_size if zero_stage == 3 else 1)


def sequence_fits(degree: int, num_heads: int, num_key_value_heads: int) -> bool:
    """Whether so many ranks can have whole heads in exchange for their tokens; keys and values may be repeated."""
    several = num_key_value_heads % degree == 0 or degree % num_key_value_heads == 0
    return num_heads % degree == 0 and several


def tensor_fits(degree: int, num_key_value_heads: int, intermediate_size: int) -> bool:
    """Whether each of so many ranks gets equal parts of all layers."""
    return num_key_value_heads % degree == 0 and intermediate_size % degree == 0


def refuse_unshareable(config: TrainConfig, block_tokens: int, base: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError if the workers cannot share these blocks, or the model of that config.json to start from."""
    sequence, tensor = config.sequence_parallel, config.tensor_parallel
    if block_tokens % sequence:
        raise ValueError(
            f"sequence_parallel: {sequence} workers cannot share blocks of {block_tokens} tokens; "
            "set it to a divisor, or pack blocks of another block_tokens"
        )
    if base is None or config.workers_per_replica == 1:
        return
    family = base.get("model_type")
    has_windows = base.get("use_sliding_window") or "sliding_attention" in (base.get("layer_types") or ())
    if family not in SHAREABLE or has_windows:
        kind = f"{family} with windows" if has_windows else family
        raise ValueError(
            f"init_from_uri: workers cannot share a model of type {kind}, only {' and '.join(SHAREABLE)} without "
            "windows; set sequence_parallel, tensor_parallel and pipeline_stages to 1"
        )
    if config.pipeline_stages > base["num_hidden_layers"]:
        raise ValueError(
            f"pipeline_stages: {config.pipeline_stages} is more than the {base['num_hidden_layers']} layers of "
            "init_from_uri"
        )
    heads = base["num_attention_heads"]
    shared = base.get("num_key_value_heads") or heads
    if not sequence_fits(sequence, heads, shared):
        raise ValueError(
            f"sequence_parallel: {sequence} does not fit the model of init_from_uri, with {heads} heads and {shared} "
            "of keys and values"
        )
    if not tensor_fits(tensor, shared, base["intermediate_size"]):
        raise ValueError(
            f"tensor_parallel: {tensor} must divide the {shared} heads of keys and values, and the intermediate_size "
            f"({base['intermediate_size']}), of the model of init_from_uri"
        )
