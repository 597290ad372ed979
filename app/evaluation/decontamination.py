"""Whether what is scored was kept out of the training text: read from the corpus artifact, not measured again."""

from __future__ import annotations

from collections.abc import Mapping

from app.artifacts import EVALUATION, Input, Manifest


def state_of_held_out(corpus: Manifest) -> str:
    """What keeps the held-out documents from being training text as well."""
    dedup = corpus.config.get("dedup")
    near = bool(dedup and dedup.get("near"))
    removed = "exact and near duplicates" if near else "exact duplicates, but not near ones,"
    return f"never trained on: held out by hash after {removed} were removed"


def state_of_corpus(corpus: Manifest) -> str:
    """Which evaluation items the corpus stage looked for, and how many documents it left out for them."""
    num_files = sum(name.startswith(EVALUATION) for name in corpus.inputs)
    if not num_files:
        return "no evaluation file was named when the corpus was made"
    rejected = corpus.figures.get("by_rule", {})
    found = rejected.get("contaminated", 0) if isinstance(rejected, dict) else 0
    num_items, too_short = (corpus.figures.get(f"evaluation_items{name}", 0) for name in ("", "_too_short"))
    return (
        f"{num_items} items of {num_files} files were looked for, {too_short} more were too short; "
        f"{found} documents held one and were left out"
    )


def state_of(scored: Mapping[str, Input], corpus: Manifest) -> str:
    """Whether the corpus stage looked for the items of these files, as they are now, in its documents."""
    known = {uri.removeprefix(f"{EVALUATION} "): found.digest for uri, found in corpus.inputs.items()}
    checked = [uri for uri, found in scored.items() if known.get(uri) == found.digest]
    changed = [uri for uri, found in scored.items() if uri in known and known[uri] != found.digest]
    if len(checked) == len(scored):
        return "decontaminated against"
    parts = [f"{len(scored) - len(checked)} of {len(scored)} files were NOT decontaminated against"]
    if changed:
        parts.append(f"{len(changed)} changed since the corpus was made")
    return "; ".join(parts)
