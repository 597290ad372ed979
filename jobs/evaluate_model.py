"""Evaluate a model on held-out text: reads model and corpus, writes report.json and report.html."""

from app.config import load_config
from app.evaluation.config import EvaluateConfig
from app.logs import job

if __name__ == "__main__":
    config = load_config(EvaluateConfig, __doc__ or "")
    with job():
        from app.evaluation import stage

        stage.run(config)
