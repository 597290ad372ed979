"""Settings of the training stage."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from app.config import Config, RunConfig

MIXTURES = ("qwen3_moe", "deepseek_v3")


class LatentConfig(Config):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, 2.1): keys and values come from one narrow
    vector of each token, and a part of each head alone carries the position.
    """

    key_value_rank: int = Field(0, ge=0, description="width of what keys and values are made from, and of the cache")
    query_rank: int = Field(0, ge=0, description="width of what queries are made from; 0: from the residual stream")
    rope_head_size: int = Field(0, ge=0, multiple_of=2, description="of a query or key, the part with the position")
    plain_head_size: int = Field(0, ge=0, description="of a query or key, the part without a position")
    value_head_size: int = Field(0, ge=0, description="width of a head's value")

    @property
    def head_size(self) -> int:
        """Width of a query or key."""
        return self.rope_head_size + self.plain_head_size

    @property
    def needed(self) -> tuple[int, ...]:
        """The sizes that such attention cannot be without."""
        return self.key_value_rank, self.rope_head_size, self.plain_head_size, self.value_head_size


class ModelConfig(Config):
    """A decoder of one of five families; vocabulary and context come from the tokens artifact."""

    architecture: Literal["llama", "qwen3", "qwen3_moe", "deepseek_v3", "olmo3"] = Field(
        "llama",
        description="qwen3: queries and keys are normalised, layers may see chosen blocks only; qwen3_moe: a mixture "
        "of experts in every layer; deepseek_v3: one with shared experts, a bias that evens out the load and latent "
        "attention; olmo3: layers may see a window only",
    )
    hidden_size: int = Field(256, ge=32, description="width of the residual stream")
    intermediate_size: int = Field(768, ge=32, description="width of the SwiGLU layer of a layer without experts")
    num_layers: int = Field(6, ge=1, description="decoder layers")
    num_heads: int = Field(8, ge=1, description="query heads; vLLM on a CPU wants head size 32 or more")
    num_key_value_heads: int = Field(
        4, ge=1, description="key and value heads (grouped-query attention); deepseek_v3 does not use it"
    )
    head_size: int = Field(0, ge=0, description="width of a head; 0: hidden_size / num_heads")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary position embedding")
    tie_embeddings: bool = Field(True, description="share the input and output embedding")
    num_experts: int = Field(0, ge=0, description="experts of a layer that tokens are sent to; of a mixture")
    experts_per_token: int = Field(0, ge=0, description="experts that a token is sent to; of a mixture")
    moe_intermediate_size: int = Field(0, ge=0, description="width of one expert's SwiGLU layer; of a mixture")
    router_aux_loss_coefficient: float = Field(
        1e-3, ge=0, description="weight of the loss that evens out expert load; deepseek_v3 has a bias for that"
    )
    norm_topk_prob: bool = Field(True, description="the weights of a token's experts sum to 1")
    num_shared_experts: int = Field(
        0, ge=0, description="experts beside those, that every token meets; for deepseek_v3"
    )
    num_dense_layers: int = Field(0, ge=0, description="first layers, without experts; for deepseek_v3")
    routed_scaling_factor: float = Field(1.0, gt=0, description="on the weights of a token's experts; for deepseek_v3")
    latent: LatentConfig = LatentConfig()
    sliding_window_tokens: int = Field(
        0, ge=0, description="a token sees itself and those before it, so many in all; 0: all before it. For olmo3"
    )
    attention_block_tokens: int = Field(
        0, ge=0, description="a token sees blocks of so many, chosen by what is in them; 0: all before it. For qwen3"
    )
    attention_blocks: int = Field(
        0, ge=0, description="blocks that a token sees in each head, its own and the best before it; 2 or more"
    )
    global_every: int = Field(
        0, ge=0, description="with a window or blocks: every n-th layer sees all, as the last of n; 0: none does"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.architecture == "deepseek_v3":  # its heads have sizes of their own, and all have keys and values
            return self
        if (not self.head_size and self.hidden_size % self.num_heads) or self.num_heads % self.num_key_value_heads:
            raise ValueError("num_heads must divide hidden_size, and num_key_value_heads must divide num_heads")
        return self

    @model_validator(mode="after")
    def _experts_belong(self) -> ModelConfig:
        sizes = (self.num_experts, self.experts_per_token, self.moe_intermediate_size)
        if self.architecture not in MIXTURES and any(sizes):
            raise ValueError(
                f"num_experts, experts_per_token and moe_intermediate_size need architecture {' or '.join(MIXTURES)} "
                f"(it is {self.architecture})"
            )
        if self.architecture in MIXTURES and not (all(sizes) and self.experts_per_token <= self.num_experts):
            raise ValueError(
                f"architecture {self.architecture} needs num_experts, moe_intermediate_size and an experts_per_token "
                "of at most num_experts"
            )
        return self

    @model_validator(mode="after")
    def _latent_belongs(self) -> ModelConfig:
        scaled, latent = self.routed_scaling_factor != 1, (*self.latent.needed, self.latent.query_rank)
        if self.architecture != "deepseek_v3":
            if self.num_shared_experts or self.num_dense_layers or scaled or any(latent):
                raise ValueError(
                    "num_shared_experts, num_dense_layers, routed_scaling_factor and latent need architecture "
                    f"deepseek_v3 (it is {self.architecture})"
                )
            return self
        if not (self.num_shared_experts and all(self.latent.needed)):
            raise ValueError(
                "architecture deepseek_v3 needs num_shared_experts and, of latent, key_value_rank, rope_head_size, "
                "plain_head_size and value_head_size"
            )
        if self.head_size:
            raise ValueError("head_size: deepseek_v3 takes latent.rope_head_size and the other sizes of latent")
        if self.num_experts < 2 or self.num_dense_layers >= self.num_layers:
            raise ValueError(
                "architecture deepseek_v3 needs 2 num_experts or more, and num_dense_layers below num_layers"
            )
        return self

    @model_validator(mode="after")
    def _windows_belong(self) -> ModelConfig:
        if self.sliding_window_tokens and self.architecture != "olmo3":
            raise ValueError(
                f"sliding_window_tokens needs architecture olmo3 (it is {self.architecture}): of a llama or qwen3 with "
                "windows in some layers transformers and vLLM compute different answers"
            )
        if self.global_every and not self.local_tokens:
            raise ValueError(
                "global_every needs sliding_window_tokens or attention_block_tokens: without them every layer sees all"
            )
        return self

    @model_validator(mode="after")
    def _blocks_belong(self) -> ModelConfig:
        if bool(self.attention_block_tokens) != bool(self.attention_blocks) or self.attention_blocks == 1:
            raise ValueError(
                "attention_block_tokens and attention_blocks belong together: set both, attention_blocks to 2 or more "
                "(a token's own block is one), or none"
            )
        if self.attention_block_tokens and self.architecture != "qwen3":
            raise ValueError(f"attention_block_tokens needs architecture qwen3 (it is {self.architecture})")
        return self

    @property
    def num_local_layers(self) -> int:
        """Layers that see a window or chosen blocks only."""
        if not self.local_tokens:
            return 0
        return self.num_layers - (self.num_layers // self.global_every if self.global_every else 0)

    @property
    def local_tokens(self) -> float:
        """Tokens that one sees in such a layer: of its own block half, as a mean; 0 without such layers."""
        if self.attention_block_tokens:
            return (self.attention_blocks - 0.5) * self.attention_block_tokens
        return self.sliding_window_tokens

    @property
    def num_mixture_layers(self) -> int:
        """Layers with a mixture of experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def head_width(self) -> int:
        """Width of one attention head, where keys and values are equally wide."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def attention_width(self) -> float:
        """All heads together, as attention's products meet them: the mean of a key's and a value's width."""
        if self.architecture == "deepseek_v3":
            return self.num_heads * (self.latent.head_size + self.latent.value_head_size) / 2
        return self.num_heads * self.head_width


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule: linear warm-up, then down to a share of the peak."""

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    found_at_hidden_size: int = Field(
        0,
        ge=0,
        description="width of the model that learning_rate suited: matrices of a wider one take less; 0: not so",
    )
    schedule: Literal["cosine", "warmup_stable_decay"] = Field(
        "cosine", description="after the warm-up: a half cosine, or the peak and a linear decay at the end"
    )
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="warmup_stable_decay: share of all steps that decay")
    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the end, over the peak")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; not on vectors and embeddings")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    gradient_clipping: float = Field(1.0, gt=0, description="largest global gradient norm")
    router_bias_rate: float = Field(
        1e-3, ge=0, description="deepseek_v3: how far a step moves each router's bias against the load; 0: not at all"
    )


class ReplayConfig(Config):
    """Text of an earlier corpus mixed into continued pretraining, against forgetting (Ibrahim et al. 2024,
    arXiv:2403.08763); its held-out blocks are scored too.
    """

    tokens_uri: str = Field("", description="tokens artifact of the old corpus, packed with the same tokenizer")
    share: float = Field(0.0, ge=0, lt=1, description="share of each batch that comes from it")


class AdapterConfig(Config):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): small matrices beside frozen weights are trained, not the weights.

    QLoRA (Dettmers et al. 2023, arXiv:2305.14314) where the frozen ones are kept in 4 bits.
    """

    rank: int = Field(0, ge=0, description="of the matrices; 0: no adapter, all weights are trained")
    alpha: float = Field(16.0, gt=0, description="their output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what goes into them, in training")
    target_modules: tuple[str, ...] = Field(
        ("all-linear",), min_length=1, description="names of layers that get one; all-linear: all but the output"
    )
    merge: bool = Field(False, description="write the whole model with the adapter added, not the adapter alone")
    load_in_4bit: bool = Field(
        False, description="keep the frozen weights in NF4 while training (QLoRA); what is merged into is whole"
    )


class PreferenceConfig(Config):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), where tokens are pairs of answers."""

    beta: float = Field(0.1, gt=0, description="how strongly the model is held to what it was before")


class CorrectionConfig(Config):
    """When a run goes back to its last good checkpoint and skips the data since (PaLM, arXiv:2204.02311, 5.1)."""

    max_rewinds: int = Field(3, ge=0, description="how often; then the run stops with an error. 0: stop at once")
    spike_score: float = Field(8.0, ge=0, description="robust z-score of the loss that counts as a spike; 0: only NaN")
    window_steps: int = Field(64, ge=8, description="steps before, whose median and deviation the score is taken from")


class AlarmConfig(Config):
    """Levels that a warning is given at, when the median over the window passes them."""

    window_steps: int = Field(20, ge=1, description="steps that the median is taken over")
    gpu_utilization: float = Field(0.9, ge=0, le=1, description="warn below; only where there is a GPU")
    communication_share: float = Field(0.05, ge=0, le=1, description="warn above; share of the step time")
    grad_norm: float = Field(100.0, gt=0, description="warn above; before clipping")


class TrainConfig(RunConfig):
    """Settings of `train_model`."""

    tokens_uri: str = Field("tokens", description="tokens artifact")
    tokenizer_uri: str = Field("tokenizer", description="what the tokens were packed with; copied into the model")
    checkpoints_uri: str = Field("checkpoints", description="training's private folder; a rerun resumes from it")
    output_uri: str = Field(
        "model", description="where the model goes, in the Hugging Face layout; or the adapter, in PEFT's"
    )
    model: ModelConfig = ModelConfig()
    init_from_uri: str = Field("", description="continue from this Hugging Face folder instead; `model` is not used")
    replay: ReplayConfig = ReplayConfig()
    adapter: AdapterConfig = AdapterConfig()
    preference: PreferenceConfig = PreferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    num_steps: int = Field(300, ge=1, description="optimizer steps")
    stop_at_step: int = Field(0, ge=0, description="leave here after a checkpoint, to go on later; 0: at the end only")
    global_batch_sequences: int = Field(32, ge=1, description="token blocks in one optimizer step, over all workers")
    micro_batch_sequences: int = Field(8, ge=1, description="token blocks in one forward pass of one worker")
    num_workers: int = Field(2, ge=1, description="Ray Train workers: one GPU each, or one CPU where there is no GPU")
    sequence_parallel: int = Field(
        1, ge=1, description="workers that share one block's tokens (Ulysses); the others share out the batch"
    )
    tensor_parallel: int = Field(1, ge=1, description="workers that share each layer's matrices; ZeRO 0 to 2")
    pipeline_stages: int = Field(1, ge=1, description="workers that share out one model's layers; ZeRO-1")
    min_workers: int = Field(0, ge=0, description="go on with so few when nodes are lost; 0: wait for num_workers")
    resize_check_seconds: float = Field(60.0, gt=0, description="how often min_workers < n looks for new nodes")
    document_masking: bool = Field(False, description="a document does not see others in its block")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "sdpa", description="implementation in transformers; flash_attention_2 needs a GPU and flash-attn"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="DeepSpeed ZeRO stage")
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where its states are kept")
    offload_parameters: Literal["none", "cpu"] = Field("none", description="where ZeRO-3's shards of them are kept")
    nvme_dir: str = Field("", description="folder on a fast local disk, for offload_optimizer nvme")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 for GPUs; it is slow on most CPUs")
    float8: Literal["none", "tensorwise", "rowwise"] = Field(
        "none",
        description="products of linear layers in FP8, a scale for each tensor or for each row; for Ada, Hopper and "
        "later, with compile; on a CPU its numbers alone",
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool = Field(False, description="torch.compile the model; needs a C++ compiler on CPUs")
    seed: int = Field(0, ge=0, description="of initial weights and data order")
    checkpoint_interval_steps: int = Field(50, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many are kept, besides the best one")
    evaluation_interval_steps: int = Field(50, ge=1, description="steps between held-out evaluations")
    validation: Literal["inline", "async"] = Field(
        "inline", description="inline: the workers score; async: a Ray task scores checkpoints while they go on"
    )
    export: Literal["best", "last"] = Field("best", description="which of the kept checkpoints becomes the model")
    correction: CorrectionConfig = CorrectionConfig()
    alarms: AlarmConfig = AlarmConfig()
    max_failures: int = Field(5, ge=-1, description="worker failures to recover from; -1 for any number")
    cache_dir: str = Field("/tmp/zero-to-one", description="local folder of each node for decoded token blocks")
    wandb_mode: Literal["offline", "online", "disabled"] = Field("offline", description="online needs WANDB_API_KEY")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.global_batch_sequences < self.num_replicas(self.num_workers):
            over = f" / {self.workers_per_replica} that share a batch" if self.workers_per_replica > 1 else ""
            raise ValueError(
                f"global_batch_sequences ({self.global_batch_sequences}) must not be below num_workers "
                f"({self.num_workers}){over}"
            )
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not exceed num_workers ({self.num_workers})")
        if bool(self.replay.tokens_uri) != (self.replay.share > 0):
            raise ValueError("replay.tokens_uri and replay.share belong together: set both or none")
        if self.adapter.rank and not self.init_from_uri:
            raise ValueError("adapter.rank: an adapter needs a model below it: set init_from_uri")
        if self.adapter.rank and self.optimizer.found_at_hidden_size:
            raise ValueError("optimizer.found_at_hidden_size: says nothing of an adapter's matrices; leave it 0")
        if (self.adapter.merge or self.adapter.load_in_4bit) and not self.adapter.rank:
            raise ValueError("adapter.merge, adapter.load_in_4bit: there is no adapter; set adapter.rank")
        if (self.offload_optimizer == "nvme") != bool(self.nvme_dir):
            raise ValueError("offload_optimizer nvme and nvme_dir belong together: set both or none")
        if self.nvme_dir and not self.nvme_dir.startswith("/"):
            raise ValueError(f"nvme_dir: {self.nvme_dir!r} must be absolute: workers run in folders of their own")
        return self

    @property
    def workers_per_replica(self) -> int:
        """Workers that see the same blocks: they share one forward pass."""
        return self.sequence_parallel * self.tensor_parallel * self.pipeline_stages

    def num_replicas(self, num_workers: int) -> int:
        """The data-parallel degree: in how many parts the batch is shared out; 1 where the degrees do not divide."""
        return max(1, num_workers // self.workers_per_replica)

    def accumulation_steps(self, num_workers: int) -> int:
        """Forward passes of each worker in one optimizer step; the last may be filled up with rows of no weight."""
        rows = math.ceil(self.global_batch_sequences / self.num_replicas(num_workers))
        return math.ceil(rows / self.micro_batch_sequences)

    @property
    def kind(self) -> Literal["model", "adapter"]:
        """Of the artifact that is made."""
        return "adapter" if self.adapter.rank and not self.adapter.merge else "model"

    def plan(self) -> list[str]:
        """Workers, steps and where the checkpoints are."""
        from app.artifacts import states  # fsspec is not needed to answer --help
        from app.training.stages import describe_schedule

        method = "QLoRA" if self.adapter.load_in_4bit else "LoRA"
        what = f"{method} of rank {self.adapter.rank} on {self.init_from_uri}" if self.adapter.rank else "all weights"
        return [
            f"train {what}: {self.num_steps} steps of {self.global_batch_sequences} blocks on {self.num_workers} "
            f"workers, ZeRO-{self.zero_stage}, {self.accumulation_steps(self.num_workers)} forward passes a step",
            *describe_schedule(self.pipeline_stages, self.num_workers, self.accumulation_steps(self.num_workers)),
            f"resume from the newest checkpoint in {self.resolve(self.checkpoints_uri)}, if any",
            *states(self),
        ]
