"""What a look at conversations tells before anything is trained on them: counts, lengths, doubts, and renderings.

Plain text for the terminal. It judges nothing: packing does what the settings say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.conversations.examples import Example, Rejected

LEARNED = "⟦{}⟧"  # around what is learned, in a rendering
SHOWN_REASONS = 3


def describe(examples: Sequence[Example], rejected: Sequence[Rejected], block_tokens: int) -> str:
    """The counts and lengths as lines of text."""
    reasons = Counter(one.reason for one in rejected)
    lines = [f"records           {len(examples) + len(rejected):,}", f"  kept            {len(examples):,}"]
    lines += [f"  {reason:<16}{count:,}" for reason, count in sorted(reasons.items())]
    lines += [f"layouts           {_counts(Counter(one.layout for one in examples))}"]
    lines += [f"answers each      {_counts(Counter(one.num_answers for one in examples))}"]
    lines += [f"prompts           {len({one.prompt_hash for one in examples}):,} different"]
    if examples:
        learned = [sum(int(piece.loss_mask[1:].sum()) for piece in one.pieces) for one in examples]
        lines += [f"tokens each       {_spread([one.num_tokens for one in examples])}"]
        lines += [f"tokens learned    {_spread(learned)}, {sum(learned):,} in all"]
    cut = sum(one.truncated for one in examples)
    lines += [f"truncated         {cut:,} are longer than block_tokens {block_tokens} allows"]
    personal = sum((one.personal for one in examples), Counter[str]())
    lines += [f"personal data     {_counts(personal) or 'none found'}"]
    lines += [f"special tokens    spelled out in {sum(one.spelled for one in examples):,} messages: they act as such"]
    details = Counter((one.reason, one.detail) for one in rejected if one.reason != "duplicate")
    lines += [f"e.g. {reason}: {detail} ({count}×)" for (reason, detail), count in details.most_common(SHOWN_REASONS)]
    return "\n".join(lines)


def show(example: Example, tokenizer: Any) -> str:
    """What the model reads, with ⟦brackets⟧ around what it learns to say."""
    shown = []
    for piece in example.pieces:
        borders = np.flatnonzero(np.diff(piece.loss_mask.astype(np.int8))) + 1
        parts = np.split(piece.input_ids, borders)
        learned = np.split(piece.loss_mask, borders)
        texts = (tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in parts)
        shown += ["".join(LEARNED.format(text) if mask[0] else text for text, mask in zip(texts, learned, strict=True))]
    return "\n--- and rejected:\n".join(shown)


def _counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))


def _spread(values: Sequence[int]) -> str:
    half, most, last = np.percentile(values, [50, 90, 100]).astype(int)
    return f"mean {np.mean(values):,.0f}, median {half:,}, 90 % ≤ {most:,}, longest {last:,}"
