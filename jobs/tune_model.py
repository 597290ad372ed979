"""Search training settings with Ray Tune: trials are real training runs; writes a report and the best config."""

from app.config import load_config
from app.logs import job
from app.tuning.config import TuneConfig

if __name__ == "__main__":
    config = load_config(TuneConfig, __doc__ or "")
    with job():
        from app.tuning import stage

        stage.run(config)
