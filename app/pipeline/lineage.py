"""Where a model comes from: the walk of its manifest's inputs to the raw files, as a tree and as a model card.

Both are made from manifests alone, so they tell what was measured and from what, and nothing that somebody hoped. An
input that was deleted or made anew since is told by its digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from app.artifacts import GATE, Input, Manifest, find_input
from app.config import flatten

DIGITS = 12  # of a digest, in the tree
RAW_SHOWN = 20  # raw files of one artifact


def tree(manifest: Manifest) -> str:
    """The artifact and all that it was made from, one line each, indented by generation."""
    return "\n".join(_lines(manifest.kind, manifest.as_input(), manifest, ""))


def _lines(name: str, given: Input, manifest: Manifest | None, indent: str) -> Iterator[str]:
    kind = manifest.kind if manifest else "file"
    told = f"{indent}{name}: {given.uri}  {given.digest[:DIGITS]}"
    if manifest is None:
        yield told
        return
    yield f"{told}  {kind}, {manifest.created_at}"
    figures = ", ".join(f"{key} {_short(value)}" for key, value in manifest.figures.items())
    if figures:
        yield f"{indent}  = {figures}"
    made = {name: find_input(one) for name, one in manifest.inputs.items()}
    for name, one in manifest.inputs.items():
        if made[name]:
            yield from _lines(name, one, made[name], indent + "    ")
    raw = [name for name in manifest.inputs if not made[name]]
    for name in raw[:RAW_SHOWN]:
        yield from _lines("from", manifest.inputs[name], None, indent + "    ")
    if len(raw) > RAW_SHOWN:
        yield f"{indent}    and {len(raw) - RAW_SHOWN} more"


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def ancestors(manifest: Manifest) -> dict[str, Manifest]:
    """Kind -> the nearest artifact of that kind among the inputs, their inputs and so on; the model itself first."""
    found: dict[str, Manifest] = {manifest.kind: manifest}
    generation = [manifest]
    while generation:
        generation = [made for one in generation for given in one.inputs.values() if (made := find_input(given))]
        for one in generation:
            key = "source model" if one.kind == "model" else one.kind
            found.setdefault(key, one)
    return found


def model_card(manifest: Manifest, reports: list[Manifest]) -> str:
    """A Hugging Face model card in Markdown; `reports` are evaluations, of which those of this model are shown."""
    line = ancestors(manifest)
    corpus, source = line.get("corpus"), line.get("source model")
    trained = source or manifest
    parts = [_front_matter(manifest), f"# {manifest.uri.rstrip('/').rsplit('/', 1)[-1]}", ""]
    if corpus:
        figures = corpus.figures
        parts += ["## Training data", "", f"{figures['clean']} of {figures['raw']} documents after cleaning.", ""]
        parts += _table("rule", "documents rejected", figures.get("by_rule"))
        parts += _table("raw file", "stamp", {name: one.digest for name, one in _raw(corpus).items()})
    if tokenizer := line.get("tokenizer"):
        parts += ["## Tokenizer", "", *_table("figure", "value", tokenizer.figures)]
    parts += ["## Training", "", *_table("figure", "value", flatten(trained.figures))]
    if source:
        parts += ["## Quantization", "", f"Gate: {manifest.figures.get(GATE, 'none')}.", ""]
        parts += _table("figure", "value", flatten(manifest.figures))
    wanted = {one.digest for one in (manifest, source) if one}
    for report in reports:
        subject = report.inputs.get("served", report.inputs["model"]).digest
        if subject in wanted:
            what = "this model" if subject == manifest.digest else "the model before quantization"
            title = "Parity with the endpoint" if GATE in report.figures else "Evaluation"
            parts += [f"## {title}", "", f"Of {what}.", "", *_table("figure", "value", flatten(report.figures))]
    parts += ["## Lineage", "", "```", tree(manifest), "```", ""]
    return "\n".join(parts)


def _raw(manifest: Manifest) -> dict[str, Input]:
    return {name: one for name, one in list(manifest.inputs.items())[:RAW_SHOWN] if not find_input(one)}


def _front_matter(manifest: Manifest) -> str:
    tags = ["zero-to-one", *(["awq", "compressed-tensors"] if GATE in manifest.figures else [])]
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlanguage:\n- zh\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{listed}\n---\n"


def _table(left: str, right: str, values: Any) -> list[str]:
    if not isinstance(values, dict) or not values:
        return []
    rows = [f"| {_cell(name)} | {_cell(_short(value))} |" for name, value in values.items()]
    return [f"| {left} | {right} |", "|---|---|", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
