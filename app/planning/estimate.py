"""What a training job takes: memory of a device and of its host, FLOPs, days, checkpoints, and what serving takes.

States after Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3.1) as DeepSpeed 0.19 keeps them; activations
counted as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), for the tensors that autograd keeps of
transformers' layers with an attention that stores no score matrix. Pure arithmetic; it measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.planning.parts import Part, parts_of
from app.training.config import ModelConfig, TrainConfig
from app.training.sizes import Parameters, chunk_tokens, count_parameters, flops_per_token, seen_tokens
from app.training.zero import SUB_GROUP_ELEMENTS

GIB = 1 << 30
_LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
_TILE_ROWS = 64  # app/block_attention.py's; that it is imports torch
_INT4_BYTES = 0.5 + 2.5 / 128  # 4 bits, and of each group of 128 a 16-bit scale and a 4-bit zero point


@dataclass(frozen=True)
class Shape:
    """What the tokens say: size of the vocabulary and length of a block."""

    vocab_size: int
    block_tokens: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step, by what they hold; `host` is on the machine's side."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float  # weights gathered for the layer at work, gradients on their way, float32 copies in the update
    host: float

    @property
    def device(self) -> float:
        """All of it but `host`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


def memory_of(config: TrainConfig, shape: Shape, num_devices: int) -> Memory:
    """Memory of each of `num_devices` workers; of a pipeline's, of those whose stage takes most.

    The optimizer works when the activations are gone: the larger of the two moments counts.
    """
    parts = (_memory_of(part, shape, num_devices) for part in parts_of(config, shape.vocab_size, num_devices))
    return max(parts, key=lambda memory: memory.device)


def _memory_of(part: Part, shape: Shape, num_devices: int) -> Memory:
    config, parameters = part.config, part.parameters
    holders = num_devices // (config.tensor_parallel * config.pipeline_stages)  # of the part: ZeRO divides it up
    weights, gradients, optimizer, host = _states(config, parameters.total, holders)
    tokens = config.micro_batch_sequences * shape.block_tokens / config.sequence_parallel
    activations = tokens * activation_bytes_per_token(part, shape)
    each = 10.0 if config.dtype == "bfloat16" else 8.0  # with their float32 copies
    logits = tokens * shape.vocab_size * each if part.is_last else 0.0
    moving = _moving(config, parameters, holders)
    update = _update(config, parameters.total, holders)
    buffers = max(moving, update - activations - logits)
    return Memory(weights, gradients, optimizer, activations, logits, buffers, host)


def _element_bytes(config: TrainConfig) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def _states(config: TrainConfig, total: int, num_devices: int) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer states on the device, and of what is offloaded to its host.

    AdamW keeps two moments, and ZeRO a float32 copy of the weights, also of float32 ones.
    """
    size, stage = _element_bytes(config), config.zero_stage
    weights = size * total / (num_devices if stage == 3 else 1)
    gradients = size * total / (num_devices if stage >= 2 else 1)
    optimizer = 12 * total / num_devices if stage else 8.0 * total
    on_host = 0.0
    if stage == 3 and config.offload_parameters == "cpu":
        weights, on_host = 0.0, weights
    if config.offload_optimizer == "none" or not stage:
        return weights, gradients, optimizer, on_host
    kept = gradients if stage == 1 else 0.0  # from stage 2 on the gradients go to the host as they come
    on_host += 4 * total / num_devices + (optimizer if config.offload_optimizer == "cpu" else 0.0)
    return weights, kept, 0.0, on_host


def _moving(config: TrainConfig, parameters: Parameters, num_devices: int) -> float:
    """Bytes of what is whole for a while during the forward and backward pass."""
    size, stage, model = _element_bytes(config), config.zero_stage, config.model
    if not stage or (num_devices == 1 and config.offload_parameters == "none"):
        return 0.0
    layer = (parameters.attention + parameters.mlp) / model.num_layers
    layer += (parameters.experts + parameters.routers) / max(1, model.num_mixture_layers)
    largest = max(layer, parameters.embedding)
    bucket = max(model.hidden_size**2, 1_000_000)
    gathered = min(parameters.total, _LIVE_ELEMENTS + largest) if stage == 3 else 0.0
    arriving = largest if stage >= 2 else 0.0  # gradients before they are divided up
    return size * (gathered + arriving + 2 * bucket)


def _update(config: TrainConfig, total: int, num_devices: int) -> float:
    """Bytes that the update takes beside the states: the gradients once more in float32."""
    if not config.zero_stage or config.offload_optimizer != "none":
        return 0.0
    shard = total / num_devices
    return 4 * (min(shard, SUB_GROUP_ELEMENTS) if config.zero_stage == 3 else shard)


def activation_bytes_per_token(part: Part, shape: Shape) -> float:
    """Bytes that autograd keeps of one of the worker's tokens until the backward pass, without the logits."""
    return _layers_bytes(part, shape) + _ends_bytes(part)


