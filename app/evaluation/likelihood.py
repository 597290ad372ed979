"""How likely a model finds a continuation of a context: what choice benchmarks compare.

Encoding and cutting follow lm-evaluation-harness (its classes TemplateLM and HFLM): a continuation's tokens are those
that the context alone does not have, spaces at the context's end belong to the continuation, and a sequence longer
than the model's context loses its beginning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SCORED_SEQUENCES = 16

Ids = list[int]


class Likelihood(NamedTuple):
    """Log-probability of the continuation in nats, whether greedy decoding gives it, whether the context was cut."""

    logprob: float
    is_greedy: bool
    is_cut: bool


def encode_pair(tokenizer: PreTrainedTokenizerFast, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Token ids of the context and of what the continuation adds; a blank context is the token that begins texts."""
    whole: Ids
    if not (bare := context.rstrip()):
        beginning = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        whole = tokenizer.encode(context + continuation, add_special_tokens=False, split_special_tokens=True)
        return [beginning], whole
    given: Ids = tokenizer.encode(bare, split_special_tokens=True)
    whole = tokenizer.encode(context + continuation, split_special_tokens=True)
    return given, whole[len(given) :]


def score_pairs(model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
    """The likelihood of each continuation after its context. Raises ValueError for an empty continuation.

    Pairs that differ in the last token only, as the letters of a choice do, are read once.
    """
    limit = model.config.max_position_embeddings
    wanted: dict[tuple[int, ...], list[tuple[int, Ids]]] = defaultdict(list)
    lengths = []
    for index, (context, continuation) in enumerate(pairs):
        if not continuation:
            raise ValueError("a choice adds no token to its question")
        sequence = [*context, *continuation]
        lengths.append(len(sequence))
        wanted[tuple(sequence[-limit - 1 : -1])].append((index, continuation[-limit:]))
    order = sorted(wanted, key=lambda given: (len(given), given))  # little padding, whatever order the pairs had
    found: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), SCORED_SEQUENCES):
        batch = order[start : start + SCORED_SEQUENCES]
        found |= _score_batch(model, batch, [wanted[given] for given in batch])
    return [Likelihood(*found[index], length > limit + 1) for index, length in enumerate(lengths)]


def _score_batch(
    model: PreTrainedModel, inputs: Sequence[tuple[int, ...]], continuations: Sequence[list[tuple[int, Ids]]]
) -> dict[int, tuple[float, bool]]:
    import torch

    width = max(map(len, inputs))
    input_ids = torch.tensor([[*given, *[0] * (width - len(given))] for given in inputs], device=model.device)  # [B, T]
    needed = [len(given) - max(len(ids) for _, ids in own) for given, own in zip(inputs, continuations, strict=True)]
    first = min(needed)  # logits of a large vocabulary are the most memory: only positions that predict an answer
    with torch.inference_mode():
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=width - first).logits  # [B, T - first, V]
    found = {}
    for row, given, own in zip(logits, inputs, continuations, strict=True):
        for index, ids in own:
            start = len(given) - len(ids) - first
            scores = torch.log_softmax(row[start : start + len(ids)].double(), -1)
            targets = torch.tensor(ids, device=scores.device)
            logprob = scores.gather(1, targets[:, None]).sum()
            found[index] = (float(logprob), bool((scores.argmax(-1) == targets).all()))
    return found
