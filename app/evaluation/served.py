"""The parity stage: ask the live endpoint, let each reference judge its answers in a Ray task, write report and gate.

The endpoint is asked through the openai client, as any client asks it; the key comes from the environment. Prompts are
token ids of held-out documents, so that tokenizers do not hide a difference; conversations are compared by the ids that
the endpoint's own template makes of them. What the content filter keeps back is left out and counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from app import cluster, storage
from app.artifacts import GATE, Manifest, clear, find_complete, publish, read_manifest
from app.cluster import API_KEY_VARIABLE
from app.documents import sample_texts
from app.evaluation import parity
from app.evaluation.config import ParityConfig
from app.evaluation.parity import Answer, Judged
from app.models import encode, load_tokenizer

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 120.0


def run(config: ParityConfig) -> Manifest:
    """Make the report artifact. Raises ValueError when the gate fails, after the report was written."""
    uri = config.resolve(config.output_uri)
    served = read_manifest(config.resolve(config.served_uri), "model")
    model = read_manifest(config.resolve(config.model_uri), "model")
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    inputs = {"served": served.as_input(), "model": model.as_input(), "corpus": corpus.as_input()}
    draft = Manifest.draft("report", uri, config, inputs)
    done = find_complete(draft, config.overwrite)
    if done is None:
        clear(uri)
        cluster.connect()
        texts = sample_texts(corpus.uri, "held_out", config.num_prompts)
        figures = check(texts, {"served": served.uri, "model": model.uri}, config)
        storage.write_atomic(f"{uri}/report.json", json.dumps(figures, ensure_ascii=False, indent=2).encode())
        done = publish(draft, figures)
    if done.figures[GATE] != "passed":
        raise ValueError(f"parity: {done.figures[GATE]}; {uri}/report.json has the figures")
    return done


def check(texts: Sequence[str], references: dict[str, str], config: ParityConfig) -> dict[str, Any]:
    """The figures of each reference (label -> model URI), the first of which is the artifact that is served."""
    from openai import OpenAI

    first = next(iter(references))
    with storage.local_copy(references[first]) as folder:
        tokenizer = load_tokenizer(folder)
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get(API_KEY_VARIABLE, "").split(",")[0]
    if not key:
        raise ValueError(f"no key for the endpoint: set OPENAI_API_KEY or {API_KEY_VARIABLE}")
    with OpenAI(base_url=_base_url(config), api_key=key, timeout=TIMEOUT_SECONDS) as client:
        prompts = [ids[: config.prompt_tokens] for ids in encode(tokenizer, texts) if ids]
        given = [_answer(client, prompt, config) for prompt in prompts]
        renderings = [_is_rendered_alike(client, tokenizer, text[:200], config.model_id) for text in texts]
    answers = [answer for answer in given if answer]
    logger.info("%d of %d prompts answered", len(answers), len(given))
    views = list(cluster.map_tasks(_judging(answers), list(references.items())))  # in the order in which they end
    figures: dict[str, Any] = {label: parity.compare(answers, judged) for label, judged in views}
    told = parity.verdict(figures[first], sum(renderings), len(renderings), config.max_logprob_gap)
    counts = {"prompts": len(answers), "kept_back": len(given) - len(answers)}
    return {GATE: told, **counts, "renderings": len(renderings), "equal_renderings": sum(renderings), **figures}


def _judging(answers: list[Answer]) -> Any:
    def judge(reference: tuple[str, str]) -> tuple[str, list[Judged]]:
        label, uri = reference
        with storage.local_copy(uri) as folder:
            return label, parity.judge(folder, answers)

    return judge


def _base_url(config: ParityConfig) -> str:
    """Given, in the environment, or of the file that was deployed. Raises ValueError when none tells it."""
    if url := config.endpoint_url or os.environ.get("OPENAI_BASE_URL"):
        return url
    import yaml

    deployed = config.resolve(config.deployed_uri)
    if not storage.exists(deployed):
        raise ValueError(f"endpoint_url: not given, OPENAI_BASE_URL is not set, and there is no {deployed}")
    with storage.open_file(deployed) as file:
        options = yaml.safe_load(file)["http_options"]
    return f"http://{options['host']}:{options['port']}/v1"


def _answer(client: Any, prompt: list[int], config: ParityConfig) -> Answer | None:
    """What the endpoint says; None when its content filter speaks instead."""
    reply = client.completions.create(
        model=config.model_id,
        prompt=prompt,
        max_tokens=config.answer_tokens,
        temperature=0,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    ).choices[0]
    if reply.finish_reason == "content_filter":
        return None
    tokens = tuple(int(token.removeprefix("token_id:")) for token in reply.logprobs.tokens)
    return Answer(tuple(prompt), tokens, tuple(reply.logprobs.token_logprobs))


def _is_rendered_alike(client: Any, tokenizer: Any, text: str, model_id: str) -> bool:
    """Whether a conversation has the same token ids here and at the endpoint."""
    turns = [("system", "你是助手。"), ("user", text), ("assistant", text[::-1]), ("user", text[:20])]
    messages = [{"role": role, "content": content} for role, content in turns]
    ours = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    theirs = client.post(url, cast_to=object, body={"model": model_id, "messages": messages})
    return bool(list(ours) == theirs["tokens"])
