"""Choices asked of an endpoint: the requests over HTTP, and a live one against the model's own directory."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.artifacts import Manifest, publish, read_manifest
from app.cluster import API_KEY_VARIABLE, LocalCluster
from app.config import RunConfig
from app.evaluation import endpoint
from app.evaluation.config import ChoiceConfig
from app.evaluation.generation import Workers
from tests.augmentation.fake_endpoint import endpoint as fake_endpoint

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_TOKENS = 8
TABLE = {(last, token): -1.0 - (7 * last + token) % 5 for last in range(10) for token in range(10)}


def answer(body: dict[str, Any]) -> tuple[int, str]:
    """As vLLM answers a prompt of ids that is to be echoed; its choices in any order."""
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        steps = [*pairwise(prompt)]
        likeliest = [{"a": max(TABLE[last, token] for token in range(10))} for last, _ in steps]
        logprobs = {
            "tokens": [str(token) for token in [*prompt, 0]],
            "token_logprobs": [None, *(TABLE[step] for step in steps), -0.5],
            "top_logprobs": [None, *likeliest, {"a": -0.5}],
            "text_offset": [0] * (len(prompt) + 1),
        }
        choices.append({"index": index, "text": "", "finish_reason": "length", "logprobs": logprobs})
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return 200, json.dumps(
        {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": choices[::-1], "usage": usage}
    )


def test_an_endpoint_is_asked_for_the_prompt_s_likelihoods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    pairs = [([1, 2], [3, 4]), ([1, 2], [9]), *[([n % 10], [5]) for n in range(20)], ([1, 2, 3, 4, 5, 6, 7], [8, 9])]
    with fake_endpoint(answer) as (url, requests):
        found = endpoint.ask(pairs, CONTEXT_TOKENS, url, "served")
    assert found[0] == (TABLE[2, 3] + TABLE[3, 4], False, False)
    for (context, (token,)), likelihood in zip(pairs[1:-1], found[1:-1], strict=True):
        assert likelihood.logprob == TABLE[context[-1], token]
        assert likelihood.is_greedy == (likelihood.logprob == max(TABLE[context[-1], other] for other in range(10)))
    assert found[-1].is_cut
    assert found[-1].logprob == TABLE[7, 8] + TABLE[8, 9]
    assert requests[-1]["prompt"][-1] == [3, 4, 5, 6, 7, 8, 9]
    assert {request["key"] for request in requests} == {"Bearer the-key"}
    assert {request["model"] for request in requests} == {"served"}


def test_an_endpoint_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    with (
        fake_endpoint(lambda body: (401, "{}")) as (url, _),
        pytest.raises(ValueError, match=f"endpoint_url: {url} did not answer"),
    ):
        endpoint.ask([([1], [2])], CONTEXT_TOKENS, url, "served")
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"set OPENAI_API_KEY or {API_KEY_VARIABLE}"):
        endpoint.ask([([1], [2])], CONTEXT_TOKENS, url, "served")


@pytest.fixture
def served(cluster: LocalCluster, tmp_path: Path) -> Iterator[Path]:
    """The folder of a tiny float32 model that the cluster's endpoint serves."""
    from ray import serve

    from app.serving import stage
    from app.serving.config import DeployConfig
    from tests.serving.tiny import write_models

    _, plain = write_models(tmp_path)
    publish(Manifest.draft("model", str(plain), RunConfig(), {}), {})
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    document["applications"][0]["args"] |= {"enforce_eager": True}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(document))
    given = {"storage_uri": str(tmp_path), "model_uri": plain.name, "port": cluster.endpoint_port}
    stage.run(DeployConfig.model_validate(given | {"serve_config": str(tmp_path / "given.yaml")}))
    yield plain
    serve.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_the_live_endpoint_finds_continuations_as_likely_as_the_directory(
    cluster: LocalCluster, served: Path, tmp_path: Path
) -> None:
    given = {"name": "c", "uri": "unused.jsonl"}
    url = f"http://127.0.0.1:{cluster.endpoint_port}/v1"
    pairs = [(f"却说{a}引兵", f"{b}，") for a in "曹刘孙" for b in "操备权"]
    model = read_manifest(str(served), "model").as_input()
    with Workers(model, str(tmp_path / "shards"), 1) as workers:
        by_directory = workers.compare(ChoiceConfig(**given), pairs)
        by_endpoint = workers.compare(ChoiceConfig(**given, endpoint_url=url), pairs)
    own, theirs = ([one.logprob for one in found] for found in (by_directory, by_endpoint))
    assert theirs == pytest.approx(own, abs=1e-3)
    assert [one.is_greedy for one in by_endpoint] == [one.is_greedy for one in by_directory]
    assert len({round(value, 1) for value in own}) > 3