def _layers_bytes(part: Part, shape: Shape) -> float:
    """Of the layers, for all passes that await their way back; what is recomputed, of one layer at a time."""
    config, passes = part.config, part.passes
    size, model = _element_bytes(config), config.model
    plain, mixture = (_attention_bytes(config, shape) + kept for kept in (_mlp_bytes(config), _experts_bytes(config)))
    sparse = model.num_mixture_layers
    if config.activation_checkpointing:
        layer = max(plain, mixture) if 0 < sparse < model.num_layers else mixture if sparse else plain
        return passes * size * model.num_layers * model.hidden_size + layer
    return passes * ((model.num_layers - sparse) * plain + sparse * mixture)


def _ends_bytes(part: Part) -> float:
    """The final norm and the input of the head; between stages what went out, and what has come in in 16 bits."""
    size, width = _element_bytes(part.config), part.config.model.hidden_size
    head = width * (size + 4) + width * size if part.is_last else 0
    arrived = not part.is_first and size == 2 and not part.config.activation_checkpointing  # else a layer keeps it
    return head + part.passes * size * width * (arrived + (not part.is_last))


def _attention_bytes(config: TrainConfig, shape: Shape) -> float:
    """Of one layer: two norms with a float32 copy each, and attention."""
    size, model = _element_bytes(config), config.model
    width = model.hidden_size
    kept = 4 if model.architecture == "olmo3" else size  # of what is normalised: it is weighted in float32
    norms = 2 * width * (4 + kept + size)  # the float32 input, the normalised, the result that the linear layers read
    scores = model.num_heads * shape.block_tokens * (4 + size) if config.attention == "eager" else 0
    scores += 4 * model.num_heads  # the log-sum-exp; of eager attention the float32 softmax and its copy
    if model.architecture == "deepseek_v3":
        return float(norms + scores + _latent_bytes(config))
    queries, keys = model.num_heads * model.head_width, model.num_key_value_heads * model.head_width
    attention = float(size * (2 * queries + 2 * keys))  # q, k, v, the result
    if config.sequence_parallel > 1:  # the result of its heads, and that of its tokens
        repeated = max(1, config.sequence_parallel // model.num_key_value_heads)
        attention += size * (queries + 2 * keys * (repeated - 1))
    attention += (_chunk_bytes(config, shape) + _choice_bytes(config, shape)) / model.num_layers
    if model.architecture != "llama":
        attention += (queries + keys) * (4 + kept)
    return norms + scores + attention


def _latent_bytes(config: TrainConfig) -> int:
    """What multi-head latent attention keeps, by a kernel that takes values of another width than keys.

    Queries, keys, the product of the latent vector that the values are a part of, the result and a copy of it in the
    order of tokens; of the latent vectors what a norm keeps.
    """
    size, model, latent = _element_bytes(config), config.model, config.model.latent
    heads = 2 * latent.head_size + latent.plain_head_size + 3 * latent.value_head_size
    beside = latent.rope_head_size * (4 if size == 4 else 0)  # it is in one tensor with what is normalised
    return size * model.num_heads * heads + (latent.key_value_rank + latent.query_rank) * (4 + 2 * size) + beside


def _mlp_bytes(config: TrainConfig) -> float:
    return float(_element_bytes(config) * 4 * config.model.intermediate_size)  # gate, its SiLU, up, their product


def _experts_bytes(config: TrainConfig) -> float:
    size, model = _element_bytes(config), config.model
    each = size * (2 * model.hidden_size + 4 * model.moe_intermediate_size)
    routing = 4 * 2 * model.num_experts  # float32 probabilities, for the choice and for the balancing loss
    if model.architecture == "deepseek_v3" and size == 2:
        routing += 4 * model.hidden_size  # its router reads a float32 copy
    shared = size * 4 * model.moe_intermediate_size * model.num_shared_experts
    return model.experts_per_token * each + routing + shared


def _chunk_bytes(config: TrainConfig, shape: Shape) -> float:
    """What all layers with a window keep of one token beyond those without, computed by chunks: local_attention.py.

    A chunk's keys and values with those before it, the last chunk filled up, the result once more in order, one mask.
    """
    size, model, window = _element_bytes(config), config.model, config.model.sliding_window_tokens
    if config.attention != "sdpa" or not window or not model.num_local_layers or window >= shape.block_tokens:
        return 0.0
    queries, keys = model.num_heads * model.head_width, model.num_key_value_heads * model.head_width
    chunk = chunk_tokens(window)
    filled = -(-shape.block_tokens // chunk) * chunk / shape.block_tokens
    again = queries * (2 * filled - 1) + 2 * keys * (filled * (1 + window / chunk) - 1)
    return size * (model.num_local_layers * again + filled * (window + chunk))


def _choice_bytes(config: TrainConfig, shape: Shape) -> float:
    """What all layers that choose blocks keep of one token beyond those that do not: block_attention.py.

    The result once more in order, all filled up to whole blocks, and in 64 bits where in the tiles a query is and which
    query is there; on average half a tile of each block is empty.
    """
    size, model, tokens = _element_bytes(config), config.model, config.model.attention_block_tokens
    if not tokens or tokens * model.attention_blocks >= shape.block_tokens:
        return 0.0
    queries, keys = model.num_heads * model.head_width, model.num_key_value_heads * model.head_width
    filled = -(-shape.block_tokens // tokens) * tokens / shape.block_tokens
    again = queries + (2 * queries + 2 * keys) * (filled - 1)
    pairs = model.num_heads * (model.attention_blocks - 1)
    places = pairs * (filled + 1) + _TILE_ROWS / 2 * model.num_key_value_heads / tokens
    return model.num_local_layers * (size * again + 8 * places)


def training_flops(config: TrainConfig, shape: Shape) -> float:
    """FLOPs of one token, forward and backward."""
    model = config.model
    multiplied = count_parameters(model, shape.vocab_size).multiplied
    seen = seen_tokens(shape.block_tokens, model.num_layers, model.num_local_layers, model.local_tokens)
    return flops_per_token(multiplied, model.num_layers, model.attention_width, seen)


def training_days(flops: float, num_devices: int, peak_flops: float, mfu: float) -> float:
    """Days for so many FLOPs at a model FLOPs utilization.

    >>> round(training_days(6 * 7e9 * 1e12, 64, 312e12, 0.5), 1)
    48.7
    """
    return flops / (num_devices * peak_flops * mfu) / 86_400


def checkpoint_bytes(config: TrainConfig, total: int) -> float:
    """One checkpoint of all workers: the float32 weights and two moments; below ZeRO-3 the weights at work, too."""
    states = 12.0 if config.zero_stage else 8.0
    return total * (states + (_element_bytes(config) if config.zero_stage < 3 else 0))


def key_value_bytes_per_token(model: ModelConfig) -> int:
    """Key-value cache of one token in 16 bits.

    >>> key_value_bytes_per_token(ModelConfig(hidden_size=4096, num_layers=32, num_heads=32, num_key_value_heads=8))
    131072
    """
    if model.architecture == "deepseek_v3":  # what keys and values are made from
        return 2 * model.num_layers * (model.latent.key_value_rank + model.latent.rope_head_size)
    return 2 * 2 * model.num_layers * model.num_key_value_heads * model.head_width


def serving_bytes(model: ModelConfig, vocab_size: int, quantized: bool) -> float:
    """Weights of a served model: in 16 bits, or with its linear layers in 4 (AWQ, groups of 128)."""
    parameters = count_parameters(model, vocab_size)
    linear = parameters.attention + parameters.mlp + parameters.experts
    return 2.0 * (parameters.total - linear) + linear * (_INT4_BYTES if quantized else 2.0)
