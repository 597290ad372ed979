"""Settings of the capacity plan."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.config import Config
from app.training.config import TrainConfig


class PlanConfig(Config):
    """Settings of `plan_capacity`: a training job, its data and the devices that it is meant for."""

    train_model: TrainConfig = Field(TrainConfig(), description="the training job; usually the file train_model.yaml")
    vocab_size: int = Field(64_000, ge=1, description="tokens of the tokenizer")
    block_tokens: int = Field(4096, ge=2, description="tokens of a block")
    tokens: int = Field(0, ge=0, description="tokens to train on; 0: as many as the job's steps take")
    device: Literal["A100-40GB", "A100-80GB", "H100", "H200", "L40S", "CPU"] = Field(
        "A100-80GB", description="kind of device; CPU: memory only, no time"
    )
    device_memory_gib: float = Field(0.0, ge=0, description="memory of a device; 0: what this kind has")
    num_devices: int = Field(0, ge=0, description="devices in all; 0: the job's num_workers")
    devices_per_node: int = Field(8, ge=1, description="devices of one machine, which share its memory")
    reserve_share: float = Field(0.1, ge=0, lt=1, description="memory left to CUDA, NCCL and gaps between tensors")
    mfu: float = Field(0.4, gt=0, le=1, description="model FLOPs utilization to reckon with")

    @model_validator(mode="after")
    def _memory_is_known(self) -> PlanConfig:
        if self.device == "CPU" and not self.device_memory_gib:
            raise ValueError("device CPU needs device_memory_gib: the memory that one worker may take")
        return self

    def plan(self) -> list[str]:
        """What is estimated."""
        train = self.train_model
        return [f"estimate {self.num_devices or train.num_workers} × {self.device} for {train.num_steps} steps"]
