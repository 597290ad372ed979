"""Start a private Ray cluster on this machine: token authentication, loopback only, dashboard up."""

from app.cluster import LocalClusterConfig, start_local
from app.config import load_config
from app.logs import job

if __name__ == "__main__":
    config = load_config(LocalClusterConfig, __doc__ or "")
    with job():
        cluster = start_local(config)
        print(f"Ray dashboard {cluster.dashboard_url} (token: {cluster.folder}/token); `source {cluster.folder}/env`")
