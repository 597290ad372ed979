"""Deploy a model artifact at the OpenAI-compatible endpoint (`serve deploy serve_config.yaml`) and wait for it."""

from app.config import load_config
from app.logs import job
from app.serving.config import DeployConfig

if __name__ == "__main__":
    config = load_config(DeployConfig, __doc__ or "")
    with job():
        from app.serving import stage

        stage.run(config)
