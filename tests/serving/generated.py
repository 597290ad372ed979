"""Requests to the endpoint, drawn from the engine's own schemas: right ones, nearly right ones, and what is none.

Fields and their values follow the JSON schema of the pydantic class that each path is checked with; then one may be
replaced by junk, or the body, the path, the method and the key by something else. Answers are short unless a drawn
field says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OPERATIONS = {  # path -> its operation, and the least that it needs
    "/v1/chat/completions": ("chat", {"messages": [{"role": "user", "content": "孔明曰"}], "max_tokens": 2}),
    "/v1/completions": ("completions", {"prompt": "孔明", "max_tokens": 2}),
    "/v1/embeddings": ("embeddings", {"input": "孔明"}),
    "/tokenize": ("tokenize", {"prompt": "孔明"}),
    "/detokenize": ("detokenize", {"tokens": [5, 6]}),
}
UNREADABLE = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b'{"model": "\xed\xa0\x80"}',
    b'{"messages": "\\ud800"}',
    b'{"max_tokens": NaN}',
    b'{"temperature": 1e999}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"null",
    b'"text"',
    b"\xef\xbb\xbf{}",
]
NAMES = ["user", "system", "assistant", "tool", "developer", "text", "json_object", "json_schema", "function", "auto"]
TEXTS = st.sampled_from(["", "a", "孔明", "\u0000", "\ud83d\ude00", "{{", "[0-9]+", "(", "data:,x", *NAMES])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 5, 64, 128, 255, 2**31, 2**63, 10**30]) | st.integers(-3, 300)
FRACTIONS = st.sampled_from([-2.0, -0.5, 0.0, 1e-9, 0.5, 1.0, 2.0, 1e9])
LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXTS | st.text(max_size=8),
    "integer": NUMBERS,
    "number": FRACTIONS | st.floats(-2, 2),
    "boolean": st.booleans(),
    "null": st.none(),
}


@dataclass(frozen=True)
class Request:
    """One HTTP request. `key` is "right", "wrong" or "" for none."""

    method: str
    path: str
    body: bytes
    key: str = "right"


def values(schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int = 5) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema, or nearly: bounds are not kept to, and below the depth all is null."""
    if "$ref" in schema:
        return st.deferred(lambda: values(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions, depth))
    if depth == 0:
        return st.none()
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if options := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return st.one_of([values(option, definitions, depth) for option in options])
    kind = schema.get("type")
    if kind == "array":
        return st.lists(values(schema.get("items", {}), definitions, depth - 1), max_size=3)
    if kind == "object":
        return objects(schema, definitions, depth - 1)
    return LEAVES.get(str(kind), JUNK)


def objects(schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with the required properties and up to four others."""
    properties = {name: values(one, definitions, depth) for name, one in schema.get("properties", {}).items()}
    if not properties:
        inner = schema.get("additionalProperties")
        return st.dictionaries(
            TEXTS, values(inner, definitions, depth) if isinstance(inner, dict) else JUNK, max_size=2
        )
    needed = {name: properties.pop(name) for name in schema.get("required", ()) if name in properties}
    names = st.lists(st.sampled_from(sorted(properties)), max_size=4, unique=True) if properties else st.just([])
    some = names.flatmap(lambda chosen: st.fixed_dictionaries({name: properties[name] for name in chosen}))
    return st.builds(lambda one, other: {**one, **other}, st.fixed_dictionaries(needed), some)


def requests(schemas: Mapping[str, Mapping[str, Any]], model: str) -> st.SearchStrategy[Request]:
    """Requests, by the JSON schema of each operation; most name the model."""
    bodies = {
        path: _bodies(schemas[operation], {"model": model, **least}) for path, (operation, least) in OPERATIONS.items()
    }
    posts = [st.builds(Request, st.just("POST"), st.just(path), body) for path, body in bodies.items()]
    others = st.builds(
        Request,
        st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"]),
        st.sampled_from(["/", "/health", "/ready", "/v1/models", "/v1/lineage", "/metrics", "/v1/", "//", *OPERATIONS])
        | st.text("abc/%.?#é", max_size=12).map(lambda text: f"/v1/models/{text}"),
        st.sampled_from([b"", b"{}", b"x" * 100]),
        st.sampled_from(["right", "wrong", ""]),
    )
    return st.one_of(*posts[:2], *posts, others)  # those that generate twice as often


def _bodies(schema: Mapping[str, Any], base: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    definitions = schema.get("$defs", {})
    properties = {name: values(one, definitions) for name, one in schema["properties"].items()}
    chosen = st.lists(st.sampled_from(sorted(properties)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: properties[name] for name in names})
    )
    junk = st.dictionaries(st.sampled_from([*sorted(properties), "nothing"]), JUNK, min_size=1, max_size=2)
    fields = st.one_of(chosen, chosen, st.builds(lambda one, other: {**one, **other}, chosen, junk))
    whole = fields.map(lambda more: json.dumps({**base, **more}).encode())
    return st.one_of(
        whole, whole, whole, JUNK.map(lambda value: json.dumps(value).encode()), st.sampled_from(UNREADABLE)
    )
