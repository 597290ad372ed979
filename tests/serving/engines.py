"""vLLM's engine in a process of its own for each test, forked from one that has imported vLLM, which takes long."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_context = get_context("forkserver")
_context.set_forkserver_preload(["vllm.entrypoints.llm"])
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def in_own_process(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """What the function gives there; the environment is set before it is called, but after imports."""
    with ProcessPoolExecutor(1, _context) as pool:
        return pool.submit(_call, function, arguments, IN_PROCESS | environment).result()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str]) -> Any:
    os.environ.update(environment)
    return function(*arguments)
