import stat
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from app import cluster
from app.cluster import LocalCluster, LocalClusterConfig, find_local, start_local, stop_local
from tests.listening import assert_private

ROOT = Path(__file__).resolve().parent.parent


def test_ray_cluster_yaml_passes_rays_own_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    validate_config(config)
    broken = {**config, "max_workerz": 1}
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(broken)


def test_a_dead_process_or_a_reused_pid_is_not_our_cluster(tmp_path: Path) -> None:
    assert find_local(tmp_path) is None
    record = LocalCluster(
        pid=1, address="a:1", dashboard_url="http://a", endpoint_port=1, folder=tmp_path, temp_dir=tmp_path / "t"
    )
    (tmp_path / "cluster.json").write_text(record.model_dump_json())
    assert find_local(tmp_path) is None
    assert stop_local(tmp_path) is False
    assert not (tmp_path / "cluster.json").exists()


@pytest.mark.parametrize(("said", "times"), [(f"{cluster.GAVE_UP} for node_id=1.", 2), ("no such option", 1)])
def test_a_slow_start_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, times: int) -> None:
    starts = []

    def command(*given: object) -> list[str]:
        starts.append(given)
        return [sys.executable, "-c", f"print({said!r}); raise SystemExit(1)"]

    monkeypatch.setattr(cluster, "_command", command)
    with pytest.raises(ValueError, match=rf"(?s)did not start .*{said}"):
        start_local(LocalClusterConfig(folder=str(tmp_path)))
    assert len(starts) == times
    assert not (tmp_path / "token").exists()


@pytest.mark.ray
def test_the_local_cluster_is_private(cluster: LocalCluster) -> None:
    assert cluster.dashboard_url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.dashboard_url}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    for name in ("token", "api_key", "env"):
        assert stat.S_IMODE((cluster.folder / name).stat().st_mode) == 0o600
    assert start_local(LocalClusterConfig(folder=str(cluster.folder))) == cluster


@pytest.mark.ray
def test_nothing_is_reported_of_what_runs(cluster: LocalCluster) -> None:
    """Neither by the cluster nor by a driver, whose thread for it would go on to its end."""
    import ray
    from ray._common.usage.usage_lib import usage_stats_enabled

    assert not usage_stats_enabled()
    assert not ray.get(ray.remote(num_cpus=0)(usage_stats_enabled).remote())
    ray.data.range(4).materialize()
    assert "data-usage-metrics-poller" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.ray
def test_the_local_cluster_listens_on_loopback_only(cluster: LocalCluster) -> None:
    assert_private(cluster)
