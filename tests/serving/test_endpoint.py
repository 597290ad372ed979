"""A real endpoint on a tiny 4-bit model: the openai client in front, vLLM behind, Ray Serve between.

Two ingress replicas, a key from the environment without limits, and keys with limits in a file.
"""

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.serving import auth
from app.serving.config import DeployConfig, Limits
from tests.listening import assert_private
from tests.warm_workers import family

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "zero-to-one"
QUESTION = [{"role": "user", "content": "孔明曰"}]
NUM_LAYERS = 8  # two blocks of qkv, o, gate_up, down
LOGPROB_TOLERANCE = 0.1  # of activations in bfloat16; logprobs here are about -3
FORBIDDEN = "乌有之辞"  # in the word file of the test
MAX_BODY_BYTES = 2 << 20
LIMITED = Limits(requests_per_minute=3)


@pytest.fixture(scope="module", name="folders")
def folders_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from tests.serving.tiny import write_models

    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module", name="keys")
def keys_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The keys file, and the keys in it by name."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    names: dict[str, dict[str, Any]] = {
        "limited": {"limits": LIMITED},
        "single": {"limits": Limits(concurrent_requests=1)},
        "elsewhere": {"models": ("another",)},
    }
    return path, {name: auth.create_key(path, name, options) for name, options in names.items()}


