"""Settings of the endpoint: `args:` of the application in serve_config.yaml, and of the jobs that deploy and ask."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.cluster import API_KEY_VARIABLE
from app.config import Config, RunConfig

APPLICATION = "zero-to-one"


class ServeConfig(Config):
    """What `app.serving.deployment:build_app` takes."""

    model_uri: str = Field(description="absolute path or URI of a model artifact, quantized or not")
    model_digest: str = Field("", description="digest its manifest must have; empty for any")
    model_id: str = Field("zero-to-one", description="the model's name at the endpoint")
    min_replicas: int = Field(1, ge=0, description="engine replicas kept without load")
    max_replicas: int = Field(1, ge=1, description="engine replicas under load")
    target_ongoing_requests: int = Field(16, ge=1, description="requests a replica handles before another is started")
    max_model_len: int = Field(0, ge=0, description="tokens of prompt and answer together; 0 for the model's context")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 on a GPU"
    )
    kv_cache_gib: int = Field(1, ge=1, description="memory for keys and values on a CPU; a GPU's is found by vLLM")
    gpus_per_replica: int = Field(1, ge=1, description="tensor parallel size where there are GPUs")
    enforce_eager: bool = Field(False, description="no compilation: starts faster, answers slower")
    api_key_variable: str = Field(API_KEY_VARIABLE, description="environment variable with the keys, comma-separated")

    @model_validator(mode="after")
    def _fits(self) -> ServeConfig:
        if "://" not in self.model_uri and not self.model_uri.startswith("/"):
            raise ValueError(f"model_uri: {self.model_uri!r} must be an absolute path or a URI")
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        return self


class DeployConfig(RunConfig):
    """Settings of `deploy_model`."""

    model_uri: str = Field("quantized", description="model artifact to serve")
    serve_config: str = Field("serve_config.yaml", description="what to deploy, in the format of `serve deploy`")
    port: int = Field(0, ge=0, description="HTTP port; 0 for the one in serve_config")
    output_uri: str = Field("serve_config.yaml", description="where the deployed config is written")
    timeout_seconds: float = Field(300, gt=0, description="how long the endpoint may take to become ready")

    def plan(self) -> list[str]:
        """What is deployed."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        return [f"deploy {self.resolve(self.model_uri)} with {self.serve_config}", *states(self)]


class AskConfig(Config):
    """Settings of `ask_model`."""

    question: str = Field("却说曹操引兵南下，刘备问计于孔明，孔明曰", description="what to ask, in any language")
    model: str = Field("zero-to-one", description="the model's name at the endpoint")
    max_tokens: int = Field(96, ge=1, description="longest answer")
    temperature: float = Field(0.7, ge=0, description="0 for the likeliest answer")
