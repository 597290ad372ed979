"""The likelihood of continuations asked of a live OpenAI endpoint, which echoes a prompt with its log-probabilities.

Prompts are token ids, the same that the model directory is given, so that both answers can be compared. The key is
read from the environment. One token is left for the answer that must be generated: prompts are cut one token earlier.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from app.cluster import API_KEY_VARIABLE
from app.evaluation.likelihood import Ids, Likelihood

PROMPTS = 16  # in a request
MAX_RETRIES = 5  # of a request that was refused for its rate, after the time that the endpoint names


def ask(pairs: Sequence[tuple[Ids, Ids]], context_tokens: int, url: str, served_name: str) -> list[Likelihood]:
    """The likelihood of each continuation after its context. Raises ValueError when the endpoint does not answer."""
    import openai

    key = os.environ.get("OPENAI_API_KEY") or os.environ.get(API_KEY_VARIABLE)
    if not key:
        raise ValueError(f"endpoint_url: no key for {url}; set OPENAI_API_KEY or {API_KEY_VARIABLE}")
    found: list[Likelihood] = []
    with openai.OpenAI(base_url=url, api_key=key, max_retries=MAX_RETRIES) as client:
        for start in range(0, len(pairs), PROMPTS):
            batch = pairs[start : start + PROMPTS]
            prompts = [[*context, *continuation][1 - context_tokens :] for context, continuation in batch]
            try:
                answer = client.completions.create(
                    model=served_name, prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1
                )
            except openai.OpenAIError as error:
                raise ValueError(f"endpoint_url: {url} did not answer: {error}") from error
            choices = sorted(answer.choices, key=lambda choice: choice.index)
            for choice, prompt, (context, continuation) in zip(choices, prompts, batch, strict=True):
                is_cut = len(context) + len(continuation) > len(prompt)
                found.append(_read(choice.logprobs, len(prompt), len(continuation), is_cut))
    return found


def _read(logprobs: Any, prompt_tokens: int, continuation_tokens: int, is_cut: bool) -> Likelihood:
    if logprobs is None or len(logprobs.token_logprobs) < prompt_tokens:
        raise ValueError("endpoint_url: the endpoint gave no log-probabilities of the prompt")
    first = max(prompt_tokens - continuation_tokens, 1)  # the first token has nothing before it
    given = logprobs.token_logprobs[first:prompt_tokens]
    best = [max(others.values()) for others in logprobs.top_logprobs[first:prompt_tokens]]
    return Likelihood(sum(given), all(a >= b for a, b in zip(given, best, strict=True)), is_cut)
