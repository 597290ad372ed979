"""How many parameters a model of a config has, by part, and what a token costs: pure arithmetic on ModelConfig.

Equals what transformers makes of the config, for all families; a test compares. It knows nothing of memory or devices:
planning does.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.training.config import ModelConfig
from app.training.stages import Costs

_SMALLEST_CHUNK = 64  # a batch of smaller ones has more overhead than it saves


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of the whole model; `head` is 0 when the embeddings are tied."""

    embedding: int
    head: int
    attention: int
    mlp: int  # with experts that every token meets
    experts: int
    active_experts: int  # of `experts`, those that one token is sent to
    routers: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.active + self.experts - self.active_experts

    @property
    def active(self) -> int:
        """Those that one token meets, embeddings included: the second number in names like 30B-A3B."""
        return self.embedding + self.head + self.attention + self.mlp + self.active_experts + self.routers + self.norms

    @property
    def multiplied(self) -> int:
        """Those that one token is multiplied with: `active` without a lookup in an input embedding of its own."""
        return self.active - (self.embedding if self.head else 0)


def count_parameters(model: ModelConfig, vocab_size: int) -> Parameters:
    """Parameters of a model by part.

    >>> llama_2_7b = ModelConfig(
    ...     hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_key_value_heads=32,
    ...     tie_embeddings=False,
    ... )
    >>> count_parameters(llama_2_7b, 32_000).total
    6738415616
    """
    width, layers, sparse = model.hidden_size, model.num_layers, model.num_mixture_layers
    one_expert = 3 * width * model.moe_intermediate_size  # gate, up and down
    attention, head_norms = _latent_attention(model) if model.architecture == "deepseek_v3" else _attention(model)
    return Parameters(
        embedding=vocab_size * width,
        head=0 if model.tie_embeddings else vocab_size * width,
        attention=layers * attention,
        mlp=(layers - sparse) * 3 * width * model.intermediate_size + sparse * model.num_shared_experts * one_expert,
        experts=sparse * model.num_experts * one_expert,
        active_experts=sparse * model.experts_per_token * one_expert,
        routers=sparse * model.num_experts * width,
        norms=layers * (2 * width + head_norms) + width,
    )


def _attention(model: ModelConfig) -> tuple[int, int]:
    """Of one layer: its matrices, and the norms in it."""
    queries, keys = model.num_heads * model.head_width, model.num_key_value_heads * model.head_width
    norms = {"llama": 0, "olmo3": queries + keys}.get(model.architecture, 2 * model.head_width)
    return 2 * model.hidden_size * (queries + keys), norms


def _latent_attention(model: ModelConfig) -> tuple[int, int]:
    """The same of multi-head latent attention: down and up again for keys with values, and for queries if they have."""
    width, heads, latent = model.hidden_size, model.num_heads, model.latent
    queries = heads * latent.head_size
    down = width * (latent.key_value_rank + latent.rope_head_size)
    up = latent.key_value_rank * heads * (latent.plain_head_size + latent.value_head_size)
    asked = latent.query_rank * (width + queries) if latent.query_rank else width * queries
    return asked + down + up + width * heads * latent.value_head_size, latent.key_value_rank + latent.query_rank


def stage_costs(model: ModelConfig, vocab_size: int) -> Costs:
    """Parameters of each part that a pipeline is cut between; tied embeddings are held by the first and the last."""
    counted, width = count_parameters(model, vocab_size), model.hidden_size
    layers = counted.total - counted.embedding - counted.head - width  # the last norm goes with the head
    head = (counted.head or counted.embedding) + width
    return Costs(counted.embedding, (layers // model.num_layers,) * model.num_layers, head)


def flops_per_token(num_multiplied_parameters: int, num_layers: int, attention_width: float, seen: float) -> float:
    """Forward and backward, 6 N + 12 L Q T: PaLM, appendix B (arXiv:2204.02311); recomputation is not counted.

    Q is the heads' number times their width (of keys and values the mean), mostly the hidden size; T is the length of
    a block, or its `seen_tokens`.

    >>> flops_per_token(7_000_000, 6, 256, 1024)
    60874368.0
    """
    return 6.0 * num_multiplied_parameters + 12.0 * num_layers * attention_width * seen


def seen_tokens(block_tokens: int, num_layers: int, num_local_layers: int, local_tokens: float) -> float:
    """Length of a block as attention meets it, the mean over layers, by PaLM's count.

    That count takes a causal layer for one that sees the block to both sides, so a window, or what a token sees of
    chosen blocks, counts twice itself, and never more than the block. The choice of blocks is not counted.

    >>> seen_tokens(4096, 4, 3, 512)
    1792.0
    """
    local = min(block_tokens, 2 * local_tokens)
    return (num_local_layers * local + (num_layers - num_local_layers) * block_tokens) / num_layers


def chunk_tokens(window: int) -> int:
    """Queries that attention to a window takes at once, each chunk with the W + C keys that its window reaches.

    Half the window, so that no more than a third of the scores is in vain.

    >>> [chunk_tokens(window) for window in (4, 100, 512)]
    [4, 64, 256]
    """
    return min(window, max(_SMALLEST_CHUNK, window // 2))
