"""Compare what the live endpoint says with what its model says elsewhere; a gate: exits with 2 when it fails."""

from app.config import load_config
from app.evaluation.config import ParityConfig
from app.logs import job

if __name__ == "__main__":
    config = load_config(ParityConfig, __doc__ or "")
    with job():
        from app.evaluation import served

        served.run(config)
