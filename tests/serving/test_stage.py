"""What is handed to `serve deploy`, and what is said when it cannot be."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.artifacts import Manifest, publish
from app.config import RunConfig
from app.serving import stage
from app.serving.config import DeployConfig

MANIFEST = Manifest(kind="model", uri="/runs/quantized", config={})


def document() -> dict[str, Any]:
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {"name": "other", "args": {"a": 1}},
            {"name": "zero-to-one", "args": {"model_uri": "/edited/by/hand", "kv_cache_gib": 2}},
        ],
    }


def test_only_the_model_and_the_port_are_filled_in() -> None:
    given = document()
    filled = stage.fill_in(given, MANIFEST, 8123)
    assert filled["http_options"] == {"host": "127.0.0.1", "port": 8123}
    other, ours = filled["applications"]
    assert other == {"name": "other", "args": {"a": 1}}
    assert ours["args"] == {"model_uri": "/runs/quantized", "model_digest": MANIFEST.digest, "kv_cache_gib": 2}
    assert given == document()  # the caller's is not touched
    assert stage.fill_in(given, MANIFEST, 0)["http_options"]["port"] == 8000


def test_a_retrained_model_changes_the_args_so_that_serve_restarts() -> None:
    retrained = MANIFEST.model_copy(update={"created_at": "later"})
    assert stage.fill_in(document(), MANIFEST, 0) == stage.fill_in(document(), MANIFEST, 0)
    assert stage.fill_in(document(), MANIFEST, 0) != stage.fill_in(document(), retrained, 0)


def test_an_unknown_argument_is_refused_before_anything_is_deployed() -> None:
    wrong = document()
    wrong["applications"][1]["args"]["kv_cache_gb"] = 2
    with pytest.raises(ValueError, match="kv_cache_gb: unknown key; did you mean kv_cache_gib"):
        stage.fill_in(wrong, MANIFEST, 0)


def test_a_file_without_the_application_is_refused() -> None:
    with pytest.raises(ValueError, match="no application named zero-to-one; it has other"):
        stage.fill_in({"applications": [{"name": "other"}]}, MANIFEST, 0)
    with pytest.raises(ValueError, match="it has none"):
        stage.fill_in({}, MANIFEST, 0)


def test_no_model_or_no_file_is_refused_without_ray(tmp_path: Path) -> None:
    config = DeployConfig(storage_uri=str(tmp_path), serve_config=str(tmp_path / "absent.yaml"))
    with pytest.raises(ValueError, match="no complete model artifact here"):
        stage.run(config)
    publish(Manifest.draft("model", str(tmp_path / "quantized"), RunConfig(), {}), {})
    with pytest.raises(ValueError, match=r"serve_config: .*absent.yaml does not exist"):
        stage.run(config)


TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in build_app
    raise ValueError("no API key: set KEY")
ValueError: no API key: set KEY
"""


def fake_serve(*states: str, message: str = "", replica_message: str = "") -> SimpleNamespace:
    """Serve that goes through these states of the application, one at each look, and stays in the last."""
    left = list(states)
    deployments = {"LLMServer": SimpleNamespace(message=replica_message), "Gateway": SimpleNamespace(message="")}

    def status() -> SimpleNamespace:
        state = left.pop(0) if len(left) > 1 else left[0]
        application = SimpleNamespace(status=SimpleNamespace(value=state), message=message, deployments=deployments)
        return SimpleNamespace(applications={"zero-to-one": application})

    return SimpleNamespace(status=status)


def test_waiting_ends_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POLL_SECONDS", 0)
    monkeypatch.setattr(stage, "serve", fake_serve("DEPLOYING", "DEPLOYING", "RUNNING"))
    stage._wait_until_running(60)


def test_waiting_ends_with_the_replicas_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "POLL_SECONDS", 0)
    failing = fake_serve("DEPLOYING", "DEPLOY_FAILED", message=TRACEBACK, replica_message="out of memory")
    monkeypatch.setattr(stage, "serve", failing)
    with pytest.raises(ValueError, match=r"DEPLOY_FAILED: ValueError: no API key: set KEY\nout of memory\n") as raised:
        stage._wait_until_running(60)
    assert "x.py" not in str(raised.value)


def test_waiting_ends_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "serve", fake_serve("DEPLOYING"))
    with pytest.raises(ValueError, match=r"not ready after 0 s \(DEPLOYING\)"):
        stage._wait_until_running(0)
