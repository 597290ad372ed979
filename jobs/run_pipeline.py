"""Run every stage from raw text to the endpoint, in order, and print a summary table."""

from app.config import load_config
from app.logs import job
from app.pipeline.config import PipelineConfig

if __name__ == "__main__":
    config = load_config(PipelineConfig, __doc__ or "")
    with job():
        from app.pipeline import stage

        print(f"\n{stage.run(config)}", flush=True)
