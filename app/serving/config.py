"""Settings of the endpoint: `args:` of the application in serve_config.yaml, and of the jobs beside it.

The jobs deploy a model, ask it a question and manage the keys. What each key may do is in the keys file, not here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field, model_validator

from app.cluster import API_KEY_VARIABLE
from app.config import Config, RunConfig
from app.serving.policy import Policy

APPLICATION = "zero-to-one"


class Limits(Config):
    """What one key may take, over all ingress replicas together; 0 for no limit."""

    requests_per_minute: int = Field(0, ge=0, description="requests; as many may come at once after a pause")
    tokens_per_minute: int = Field(0, ge=0, description="tokens of prompts and answers together")
    concurrent_requests: int = Field(0, ge=0, description="requests that may be open at the same time")

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing need be counted."""
        return not (self.requests_per_minute or self.tokens_per_minute or self.concurrent_requests)


class AuditConfig(Config):
    """Where the audit log goes; each ingress replica writes a file of its own."""

    path: str = Field("", description="folder on the ingress's machine; empty for no audit log")
    max_bytes: int = Field(100 << 20, ge=1024, description="size at which a file is rotated")
    num_files: int = Field(10, ge=1, description="rotated files kept beside the current one")
    queue_records: int = Field(
        10_000, ge=1, description="records that may wait for the disk; more are counted, not kept"
    )
    with_text: bool = Field(False, description="log prompts and answers too")


class DoorConfig(Config):
    """Load shedding of one ingress replica."""

    max_running: int = Field(64, ge=1, description="requests handed to the engine at the same time")
    max_waiting: int = Field(256, ge=0, description="requests that may wait for their turn; more get 429")
    deadline_seconds: float = Field(30, gt=0, description="longest wait before a request gets 429")


class CandidateConfig(Config):
    """A second version of the model, deployed beside the first. It has the same settings and scales by itself."""

    model_uri: str = Field("", description="absolute path or URI of its model artifact; empty for none")
    model_digest: str = Field("", description="digest its manifest must have; empty for any")
    traffic_percent: float = Field(0, ge=0, le=100, description="of the model's requests that it answers")


class AdaptersConfig(Config):
    """LoRA adapters on top of the model; each is a model of its own name to clients."""

    folder: str = Field("", description="folder of PEFT folders, the same on all machines; empty for none")
    max_rank: Literal[8, 16, 32, 64, 128, 256] = Field(64, description="highest rank; higher takes more memory")
    max_loaded: int = Field(8, ge=1, description="adapters that a replica computes with at the same time")


class ServeConfig(Config):
    """What `app.serving.deployment:build_app` takes."""

    model_uri: str = Field(description="absolute path or URI of a model artifact, quantized or not")
    model_digest: str = Field("", description="digest its manifest must have; empty for any")
    accept_failed: bool = Field(False, description="serve a model that failed its quantization gate")
    model_id: str = Field("zero-to-one", pattern=r"^[\w./-]+$", description="the model's name at the endpoint")
    candidate: CandidateConfig = Field(default_factory=CandidateConfig, description="a new version on trial")
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig, description="LoRA adapters served by name")
    min_replicas: int = Field(1, ge=0, description="engine replicas kept without load")
    max_replicas: int = Field(1, ge=1, description="engine replicas under load")
    target_ongoing_requests: int = Field(16, ge=1, description="requests a replica handles before another is started")
    max_model_len: int = Field(0, ge=0, description="tokens of prompt and answer together; 0 for the model's context")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 on a GPU"
    )
    kv_cache_gib: float = Field(0, ge=0, description="a CPU replica's keys and values; 0: from context and free memory")
    threads_per_replica: int = Field(0, ge=0, description="of a CPU replica; 0: cores less one, by replicas")
    gpu_memory_utilization: float = Field(0, ge=0, le=1, description="a GPU's memory that vLLM fills; 0: its default")
    max_num_seqs: int = Field(0, ge=0, description="sequences computed together; 0: 64 on a CPU, vLLM's on a GPU")
    max_num_batched_tokens: int = Field(
        0, ge=0, description="tokens of one step, longer prompts are cut; 0: 2048 on a CPU, vLLM's on a GPU"
    )
    gpus_per_replica: int = Field(1, ge=1, description="tensor parallel size where there are GPUs")
    enforce_eager: bool = Field(False, description="no compilation: starts faster, answers slower")
    api_key_variable: str = Field(API_KEY_VARIABLE, description="environment variable with the keys, comma-separated")
    keys_file: str = Field("", description="keys with limits, made by manage_keys; the variable may then be unset")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="longest request body; longer ones get 413")
    audit: AuditConfig = Field(default_factory=AuditConfig, description="one line per request")
    door: DoorConfig = Field(default_factory=DoorConfig, description="load shedding in front of the engine")
    ingress_replicas: int = Field(1, ge=1, description="processes that speak HTTP; all keep to the same limits")
    stream_batching_ms: int = Field(
        20, ge=0, description="streams: pause between two messages after the first; each may hold several tokens"
    )
    policies: dict[str, Policy] = Field(
        default_factory=lambda: {"default": Policy()},
        description="content filter's rules, by the name that a key gives",
    )
    word_uris: tuple[str, ...] = Field((), description="word files of forbidden phrases, beside our own")
    encoder_dir: str = Field("", description="Hugging Face encoder for semantics; empty for the bundled one")

    @model_validator(mode="after")
    def _fits(self) -> ServeConfig:
        for name, uri in (("model_uri", self.model_uri), ("candidate.model_uri", self.candidate.model_uri or "/")):
            if "://" not in uri and not uri.startswith("/"):
                raise ValueError(f"{name}: {uri!r} must be an absolute path or a URI")
        if self.candidate.traffic_percent and not self.candidate.model_uri:
            raise ValueError("candidate.model_uri: which model is to take candidate.traffic_percent?")
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        paths = {"keys_file": self.keys_file, "audit.path": self.audit.path, "adapters.folder": self.adapters.folder}
        for name, path in paths.items():
            if path and not path.startswith("/"):
                raise ValueError(f"{name}: {path!r} must be absolute: a replica runs in a folder of its own")
        if "default" not in self.policies:
            raise ValueError("policies: one must be named default: keys that name none have it")
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
    min_tokens: int = Field(
        24, ge=0, description="shortest answer: without, one that never learned to chat may say none"
    )
    temperature: float = Field(0.7, ge=0, description="0 for the likeliest answer")


class ManageKeysConfig(Config):
    """Settings of `manage_keys`."""

    action: Literal["create", "list", "revoke"] = Field("list", description="create, list or revoke")
    keys_file: str = Field("keys.yaml", description="the file; made by the first create, for its owner only")
    name: str = Field("", pattern=r"^[\w.@-]{0,64}$", description="of the key: whom it is for")
    models: tuple[str, ...] = Field(("*",), min_length=1, description="models that it may use; * for all")
    limits: Limits = Field(default_factory=Limits, description="what it may take")
    policy: str = Field("default", description="content filter's policy for it")
    expires_at: AwareDatetime | None = Field(None, description="date with zone, 2027-01-01T00:00:00+08:00; or never")

    @model_validator(mode="after")
    def _is_named(self) -> ManageKeysConfig:
        if self.action != "list" and not self.name:
            raise ValueError(f"name: {self.action} which key?")
        return self

    def plan(self) -> list[str]:
        """What is done to the file."""
        return [f"{self.action} {self.name}".rstrip() + f" in {self.keys_file}"]