@pytest.fixture(scope="module", name="config")
def config_fixture(
    cluster: LocalCluster, folders: tuple[Path, Path], keys: tuple[Path, dict[str, str]]
) -> DeployConfig:
    from tests.serving.tiny import write_adapter

    packed, twin = folders
    adapters = packed.parent / "adapters"
    for seed, name in enumerate(("poet", "broken")):
        write_adapter(twin, adapters / name, seed)
    (adapters / "broken" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    words = packed.parent / "words.txt"
    words.write_text(f"category: invented\n{FORBIDDEN}\n", encoding="utf-8")
    document["applications"][0]["args"] |= {
        "keys_file": str(keys[0]),
        "ingress_replicas": 2,
        "word_uris": [str(words)],
        "max_body_bytes": MAX_BODY_BYTES,
        "audit": {"path": str(packed.parent / "audit")},
        "adapters": {"folder": str(adapters), "max_rank": 16},
        "enforce_eager": True,  # tests/test_pipeline.py serves compiled
    }
    path = packed.parent / "given.yaml"
    path.write_text(yaml.safe_dump(document))
    return DeployConfig(
        storage_uri=str(packed.parent), model_uri="packed", serve_config=str(path), port=cluster.endpoint_port
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
    assert [model.id for model in client.models.list()] == [MODEL, "broken", "poet"]


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
    from app.models import load_model

    said, found, wanted = forced_decoding(client, MODEL, load_model(folders[1]), folders[1], num_prompt_tokens)
    assert len(said) == 16
    assert found == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)


def forced_decoding(
    client: openai.OpenAI, name: str, twin: Any, folder: Path, num_prompt_tokens: int
) -> tuple[list[int], list[float], list[float]]:
    """What the endpoint says after a prompt, with its logprobs and those of the twin for the same tokens."""
    import torch

    from app.models import load_tokenizer
    from tests.serving.tiny import TEXT

    prompt = load_tokenizer(folder)(TEXT * 8)["input_ids"][:num_prompt_tokens]
    assert len(prompt) == num_prompt_tokens
    answer = client.completions.create(
        model=name,
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
    return tokens, found.token_logprobs, logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()


def test_the_parity_gate_compares_the_endpoint_with_its_model_and_with_another(
    client: openai.OpenAI, folders: tuple[Path, Path]
) -> None:
    """The dequantized twin is what is served; a model with an adapter merged into it is another."""
    from app.evaluation import served
    from app.evaluation.config import ParityConfig
    from app.models import load_tokenizer
    from tests.serving.tiny import TEXT, write_adapter

    other = folders[0].parent / "other"
    merged = write_adapter(folders[1], folders[0].parent / "merged-adapter", 3)
    merged.save_pretrained(other)
    load_tokenizer(folders[1]).save_pretrained(other)
    config = ParityConfig(num_prompts=4, prompt_tokens=12, answer_tokens=8, endpoint_url=str(client.base_url))
    texts = [TEXT[start:] for start in range(4)]
    figures = served.check(texts, {"served": str(folders[1]), "model": str(other)}, config)
    assert figures["gate"] == "passed"
    assert (figures["prompts"], figures["equal_renderings"], figures["served"]["tokens"]) == (4, 4, 32)
    assert figures["served"]["max_logprob_gap"] <= LOGPROB_TOLERANCE < figures["model"]["max_logprob_gap"]
    figures = served.check(texts, {"served": str(other)}, config)
    assert figures["gate"].startswith("failed: logprobs differ by")


def test_adapters_and_the_base_answer_each_by_its_name(
    client: openai.OpenAI, folders: tuple[Path, Path], config: DeployConfig
) -> None:
    """One that was there, and one that is put there now; over 4-bit weights."""
    from app.models import load_model
    from tests.serving.tiny import write_adapter

    adapters = Path(config.resolve("adapters"))
    twins = {"poet": write_adapter(folders[1], adapters.parent / "again", 0)}
    twins["late"] = write_adapter(folders[1], adapters / "late", 2)
    deadline = time.monotonic() + 30
    while "late" not in {model.id for model in client.models.list()}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    answers = {MODEL: forced_decoding(client, MODEL, load_model(folders[1]), folders[1], 20)}
    for name in ("poet", "late", "poet"):
        answers[name] = forced_decoding(client, name, twins[name], folders[1], 20)
    for _, found, wanted in answers.values():
        assert found == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)
    assert len({tuple(tokens) for tokens, _, _ in answers.values()}) == 3
    assert {model.id: getattr(model, "parent", None) for model in client.models.list()}["late"] == MODEL


def test_an_adapter_that_cannot_be_loaded_harms_no_other(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="adapter"):
        client.completions.create(model="broken", prompt="孔明", max_tokens=1)
    assert client.completions.create(model=MODEL, prompt="孔明", max_tokens=1).choices


def test_choices_seeds_and_stops(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "孔明", "max_tokens": 8, "temperature": 1.0}
    options |= {"extra_body": {"ignore_eos": True}}
    several = client.completions.create(**options, n=3, seed=7, logprobs=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.text for choice in several.choices}) > 1
    assert all(len(choice.logprobs.token_logprobs) == 8 for choice in several.choices)
    assert several.usage.completion_tokens == 24
    again = client.completions.create(**options, n=3, seed=7)
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices]
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(**options, n=2, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {choice.index: choice.text for choice in several.choices[:2]}
    text = several.choices[0].text
    stopped = client.completions.create(**options, seed=7, n=3, stop=text[3]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(text[3])]


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept_to(client: openai.OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["孔明", "玄德"]}, "wise": {"type": "boolean"}},
        "required": ["name", "wise"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=200, temperature=1, seed=1, response_format=wanted, stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    else:
        text = answer.choices[0].message.content
    found = json.loads(text)
    assert found["name"] in ("孔明", "玄德")
    assert isinstance(found["wise"], bool)
    assert len(found) == 2


def test_the_replica_reports_4_bit_weights_at_work(client: openai.OpenAI, cluster: LocalCluster) -> None:
    client.completions.create(model=MODEL, prompt="孔明", max_tokens=2)
    logs = cluster.temp_dir / "session_latest" / "logs"
    lines = [line for path in logs.glob("worker-*") for line in path.read_text(errors="replace").splitlines()]
    assert any(f"int4 kernel at work: {NUM_LAYERS} layers" in line for line in lines)
    assert any("Using Int4LinearKernel for CompressedTensorsWNA16" in line for line in lines)
    secret = os.environ["OPENAI_API_KEY"]
    assert not any(secret in line for line in lines)


def test_the_model_runs_in_the_engines_own_process(client: openai.OpenAI, cluster: LocalCluster) -> None:
    """Another one for it would have the engine wait in a loop, on a core that others need."""
    client.completions.create(model=MODEL, prompt="孔明", max_tokens=2)
    names = [process.name() for process in family(cluster)]
    assert {name for name in names if name.startswith("VLLM::")} == {"VLLM::EngineCore"}


def test_the_endpoint_listens_on_loopback_only(client: openai.OpenAI, cluster: LocalCluster) -> None:
    assert_private(cluster)


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="孔明")
    with pytest.raises(openai.BadRequestError, match="256"):
        client.completions.create(model=MODEL, prompt=[5] * 300)


