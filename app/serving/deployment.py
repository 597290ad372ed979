"""The Serve application: OpenAI ingress behind API keys, in front of Ray Serve LLM replicas with the vLLM engine.

`import_path: app.serving.deployment:build_app`; Serve validates `args:` into ServeConfig by the annotation, which is
why this module must not postpone its annotations. It only wires: what differs between CPU and GPU is in engine.py.
"""

from ray import serve
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment

from app import cluster
from app.artifacts import read_manifest
from app.serving import gateway
from app.serving.auth import read_key_digests
from app.serving.config import ServeConfig
from app.serving.engine import engine_arguments, engine_environment, model_source

STARTS = 2  # of an engine that never came up, before the deployment fails; Ray's own limit takes minutes to reach


def build_app(args: ServeConfig) -> Application:
    """The application. Raises ValueError without an API key, or when model_uri is not the model that args name."""
    digests = read_key_digests(args.api_key_variable)
    manifest = read_manifest(args.model_uri, "model")
    if args.model_digest and manifest.digest != args.model_digest:
        raise ValueError(f"{args.model_uri}: its digest is {manifest.digest}, not model_digest; deploy again")
    llm_config = _llm_config(args, cluster.has_gpu())
    ingress = gateway.build_ingress(digests)
    options = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(ingress, name="Gateway", max_ongoing_requests=1000, **options).bind(
        llm_deployments={args.model_id: build_llm_deployment(llm_config)},
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
        log_engine_metrics=True,
    )
