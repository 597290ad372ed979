"""The Serve application: OpenAI ingress behind API keys, in front of Ray Serve LLM replicas with the vLLM engine.

`import_path: app.serving.deployment:build_app`; Serve validates `args:` into ServeConfig by the annotation, which is
why this module must not postpone its annotations. It only wires: what differs between CPU and GPU is in engine.py.
"""

from ray import serve
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm import LLMConfig

from app import cluster
from app.artifacts import read_manifest
from app.serving import gateway
from app.serving.auth import open_keys
from app.serving.config import ServeConfig
from app.serving.engine import context_tokens, engine_arguments, engine_environment, model_source
from app.serving.lineage import lineage
from app.serving.moderation import build_moderator

STARTS = 2  # of an engine that never came up, before the deployment fails; Ray's own limit takes minutes to reach


def build_app(args: ServeConfig) -> Application:
    """The application. Raises ValueError without an API key, or when model_uri is not the model that args name."""
    keys = open_keys(args.keys_file, args.api_key_variable)
    manifest = read_manifest(args.model_uri, "model")
    if args.model_digest and manifest.digest != args.model_digest:
        raise ValueError(f"{args.model_uri}: its digest is {manifest.digest}, not model_digest; deploy again")
    build_moderator(args.policies, args.word_uris, args.encoder_dir)  # says what is wrong before a replica starts
    llm_config = _llm_config(args, cluster.has_gpu())
    facts = {"lineage": lineage(manifest, args.model_id), "context_tokens": context_tokens(args)}
    size = args.ingress_replicas
    options = {"autoscaling_config": {"min_replicas": size, "max_replicas": size}, "ray_actor_options": {"num_cpus": 0}}
    ingress = serve.ingress()(gateway.Gateway)
    return serve.deployment(ingress, name="Gateway", max_ongoing_requests=1000, **options).bind(
        args=args,
        keys=keys,
        facts=facts,
        llm_deployments={args.model_id: build_llm_deployment(llm_config, deployment_cls=gateway.StreamServer)},
        model_cards=gateway.model_cards(llm_config),
    )


def _llm_config(args: ServeConfig, use_gpu: bool) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": args.model_id, "model_source": model_source(args.model_uri)},
        accelerator_config={"kind": "gpu" if use_gpu else "cpu"},
        engine_kwargs=engine_arguments(args, use_gpu),
        runtime_env={"env_vars": engine_environment(args, use_gpu)},
        deployment_config={
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
            },
            "max_ongoing_requests": 8 * args.target_ongoing_requests,
            "max_constructor_retry_count": STARTS,
        },
        experimental_configs={"stream_batching_interval_ms": args.stream_batching_ms},
        log_engine_metrics=True,
    )
