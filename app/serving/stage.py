"""Deployment stage: hand serve_config.yaml with this run's model to Ray Serve and wait until it answers.

The same as `serve deploy` by hand; the deployed file is kept beside the run. An unchanged config restarts nothing.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ray import serve

from app import cluster, storage
from app.artifacts import Manifest, read_manifest
from app.config import validate
from app.serving.config import APPLICATION, DeployConfig, ServeConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_ERROR = re.compile(r"^(?=[\w.]+(?:Error|Exception): )", re.MULTILINE)  # the line that ends a traceback
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def run(config: DeployConfig) -> Manifest:
    """Deploy and wait; the manifest of the model that is served.

    Raises ValueError with the replica's own message when it fails or does not become ready in time.
    """
    manifest = read_manifest(config.resolve(config.model_uri), "model")
    document = fill_in(_read(config.serve_config), manifest, config.port)
    dashboard_url = cluster.connect()
    storage.write_atomic(config.resolve(config.output_uri), yaml.safe_dump(document, sort_keys=False).encode())
    if _state() == "DEPLOY_FAILED":
        serve.delete(APPLICATION)  # Serve does not try an unchanged application again
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document, file)
        file.flush()
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address", dashboard_url, file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{config.serve_config}: serve deploy failed:\n{result.stderr[-3000:]}")
    _wait_until_running(config.timeout_seconds)
    return manifest


def fill_in(document: dict[str, Any], manifest: Manifest, port: int) -> dict[str, Any]:
    """The document with the application's args pointing to the model, and the port if one is given."""
    applications = {application["name"]: application for application in document.get("applications", [])}
    if APPLICATION not in applications:
        raise ValueError(
            f"serve_config: no application named {APPLICATION}; it has {', '.join(applications) or 'none'}"
        )
    arguments = {
        **applications[APPLICATION].get("args", {}),
        "model_uri": manifest.uri,
        "model_digest": manifest.digest,
    }
    validate(ServeConfig, arguments)
    filled = [
        {**application, "args": arguments} if application["name"] == APPLICATION else application
        for application in document["applications"]
    ]
    http_options = {**document.get("http_options", {}), **({"port": port} if port else {})}
    return {**document, "http_options": http_options, "applications": filled}


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"serve_config: {path} does not exist")
    document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return document


def _state() -> str:
    application = serve.status().applications.get(APPLICATION)
    return application.status.value if application else "NOT_STARTED"


def _reason() -> str:
    """What Serve says of the application and its deployments: of each traceback the error itself."""
    application = serve.status().applications.get(APPLICATION)
    if not application:
        return ""
    said = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return "\n".join(dict.fromkeys(_ERROR.split(message)[-1].strip() for message in said if message))


def _wait_until_running(timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    said = ""
    while True:
        state = _state()
        if state == "RUNNING":
            logger.info("%s is running", APPLICATION)
            return
        if state in _FAILED or time.monotonic() > deadline:
            why = state if state in _FAILED else f"not ready after {timeout_seconds:.0f} s ({state})"
            raise ValueError(f"{APPLICATION}: {why}: {_reason()}\nthe Serve tab of the Ray dashboard has the logs")
        if state != said:
            said = state
            logger.info("%s: %s", APPLICATION, state.lower())
        time.sleep(POLL_SECONDS)