def test_a_client_that_goes_gives_its_place_back(client: openai.OpenAI, keys: tuple[Path, dict[str, str]]) -> None:
    single = client.with_options(api_key=keys[1]["single"])
    stream = single.completions.create(
        model=MODEL, prompt="孔明", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
        single.completions.create(model=MODEL, prompt="孔明", max_tokens=1)
    stream.close()
    deadline = time.monotonic() + 30
    while True:
        try:
            single.completions.create(model=MODEL, prompt="孔明", max_tokens=1)
            return
        except openai.RateLimitError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = """
    model messages prompt input n best_of temperature top_p top_k min_p seed stop logprobs top_logprobs
    prompt_logprobs echo logit_bias response_format structured_outputs tools tool_choice stream stream_options
    max_tokens min_tokens max_completion_tokens bad_words allowed_token_ids presence_penalty frequency_penalty
    repetition_penalty priority suffix user metadata truncate_prompt_tokens skip_special_tokens
    add_special_tokens chat_template_kwargs documents cache_salt kv_transfer_params vllm_xargs return_token_ids
    use_beam_search prompt_embeds request_id nothing
"""
FIELDS = re.findall(r"\w+", NAMES)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    path=st.sampled_from(["v1/chat/completions", "v1/completions", "v1/embeddings", "tokenize", "detokenize"]),
    junk=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3) | JUNK,
)
def test_no_body_makes_the_server_fail(client: openai.OpenAI, web: httpx.Client, path: str, junk: Any) -> None:
    body = junk
    if isinstance(junk, dict):
        base: dict[str, Any] = {"model": MODEL, "max_tokens": 2}
        base |= {"messages": QUESTION} if "chat" in path else {"prompt": "孔明"} if "completions" in path else {}
        body = base | junk
    reply = web.post(path, content=json.dumps(body))
    assert reply.status_code < 500, (path, body, reply.text)
    assert reply.status_code < 400 or reply.json()["error"]["message"]


@pytest.fixture(scope="module", name="web")
def web_fixture(client: openai.OpenAI) -> Iterator[httpx.Client]:
    root = str(client.base_url).removesuffix("v1/")
    with httpx.Client(base_url=root, headers={"authorization": f"Bearer {client.api_key}"}, timeout=60) as web:
        yield web


REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer KEY\r\n"
MALFORMED = [
    b"",
    b"\r\n\r\n",
    b"\x00" * 64,
    b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"NONSENSE / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /%ff%fe%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nauthorization: \xff\xfe\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    REQUEST + b"content-length: -1\r\n\r\n",
    REQUEST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
    REQUEST + b"content-length: 99999999999\r\n\r\n",
    REQUEST + b"content-length: 50\r\n\r\n{}",
    REQUEST + b"content-length: 2\r\n\r\n{}",
    REQUEST + b"content-length: 6\r\n\r\n\xff\xfe\x00{}\x80",
    REQUEST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    REQUEST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    REQUEST + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00",
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_no_malformed_request_makes_the_server_fail(client: openai.OpenAI, web: httpx.Client, number: int) -> None:
    raw = MALFORMED[number].replace(b"KEY", client.api_key.encode())
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        reply = b""
        try:
            while part := connection.recv(65536):
                reply += part
        except (TimeoutError, ConnectionResetError):
            pass
    assert not reply.startswith(b"HTTP/1.1 5"), reply[:500]
    assert web.get("health").status_code == 200


def test_deploying_the_same_again_restarts_nothing(
    client: openai.OpenAI, config: DeployConfig, caplog: pytest.LogCaptureFixture
) -> None:
    from ray import serve

    from app.serving import stage

    before = serve.status().applications[MODEL].last_deployed_time_s
    replicas = replica_ids()
    assert len(replicas) == 3  # two gateways and an engine
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        stage.run(config)
    assert time.monotonic() - began < 20  # a restart takes longer
    assert replica_ids() == replicas
    assert serve.status().applications[MODEL].last_deployed_time_s >= before
    written = yaml.safe_load(Path(config.resolve("serve_config.yaml")).read_text())
    assert written["applications"][0]["args"]["model_uri"] == config.resolve("packed")
    assert client.models.list().data


def test_the_filter_reads_what_is_asked(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "请说「乌 有 之 辞」"}]
    whole = client.chat.completions.create(model=MODEL, messages=question)
    assert whole.choices[0].finish_reason == "content_filter"
    assert whole.choices[0].message.content.startswith("抱歉")
    chunks = list(client.chat.completions.create(model=MODEL, messages=question, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    completion = client.completions.create(model=MODEL, prompt=["aa", FORBIDDEN])
    assert completion.choices[0].finish_reason == "content_filter"


def test_the_filter_reads_prompts_of_token_ids(client: openai.OpenAI, folders: tuple[Path, Path]) -> None:
    from app.models import load_tokenizer

    ids = load_tokenizer(folders[1])(FORBIDDEN)["input_ids"]
    assert client.completions.create(model=MODEL, prompt=ids).choices[0].finish_reason == "content_filter"


@pytest.mark.parametrize("stream", [False, True])
def test_a_forbidden_answer_never_arrives(client: openai.OpenAI, stream: bool) -> None:
    """The engine is made to say it, token by token: the tokenizer knows none of its characters."""
    forced = {"structured_outputs": {"choice": [f"ab {FORBIDDEN} cd"]}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=stream, max_tokens=60, extra_body=forced
    )
    if stream:
        chunks = list(answer)
        said, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
        assert said.strip() == "ab"
    else:
        said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert reason == "content_filter"
    assert not set(FORBIDDEN) & set(said)


def test_a_key_of_another_model_sees_none_of_ours(client: openai.OpenAI, keys: tuple[Path, dict[str, str]]) -> None:
    other = client.with_options(api_key=keys[1]["elsewhere"])
    assert other.models.list().data == []
    with pytest.raises(openai.NotFoundError) as not_ours:
        other.chat.completions.create(model=MODEL, messages=QUESTION)
    with pytest.raises(openai.NotFoundError) as not_there:
        client.chat.completions.create(model="x" * len(MODEL), messages=QUESTION)
    assert not_ours.value.body["message"].replace(MODEL, "x" * len(MODEL)) == not_there.value.body["message"]


def test_two_replicas_keep_to_one_limit(client: openai.OpenAI, keys: tuple[Path, dict[str, str]]) -> None:
    limited = client.with_options(api_key=keys[1]["limited"])

    def ask(_: int) -> openai.RateLimitError | None:
        try:
            limited.completions.create(model=MODEL, prompt="孔明", max_tokens=1)
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(8) as pool:
        refused = [error for error in pool.map(ask, range(16)) if error]
    assert 16 - len(refused) in (3, 4)  # one may have become free again
    assert int(refused[0].response.headers["retry-after"]) >= 1
    assert refused[0].response.headers["x-ratelimit-limit-requests"] == "3"
    assert refused[0].code == "rate_limit_exceeded"


def test_what_needs_no_engine(client: openai.OpenAI, config: DeployConfig) -> None:
    root = str(client.base_url).removesuffix("v1/")
    page = httpx.get(root)
    assert page.status_code == 200
    assert page.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "<title>zero-to-one</title>" in page.text
    assert httpx.get(f"{root}health").json() == {"status": "ok"}
    assert httpx.get(f"{root}ready").json() == {"status": "ready"}
    assert httpx.get(f"{root}v1/lineage").status_code == 401
    key = {"authorization": f"Bearer {client.api_key}"}
    told = httpx.get(f"{root}v1/lineage", headers=key).json()
    assert told["model"] == MODEL
    assert told["digest"] == read_manifest(config.resolve("packed"), "model").digest
    assert httpx.get(f"{root}v1/nothing", headers=key).json()["error"]["code"] == "not_found"
    assert httpx.get(f"{root}v1/completions", headers=key).status_code == 405


def test_too_much_is_refused_before_the_engine(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(model=MODEL, prompt="x" * MAX_BODY_BYTES)
    assert raised.value.status_code == 413
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=MODEL, prompt="x" * (1 << 20))
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="n must be"):
        client.completions.create(model=MODEL, prompt="x", n=10_000)
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: tempperature"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"tempperature": 1})


def test_each_request_was_recorded_without_its_key(
    client: openai.OpenAI, config: DeployConfig, keys: tuple[Path, dict[str, str]]
) -> None:
    client.completions.create(model=MODEL, prompt="玄德问计", max_tokens=1)
    deadline = time.monotonic() + 10
    while True:
        paths = sorted(Path(config.resolve("audit")).glob("audit-*.jsonl"))
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        records = [json.loads(line) for line in text.splitlines()]
        if len(paths) == 2 and any(record.get("completion_tokens") == 1 for record in records):
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert {200, 400, 401, 404, 413, 429} <= {record["status"] for record in records}
    assert {"default", "limited", "elsewhere", None} <= {record["key_name"] for record in records}
    assert any(verdict["action"] == "block" for record in records for verdict in record["verdicts"])
    assert not any(secret in text for secret in [client.api_key, *keys[1].values(), "玄德问计"])


def test_the_metrics_reach_rays_endpoint(client: openai.OpenAI) -> None:
    import ray

    from app.serving.metrics import METRICS, PREFIX
    from tests.serving.test_metrics import ENGINES

    node = ray.nodes()[0]
    ending = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    wanted = {f"ray_{PREFIX}{name}{ending[metric.kind]}{{" for name, metric in METRICS.items()}
    wanted |= {f"ray_vllm_{name}{{" for name in ENGINES}
    deadline = time.monotonic() + 120
    while True:
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        missing = {name for name in wanted if name not in text}
        if not missing:
            return
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def replica_ids() -> set[str]:
    """Actor ids of the live Serve replicas."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    return {actor.actor_id for actor in actors if "ServeReplica" in actor.class_name}


def test_a_candidate_takes_its_share(client: openai.OpenAI, config: DeployConfig, folders: tuple[Path, Path]) -> None:
    """The float32 twin beside the 4-bit model, deployed while the endpoint answers."""
    from app.artifacts import Manifest, publish
    from app.config import RunConfig
    from app.serving import stage

    told = publish(Manifest.draft("model", str(folders[1]), RunConfig(), {}), {})
    path = Path(config.serve_config)
    document = yaml.safe_load(path.read_text())
    candidate = {"model_uri": told.uri, "model_digest": told.digest, "traffic_percent": 50}
    document["applications"][0]["args"] |= {"candidate": candidate}
    path.write_text(yaml.safe_dump(document))
    stage.run(config)
    assert f"{MODEL}-candidate" in {model.id for model in client.models.list()}
    ask = {"prompt": "孔明", "max_tokens": 1}
    answered = [client.completions.create(model=MODEL, **ask).model for _ in range(24)]
    assert set(answered) == {MODEL, f"{MODEL}-candidate"}  # by chance not: once in 8 million runs
    assert client.completions.create(model=f"{MODEL}-candidate", **ask).model == f"{MODEL}-candidate"
    root = str(client.base_url).removesuffix("v1/")
    lineage = httpx.get(f"{root}v1/lineage", headers={"authorization": f"Bearer {client.api_key}"}).json()
    assert lineage["candidate"]["digest"] == told.digest
    versions = {lineage["digest"], told.digest}
    deadline = time.monotonic() + 10
    while versions - {record["model_version"] for record in audited(config)}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_its_engine_the_endpoint_is_not_ready_until_another_runs(
    cluster: LocalCluster, client: openai.OpenAI
) -> None:
    """The candidate's runs on; the model's own is killed."""
    root = str(client.base_url).removesuffix("v1/")
    prefix = f"ray::ServeReplica:{MODEL}:StreamServer:{MODEL}"
    engines = [
        process
        for process in family(cluster)
        if process.name() and process.cmdline() and process.cmdline()[0].rstrip().split(".")[0] == prefix
    ]
    assert len(engines) == 1
    assert httpx.get(f"{root}ready").status_code == 200
    engines[0].kill()
    for wanted in (503, 200):
        deadline = time.monotonic() + 180
        while httpx.get(f"{root}ready").status_code != wanted:
            assert time.monotonic() < deadline, wanted
            time.sleep(0.2)
    assert httpx.get(f"{root}health").status_code == 200
    assert client.completions.create(model=MODEL, prompt="孔明", max_tokens=1).choices


def audited(config: DeployConfig) -> list[dict[str, Any]]:
    """The records of the audit log so far."""
    paths = sorted(Path(config.resolve("audit")).glob("audit-*.jsonl"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


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
