"""Quantize a model to 4-bit AWQ with llm-compressor: reads model and corpus, writes a smaller model."""

from app.config import load_config
from app.logs import job
from app.quantization.config import QuantizeConfig

if __name__ == "__main__":
    config = load_config(QuantizeConfig, __doc__ or "")
    with job():
        from app.quantization import stage

        stage.run(config)
