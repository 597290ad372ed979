"""Does the endpoint say what the model says? Greedy answers compared, token by token, with the same model elsewhere.

The endpoint answers token prompts greedily and tells its log-probabilities; each reference (the served artifact read by
transformers, the model before quantization) gives its own for the same tokens, so one early difference does not spoil
what comes after. It compares and judges; served.py asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the endpoint said to a prompt, by token ids, with the log-probability of each token in nats."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """A reference's view of one answer: its log-probabilities of the tokens, and whether it prefers each of them."""

    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]


def judge(model_dir: Path, answers: Sequence[Answer]) -> list[Judged]:
    """The view of the model in a folder, in float32; one forward pass an answer."""
    import torch

    from app.models import load_model

    model = load_model(model_dir)
    judged = []
    for answer in answers:
        tokens = torch.tensor(answer.tokens)
        with torch.inference_mode():
            logits = model(torch.tensor([[*answer.prompt, *answer.tokens]])).logits[0]  # [T, V]
        rows = logits[len(answer.prompt) - 1 : -1].float().log_softmax(-1)  # [N, V]
        own = rows.gather(1, tokens[:, None])[:, 0]
        judged.append(Judged(tuple(own.tolist()), tuple((rows.argmax(-1) == tokens).tolist())))
    return judged


def compare(answers: Sequence[Answer], judged: Sequence[Judged]) -> dict[str, float | int]:
    """Largest and mean distance of log-probabilities, and how often the reference would have said the same.

    Raises ValueError when there is no token to compare.
    """
    gaps = [
        abs(theirs - ours)
        for answer, view in zip(answers, judged, strict=True)
        for theirs, ours in zip(answer.logprobs, view.logprobs, strict=True)
    ]
    same = [flag for view in judged for flag in view.is_greedy]
    if not gaps:
        raise ValueError("the endpoint answered no prompt: there is nothing to compare")
    return {
        "tokens": len(gaps),
        "max_logprob_gap": math.nan if any(map(math.isnan, gaps)) else round(max(gaps), 6),
        "mean_logprob_gap": round(math.fsum(gaps) / len(gaps), 6),
        "greedy_percent": round(100 * sum(same) / len(same), 2),
        "equal_answers": sum(all(view.is_greedy) for view in judged),
    }


def verdict(served: dict[str, Any], equal_renderings: int, renderings: int, max_logprob_gap: float) -> str:
    """ "passed", or what does not hold of the served model against itself."""
    failures = []
    if not served["max_logprob_gap"] <= max_logprob_gap:
        failures.append(f"logprobs differ by {served['max_logprob_gap']} nats, allowed {max_logprob_gap}")
    if equal_renderings < renderings:
        failures.append(f"{renderings - equal_renderings} of {renderings} conversations have other token ids")
    return f"failed: {'; '.join(failures)}" if failures else "passed"
