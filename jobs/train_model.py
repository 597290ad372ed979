"""Pretrain a Llama, Qwen3 or Qwen3-MoE with DeepSpeed on Ray Train workers: reads tokens, writes the model."""

from app.config import load_config
from app.logs import job
from app.training.config import TrainConfig

if __name__ == "__main__":
    config = load_config(TrainConfig, __doc__ or "")
    with job():
        from app.training import stage

        stage.run(config)
