"""One real Ray cluster for every test that needs one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from app.cluster import PRIVATE, LocalCluster, LocalClusterConfig, connect, start_local, stop_local
from tests import warm_workers

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(PRIVATE)  # before the first `import ray`
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # how soon a run's end is seen; 2 s unless set
settings.register_profile("unhurried", deadline=None)  # tests check what is done, not how fast
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A private cluster with token authentication; this process is connected to it."""
    import ray

    folder = tmp_path_factory.mktemp("cluster")
    before = dict(os.environ)
    with warm_workers.forking() as forked:
        running = start_local(LocalClusterConfig(folder=str(folder), num_cpus=4))
        os.environ.update(running.environment | forked)
        try:
            connect()
            yield running
        finally:
            ray.shutdown()
            stop_local(folder)
            os.environ.clear()
            os.environ.update(before)
