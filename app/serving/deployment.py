"""The Serve application: OpenAI ingress behind API keys, in front of Ray Serve LLM replicas with the vLLM engine.

`import_path: app.serving.deployment:build_app`; Serve validates `args:` into ServeConfig by the annotation, which is
why this module must not postpone its annotations. It only wires: what differs between CPU and GPU is in engine.py.
"""

from functools import partial

from ray import serve
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm import LLMConfig

from app import cluster
from app.artifacts import GATE, Manifest, read_manifest
from app.serving import gateway
from app.serving.auth import open_keys
from app.serving.catalog import CANDIDATE, Version
from app.serving.config import ServeConfig
from app.serving.engine import (
    adapter_arguments,
    context_tokens,
    engine_arguments,
    engine_environment,
    model_source,
    refuse_untried,
)
from app.serving.lineage import lineage
from app.serving.moderation import build_moderator

DRAIN_SECONDS = 600  # longest answer that a replica may finish before another takes its place; as request_timeout_s
STARTS = 2  # of an engine that never came up, before the deployment fails; Ray's own limit takes minutes to reach


def build_app(args: ServeConfig) -> Application:
    """The application. Raises ValueError without an API key, or when a model_uri is not the model that args name."""
    keys = open_keys(args.keys_file, args.api_key_variable)
    build_moderator(args.policies, args.word_uris, args.encoder_dir)  # says what is wrong before a replica starts
    served = {args.model_id: (args, _model(args.model_uri, args.model_digest, args))}
    if args.candidate.model_uri:
        changes = {"model_id": args.model_id + CANDIDATE, "model_uri": args.candidate.model_uri}
        found = _model(args.candidate.model_uri, args.candidate.model_digest, args)
        served[args.model_id + CANDIDATE] = args.model_copy(update=changes), found
    configs = {name: _llm_config(one, cluster.has_gpu()) for name, (one, _) in served.items()}
    told = [lineage(manifest, name) for name, (_, manifest) in served.items()]
    size = args.ingress_replicas
    options = {
        "autoscaling_config": {"min_replicas": size, "max_replicas": size},
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        "max_surge_percent": 100,  # new ones start before the old ones end, as they need no CPU of their own
    }
    ingress = serve.ingress()(gateway.Gateway)
    return serve.deployment(ingress, name="Gateway", max_ongoing_requests=1000, **options).bind(
        args=args,
        keys=keys,
        versions=[Version(name, found.digest, context_tokens(one)) for name, (one, found) in served.items()],
        lineage=told[0] | ({"candidate": told[1]} if len(told) > 1 else {}),
        llm_deployments={name: _engines(config, args) for name, config in configs.items()},
        model_cards={name: gateway.model_card(config) for name, config in configs.items()},
    )


def _model(uri: str, digest: str, args: ServeConfig) -> Manifest:
    manifest = read_manifest(uri, "model")
    verdict = str(manifest.figures.get(GATE, ""))
    if verdict.startswith("failed") and not args.accept_failed:
        raise ValueError(f"{uri}: its gate {verdict}; quantize it otherwise, or set accept_failed to serve it as it is")
    if digest and manifest.digest != digest:
        raise ValueError(f"{uri}: its digest is {manifest.digest}, not model_digest; deploy again")
    return manifest


def _engines(config: LLMConfig, args: ServeConfig) -> Application:
    loader = partial(gateway.LocalAdapters, args.adapters.folder)
    return build_llm_deployment(config, deployment_cls=gateway.StreamServer, bind_kwargs={"model_downloader": loader})


def _llm_config(args: ServeConfig, use_gpu: bool) -> LLMConfig:
    refuse_untried(args, use_gpu)
    return LLMConfig(
        model_loading_config={"model_id": args.model_id, "model_source": model_source(args.model_uri)},
        accelerator_config={"kind": "gpu" if use_gpu else "cpu"},
        engine_kwargs=engine_arguments(args, use_gpu) | adapter_arguments(args),
        lora_config={"max_num_adapters_per_replica": args.adapters.max_loaded} if args.adapters.folder else None,
        runtime_env={"env_vars": engine_environment(args, use_gpu)},
        deployment_config={
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
            },
            "max_ongoing_requests": 8 * args.target_ongoing_requests,
            "max_constructor_retry_count": STARTS,
            "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        },
        experimental_configs={"stream_batching_interval_ms": args.stream_batching_ms},
        log_engine_metrics=True,
    )
