"""The ingress replica: joins the pipeline to Ray Serve LLM's engines, the cluster's ledger and Ray's metrics.

Ray builds one `Gateway` per replica and asks it for the ASGI application. `Gateway.ask` is the engine to the pipeline:
the schema's check, the call, one more try elsewhere if a replica died before it answered, the end of abandoned work.
Several names are not public in Ray; they are imported here and nowhere else, and the version is pinned.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import ray
import ray.serve._private.replica as serve_replica
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParameters
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParameters
from openai.types.embedding_create_params import EmbeddingCreateParams
from pydantic import ValidationError
from ray import serve
from ray._common.network_utils import build_address
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.llm._internal.common.errors import VLLM_CLIENT_ERRORS, VLLM_FATAL_ERRORS
from ray.llm._internal.common.models import global_id_manager
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingCompletionRequest,
    ErrorResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    to_model_metadata,
)
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.llm import LLMConfig
from ray.util import metrics as ray_metrics

from app.serving import metrics
from app.serving.access import OPEN_PATHS, Recorder, Routes
from app.serving.audit import AuditLog, AuditRecord
from app.serving.auth import ApiKeyMiddleware, KeyStore
from app.serving.batching import in_batches
from app.serving.bodies import Refused, bad_request
from app.serving.catalog import Adapters, Catalog, Version
from app.serving.config import ServeConfig
from app.serving.moderation import build_moderator
from app.serving.pipeline import Pipeline
from app.serving.protocol import KINDS, AsgiApp, openai_error
from app.serving.quota import Door, Grant, Ledger, Operation, Refusal, Teller

logger = logging.getLogger(__name__)

NAMESPACE = "zero-to-one"
LEDGER = "quota-ledger"
LEDGER_SECONDS = 10.0  # longest wait for the ledger, also for one that is being restarted
LEDGER_RETRY_SECONDS = 0.2
LEDGER_START_SECONDS = 60.0  # and for its process to start
ENGINE_LOOK_SECONDS = 0.5  # between two looks whether the engine lives
READY_SECONDS = 1.0  # anybody may ask, without a key
TRIES = 3  # of a request whose replica dies before it answers
TRY_AGAIN_SECONDS = 0.5  # a dying replica answers first, and looks idle to the router until it is gone
_KNOWN = {  # OpenAI's fields, also those that vLLM has no use for
    ChatCompletionRequest: ChatParameters,
    CompletionRequest: CompletionParameters,
    EmbeddingCompletionRequest: EmbeddingCreateParams,
}
_REPLICA_GONE = (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    DeploymentUnavailableError,
    *VLLM_FATAL_ERRORS,  # the replica is about to end
)


_add_port = serve_replica.add_port_to_grpc_server


def _add_port_of_node(server: Any, _: str) -> int:
    """Where a replica takes the calls of others: at the node's address, which on a private cluster is the loopback.

    They are pickled and need no key, and Serve listens for them on all interfaces.
    """
    return int(_add_port(server, build_address(ray.util.get_node_ip_address(), 0)))


serve_replica.add_port_to_grpc_server = _add_port_of_node


class OneProcessEngine(VLLMEngine):  # type: ignore[misc]
    """Ray's engine which on a CPU runs the model in vLLM's own engine process.

    vLLM would start another for it, to set its threads (ours are set before), and wait for each step in a loop that
    takes a core.
    """

    def _start_async_llm_engine(self, arguments: Any, config: Any, group: Any) -> Any:
        from vllm.platforms import current_platform
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        if current_platform.is_cpu() and config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = UniProcExecutor
        return super()._start_async_llm_engine(arguments, config, group)


class StreamServer(LLMServer):  # type: ignore[misc]
    """Ray's LLM replica whose streams send their first token at once, and that can tokenize."""

    _default_engine_cls = OneProcessEngine

    async def start(self) -> None:
        """Start the engine."""
        await super().start()
        self._watching = asyncio.create_task(self._end_with_engine())
        if self.engine._oai_serving_tokenization is None:  # Ray 2.60 looks for it under vLLM's former name
            self.engine._oai_serving_tokenization = getattr(self.engine._app_state, "serving_tokenization", None)

    async def _end_with_engine(self) -> None:
        """End this process when the engine's has ended.

        Serve would learn it from three failed checks ten seconds apart, and send requests here until then: more than
        to the others, since they fail at once.
        """
        while True:
            await asyncio.sleep(ENGINE_LOOK_SECONDS)
            try:
                await self.check_health()
            except Exception:
                logger.exception("the engine is dead, and this replica ends with it")
                os._exit(1)

    async def _maybe_resolve_lora_from_multiplex(self) -> None:
        try:
            await super()._maybe_resolve_lora_from_multiplex()
        except ValueError as error:
            logger.error("adapter %s: %s", serve.get_multiplexed_model_id(), error)
            message = "This adapter cannot be loaded; the server's log says why."
            raise Refused(openai_error(500, message, code="adapter_not_loaded")) from None

    def _batch_output_stream(self, generator: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
        return in_batches(generator, self._get_batch_interval_ms() / 1000)


class LocalAdapters(LoraModelLoader):  # type: ignore[misc]
    """Adapters from a folder that each machine has; Ray's own loader takes only a cloud's buckets."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        """Where an adapter lies. The engine reads it, and says what is wrong with it."""
        path, number = f"{self._folder}/{lora_model_id}", global_id_manager.next()
        return DiskMultiplexConfig(
            model_id=lora_model_id, max_total_tokens=None, local_path=path, lora_assigned_int_id=number
        )


class Gateway(OpenAiIngress):  # type: ignore[misc]
    """One ingress replica."""

    def __init__(
        self, args: ServeConfig, keys: KeyStore, versions: Sequence[Version], lineage: Mapping[str, Any], **engines: Any
    ) -> None:
        """`versions` are the model and, if there is one, the candidate; `engines` what Ray's own ingress takes."""
        super().__init__(**engines)
        self._args, self._keys, self._lineage = args, keys, lineage
        adapters = Adapters(args.adapters.folder, args.adapters.max_rank)
        self._catalog = Catalog(versions, args.candidate.traffic_percent, adapters)
        self._audit = AuditLog(args.audit) if args.audit.path else None
        self._door = Door(args.door)
        self._application = serve.get_replica_context().app_name
        self._looked_at, self._has_engines = float("-inf"), False
        self._instruments = _instruments()

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        args, ledger = self._args, ClusterLedger()
        if args.keys_file:
            await ledger.apply([])  # else the first request would wait for its process
        pipeline = Pipeline(
            ask=self.ask,
            models=self._catalog,
            choose=self._catalog.choose,
            moderator=build_moderator(args.policies, args.word_uris, args.encoder_dir),
            teller=Teller(ledger.apply),
            door=self._door,
            context_tokens=self._catalog.context_tokens,
            with_text=args.audit.with_text,
        )
        close = self._audit.close if self._audit else lambda: None
        routes = Routes(pipeline, self._catalog, self._lineage, close, self._is_ready)
        guarded = ApiKeyMiddleware(routes, self._keys, args.max_body_bytes, OPEN_PATHS)
        return Recorder(guarded, self._record, lambda name: self._catalog.version_of(name).digest)

    async def _is_ready(self) -> bool:
        """Whether each version has a replica that runs, or would start one; asked of Serve once in READY_SECONDS."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= READY_SECONDS:
            self._looked_at = now
            self._has_engines = self._args.min_replicas == 0 or await asyncio.to_thread(self._count_engines)
        return self._has_engines

    def _count_engines(self) -> bool:
        application = serve.status().applications.get(self._application)
        names = [handle.deployment_name for handle in self._default_serve_handles.values()]
        return application is not None and all(
            application.deployments[name].replica_states.get("RUNNING", 0) for name in names
        )

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        """As Ray's, which knows adapters by the base model's name and theirs; here they have names of their own."""
        known = self._configured_serve_handles
        if model_id not in known and self._catalog.is_adapter(model_id):
            engines = self._default_serve_handles[self._catalog.model.name]
            known[model_id] = engines.options(stream=True, multiplexed_model_id=model_id)
        return super()._get_configured_serve_handle(model_id)

    async def ask(self, operation: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """The engine's answer: one mapping, or lists of events. Raises Refused."""
        request = _checked(operation, body)
        handle = self._get_configured_serve_handle(body["model"])
        for attempt in range(TRIES):
            responses = getattr(handle, operation).remote(request, RawRequestInfo())
            has_begun = False
            try:
                async for response in responses:
                    has_begun = True
                    yield _unwrapped(response)
                return
            except _REPLICA_GONE as error:
                logger.warning("%s: the replica is gone: %s", operation, type(error).__name__)
                if has_begun or attempt == TRIES - 1:
                    raise Refused(openai_error(503, "The model's replica failed. Try again.")) from None
                await asyncio.sleep(TRY_AGAIN_SECONDS * 2**attempt)
            except BackPressureError:
                raise Refused(openai_error(503, "The model is busy. Try again.")) from None
            except (RayTaskError, *VLLM_CLIENT_ERRORS) as error:
                raise _refused(error) from None
            finally:
                responses.cancel()

    def _record(self, record: AuditRecord) -> None:
        if self._audit:
            self._audit.write(record)
        gauges = {"door_running": self._door.num_running, "door_waiting": self._door.num_waiting}
        gauges |= {"audit_lost": self._audit.num_lost} if self._audit else {}
        for name, value, tags in [*metrics.measure(record), *((name, value, {}) for name, value in gauges.items())]:
            instrument = self._instruments[name]
            kind = metrics.METRICS[name].kind
            act = {"counter": "inc", "gauge": "set", "histogram": "observe"}[kind]
            getattr(instrument, act)(value, tags)


def _ledger_actor() -> Any:
    """The actor's class. It is made here so that Ray ships it whole: its process need not import vLLM."""

    class QuotaLedger:
        """The quota of the whole cluster; outlives every deployment of the endpoint."""

        def __init__(self, starts_empty: bool) -> None:
            restarted = ray.get_runtime_context().was_current_actor_reconstructed
            self._ledger = Ledger(starts_empty=starts_empty or restarted)

        async def apply(self, operations: Sequence[Operation]) -> list[Grant | Refusal | None]:
            return self._ledger.apply(operations)

    return ray.remote(QuotaLedger)


class ClusterLedger:
    """The way to the one ledger of the cluster, which the first use starts."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._was_there = False

    async def apply(self, operations: Sequence[Operation]) -> Sequence[Grant | Refusal | None]:
        """As Ledger.apply. One that has died is waited for, as it is being restarted; raises when it takes too long."""
        seconds = LEDGER_SECONDS if self._was_there else LEDGER_START_SECONDS
        async with asyncio.timeout(seconds):
            while True:
                try:
                    self._actor = self._actor or await asyncio.to_thread(self._find)
                    result: Sequence[Grant | Refusal | None] = await self._actor.apply.remote(list(operations))
                except RayActorError:
                    self._actor = None
                    await asyncio.sleep(LEDGER_RETRY_SECONDS)
                else:
                    self._was_there = True
                    return result

    def _find(self) -> Any:
        options = {"name": LEDGER, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
        actor = _ledger_actor().options(**options, num_cpus=0, max_restarts=-1)
        return actor.remote(starts_empty=self._was_there)


def model_card(llm_config: LLMConfig) -> Any:
    """Ray's description of a model, which its ingress asks for; GET /v1/models tells the catalog's."""
    return to_model_metadata(llm_config.model_id, llm_config)


def _instruments() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, (kind, description, tags, boundaries) in metrics.METRICS.items():
        options: dict[str, Any] = {"description": description, "tag_keys": tags}
        if kind == "histogram":
            options["boundaries"] = list(boundaries)
        made[name] = getattr(ray_metrics, kind.capitalize())(metrics.PREFIX + name, **options)
    return made


def _schema(operation: str, body: Mapping[str, Any]) -> Any:
    """The pydantic class."""
    if operation == "tokenize":
        return TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest
    schemas: dict[str, Any] = {
        "chat": ChatCompletionRequest,
        "completions": CompletionRequest,
        "embeddings": EmbeddingCompletionRequest,
        "detokenize": DetokenizeRequest,
    }
    return schemas[operation]


def _checked(operation: str, body: Mapping[str, Any]) -> Any:
    """The request as the engine takes it. Raises Refused with 400."""
    schema = _schema(operation, body)
    known = set(schema.model_fields) | set(getattr(_KNOWN.get(schema), "__annotations__", ()))
    if unknown := sorted(body.keys() - known):
        raise bad_request(f"Unrecognized request argument supplied: {unknown[0][:100]}", unknown[0][:100])
    try:
        request = schema.model_validate(body)
        return _sanitize_chat_completion_request(request) if operation == "chat" else request
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        raise bad_request(f"{where}: {first['msg']}"[:500], where[:100] or None) from None
    except (*VLLM_CLIENT_ERRORS, ValueError, TypeError, AttributeError, KeyError) as error:  # its checks trust types
        raise bad_request(str(error)[:500]) from None


def _unwrapped(response: Any) -> Any:
    """A mapping, or a list of events. Raises Refused for the engine's error."""
    first = response[0] if isinstance(response, list) and response else response
    if isinstance(first, ErrorResponse):
        code = first.error.code if first.error.code in KINDS else 400 if first.error.code < 500 else 500
        raise Refused(openai_error(code, first.error.message, param=first.error.param))
    if isinstance(response, str):
        return [response]
    return response if isinstance(response, list) else response.model_dump(mode="json")


def _refused(error: Exception) -> Refused:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, Refused):
        return cause
    if isinstance(cause, VLLM_CLIENT_ERRORS) or isinstance(error, VLLM_CLIENT_ERRORS):
        return bad_request(
            str(cause).strip().splitlines()[-1][:500] if str(cause).strip() else "The request is invalid."
        )
    logger.error("the engine failed: %s", error)
    return Refused(openai_error(500, "The model failed to answer; the server's log says why."))
