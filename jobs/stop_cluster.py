"""Stop the private Ray cluster of this machine and remove what it left in /tmp."""

from pathlib import Path

from app.cluster import LocalClusterConfig, stop_local
from app.config import load_config
from app.logs import job

if __name__ == "__main__":
    config = load_config(LocalClusterConfig, __doc__ or "")
    with job():
        stopped = stop_local(Path(config.folder))
        print("stopped" if stopped else f"no cluster runs in {config.folder}")
