"""The HTTP ingress: Ray Serve LLM's OpenAI routes on a FastAPI app whose door asks for an API key.

Several names are not public in Ray; they are imported here and nowhere else, and the version is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, init, make_fastapi_ingress
from ray.serve.llm import LLMConfig

from app.serving.auth import ApiKeyMiddleware


def build_ingress(key_digests: Sequence[bytes]) -> type[Any]:
    """The ingress deployment's class."""
    app = init()
    app.add_middleware(ApiKeyMiddleware, digests=list(key_digests))
    ingress: type[Any] = make_fastapi_ingress(OpenAiIngress, app=app)
    return ingress


def model_cards(llm_config: LLMConfig) -> dict[str, Any]:
    """What GET /v1/models says, by model id."""
    return {llm_config.model_id: to_model_metadata(llm_config.model_id, llm_config)}
