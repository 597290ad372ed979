"""The DeepSpeed config of a training run: a pure function of TrainConfig.

ZeRO after Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054). The optimizer and the learning rate are not in
it: the loop owns both.
"""

from __future__ import annotations

from typing import Any

from app.training.config import TrainConfig

SUB_GROUP_ELEMENTS = 100_000_000  # that ZeRO-3 updates at a time: with a disk it has five buffers in memory for so many


def deepspeed_config(config: TrainConfig, world_size: int, use_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` takes. Buckets follow the model's width, so that a small model stays small."""
    elements = config.model.hidden_size**2
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": use_gpu and config.pipeline_stages == 1,  # its hooks would reduce before the last micro-batch
        "contiguous_gradients": True,
        "reduce_bucket_size": max(elements, 1_000_000),
        "sub_group_size": SUB_GROUP_ELEMENTS,  # alike with a disk and without: a checkpoint is in these parts
        "stage3_prefetch_bucket_size": max(elements, 1_000_000),
        "stage3_param_persistence_threshold": 10 * config.model.hidden_size,  # norms stay whole, matrices do not
        "memory_efficient_linear": use_gpu,  # a linear layer in Python: the same numbers, a third slower on a CPU
    }
    for key, device in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if device != "none":
            where = {"nvme_path": config.nvme_dir} if device == "nvme" else {}
            zero[key] = {"device": device, "pin_memory": use_gpu, **where}
    made = {
        "train_micro_batch_size_per_gpu": config.micro_batch_sequences,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: no operator to compile
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on offloaded states, too: DeepSpeed's needs a compiler
        "zero_optimization": zero,
    }
    if config.tensor_parallel > 1:  # tied embeddings stay whole: logits are, too, and the loss is transformers' own
        made["tensor_parallel"] = {"autotp_size": config.tensor_parallel, "vocab_parallel_lm_head": False}
    return made
