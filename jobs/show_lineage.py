"""Show from what an artifact was made, down to the raw files and rule counts; with --card, write a model card."""

from app.config import load_config
from app.logs import job
from app.pipeline.config import ShowLineageConfig

if __name__ == "__main__":
    config = load_config(ShowLineageConfig, __doc__ or "")
    with job():
        from app.pipeline import stage

        print(stage.show(config))
