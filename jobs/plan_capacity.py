"""Estimate memory, time and storage of a training job: does it fit the devices, and if not, what helps. No cluster."""

from app.config import load_config
from app.logs import job
from app.planning.config import PlanConfig

if __name__ == "__main__":
    config = load_config(PlanConfig, __doc__ or "")
    with job():
        from app.planning import stage

        capacity = stage.run(config)
        print(capacity.text, flush=True)
        if capacity.misfit:
            raise ValueError(capacity.misfit)
