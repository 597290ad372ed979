"""A real endpoint on a tiny 4-bit model: the openai client in front, vLLM behind, Ray Serve between."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from app.cluster import LocalCluster
from app.serving.config import DeployConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "zero-to-one"
QUESTION = [{"role": "user", "content": "孔明曰"}]
NUM_LAYERS = 8  # two blocks of qkv, o, gate_up, down
LOGPROB_TOLERANCE = 0.1  # of activations in bfloat16; logprobs here are about -3


@pytest.fixture(scope="module", name="folders")
def folders_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from tests.serving.tiny import write_models

    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module", name="config")
def config_fixture(cluster: LocalCluster, folders: tuple[Path, Path]) -> DeployConfig:
    packed, _ = folders
    return DeployConfig(
        storage_uri=str(packed.parent),
        model_uri="packed",
        serve_config=str(ROOT / "serve_config.yaml"),
        port=cluster.endpoint_port,
    )


@pytest.fixture(scope="module", name="client")
def client_fixture(cluster: LocalCluster, config: DeployConfig) -> Iterator[openai.OpenAI]:
    from ray import serve

    from app.serving import stage

    stage.run(config)
    with openai.OpenAI(timeout=60, max_retries=0) as client:  # address and key from the cluster's environment
        yield client
    serve.shutdown()


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("key", ["wrong", "0" * 64])
def test_without_the_key_every_path_says_401(client: openai.OpenAI, key: str) -> None:
    stranger = client.with_options(api_key=key)
    for call in (
        stranger.models.list,
        lambda: stranger.chat.completions.create(model=MODEL, messages=QUESTION),
        lambda: stranger.completions.create(model=MODEL, prompt="孔明", stream=True),
    ):
        with pytest.raises(openai.AuthenticationError) as raised:
            call()
        assert raised.value.code == "invalid_api_key"


def test_a_stream_says_the_same_as_an_answer_at_once(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert whole.usage.completion_tokens > 0
    assert whole.choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert len(chunks) > 1


@pytest.mark.parametrize("num_prompt_tokens", [20, 120], ids=["narrow", "wide"])
def test_logprobs_are_those_of_the_dequantized_weights(
    client: openai.OpenAI, folders: tuple[Path, Path], num_prompt_tokens: int
) -> None:
    import torch

    from app.models import load_model, load_tokenizer
    from tests.serving.tiny import TEXT

    twin = load_model(folders[1])
    prompt = load_tokenizer(folders[1])(TEXT * 8)["input_ids"][:num_prompt_tokens]
    assert len(prompt) == num_prompt_tokens
    answer = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    found = answer.choices[0].logprobs
    tokens = [int(token.removeprefix("token_id:")) for token in found.tokens]
    with torch.inference_mode():
        logits = twin(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()
    assert len(tokens) == 16
    assert found.token_logprobs == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)


def test_the_replica_reports_4_bit_weights_at_work(client: openai.OpenAI, cluster: LocalCluster) -> None:
    client.completions.create(model=MODEL, prompt="孔明", max_tokens=2)
    logs = cluster.temp_dir / "session_latest" / "logs"
    lines = [line for path in logs.glob("worker-*") for line in path.read_text(errors="replace").splitlines()]
    assert any(f"int4 kernel at work: {NUM_LAYERS} layers" in line for line in lines)
    assert any("Using Int4LinearKernel for CompressedTensorsWNA16" in line for line in lines)
    secret = os.environ["OPENAI_API_KEY"]
    assert not any(secret in line for line in lines)


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="孔明")
    with pytest.raises(openai.BadRequestError, match="256"):
        client.completions.create(model=MODEL, prompt=[5] * 300)


def test_deploying_the_same_again_restarts_nothing(
    client: openai.OpenAI, config: DeployConfig, caplog: pytest.LogCaptureFixture
) -> None:
    from ray import serve

    from app.serving import stage

    before = serve.status().applications[MODEL].last_deployed_time_s
    replicas = replica_ids()
    assert len(replicas) == 2  # gateway and engine
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        stage.run(config)
    assert time.monotonic() - began < 20  # a restart takes longer
    assert replica_ids() == replicas
    assert serve.status().applications[MODEL].last_deployed_time_s >= before
    written = yaml.safe_load(Path(config.resolve("serve_config.yaml")).read_text())
    assert written["applications"][0]["args"]["model_uri"] == config.resolve("packed")
    assert client.models.list().data


def replica_ids() -> set[str]:
    """Actor ids of the live Serve replicas."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    return {actor.actor_id for actor in actors if "ServeReplica" in actor.class_name}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model_uri": "/nowhere/quantized"}, "no complete model artifact here"),
        ({"model_uri": "/nowhere/quantized", "model_idd": "x"}, "model_idd"),
        ({"model_uri": "PACKED", "api_key_variable": "NOT_SET"}, "no API key: set NOT_SET"),
        ({"model_uri": "PACKED", "model_digest": "0" * 64}, "not model_digest"),
    ],
)
def test_the_builder_refuses_what_it_should(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, args: dict[str, str], message: str
) -> None:
    from app.config import validate
    from app.serving import deployment
    from app.serving.config import ServeConfig

    monkeypatch.setenv("ZERO_TO_ONE_API_KEY", "k")
    args = args | {"model_uri": args["model_uri"].replace("PACKED", str(folders[0]))}
    with pytest.raises(ValueError, match=message):
        deployment.build_app(validate(ServeConfig, args))
