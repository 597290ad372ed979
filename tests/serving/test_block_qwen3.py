"""vLLM answers from a model whose layers see chosen blocks as transformers does, however a prompt comes in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import yaml

from app.cluster import LocalCluster
from app.models import load_model
from tests.serving.engines import in_own_process
from tests.serving.tiny import TEXT, VOCABULARY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS, NUM_LOGPROBS, TOLERANCE = 24, 5, 1e-3
BLOCK_TOKENS, BLOCKS, CONTEXT = 24, 3, 640  # a block of the cache, 128 tokens, is no multiple of the model's
LENGTHS = (5, 23, 73, 200, 411, 600)  # up to 25 blocks, of which a layer sees three
Answer = tuple[list[int], list[dict[int, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that training makes, with weights wide enough for clear favourites among the tokens."""
    from transformers import AutoModelForCausalLM

    from app.tokens import tokenizer as bpe
    from app.training.config import TrainConfig
    from app.training.families import architecture

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2}
    blocks = {"architecture": "qwen3", "attention_block_tokens": BLOCK_TOKENS, "attention_blocks": BLOCKS}
    config = TrainConfig.model_validate({"model": sizes | blocks | {"global_every": 4, "tie_embeddings": False}})
    made = architecture(config, {"vocab_size": VOCABULARY, "block_tokens": CONTEXT, "end_of_text_id": 0})
    made.initializer_range = 0.1
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("blocks")
    AutoModelForCausalLM.from_config(made).save_pretrained(path)
    bpe.save(bpe.train([TEXT] * 2, VOCABULARY, 2), path)
    return path


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(folder: Path, asked: Sequence[Sequence[list[int]]], arguments: dict[str, Any]) -> list[list[Answer]]:
    """Of vLLM's engine in this process, one batch of prompts after the other: greedy tokens, and logprobs of each."""
    import vllm

    settings = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 27, "seed": 0} | arguments
    engine = vllm.LLM(str(folder), **settings)
    options = vllm.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=NUM_LOGPROBS, ignore_eos=True)
    found = []
    for batch in asked:
        made = engine.generate([{"prompt_token_ids": prompt} for prompt in batch], options, use_tqdm=False)
        found.append([
            (
                list(one.outputs[0].token_ids),
                [{token: said.logprob for token, said in row.items()} for row in one.outputs[0].logprobs],
            )
            for one in made
        ])  # fmt: skip
    return found


def refusal(folder: Path) -> str:
    """What vLLM says of the model; "" when it takes it."""
    import vllm

    try:
        vllm.LLM(str(folder), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 27)
    except Exception as error:  # pydantic's does not pickle
        return str(error)
    return ""


def served(folder: Path, asked: Sequence[Sequence[list[int]]], **arguments: Any) -> list[list[Answer]]:
    found: list[list[Answer]] = in_own_process(answers, folder, asked, arguments)
    return found


def check(folder: Path, asked: Sequence[list[int]], found: Sequence[Answer]) -> None:
    """Each token is the one that transformers prefers, and each logprob its own."""
    model = load_model(folder)
    for prompt, (tokens, logprobs) in zip(asked, found, strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert tokens == wanted.argmax(-1).tolist(), len(prompt)
        for said, row in zip(logprobs, wanted, strict=True):
            assert list(said.values()) == pytest.approx(row[list(said)].tolist(), abs=TOLERANCE), len(prompt)


def test_greedy_answers_and_logprobs_are_those_of_transformers(folder: Path) -> None:
    """All prompts of a batch at once, each in one piece."""
    (found,) = served(folder, [prompts()], enable_prefix_caching=False)
    check(folder, prompts(), found)


@pytest.mark.parametrize("chunk", [37, 100])
def test_prompts_in_chunks_and_cached_prefixes(folder: Path, chunk: int) -> None:
    """Chunks begin anywhere in a block; the second batch begins as the first did, and finds that in the cache."""
    again = [[*prompt, 7, 8, 9] for prompt in prompts()]
    found = served(
        folder, [prompts(), again],
        enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=chunk, max_num_seqs=3,
    )  # fmt: skip
    check(folder, prompts(), found[0])
    check(folder, again, found[1])


@pytest.mark.long
def test_compiled_it_answers_the_same(folder: Path) -> None:
    (found,) = served(folder, [prompts()], enforce_eager=False)
    check(folder, prompts(), found)


def test_without_our_plugin_vllm_refuses(folder: Path) -> None:
    """It does not serve another model in its place."""
    said = in_own_process(refusal, folder, VLLM_PLUGINS="")
    assert "model type `block_sparse_qwen3` but Transformers does not recognize this architecture" in said


@pytest.mark.ray
@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_endpoint_serves_it(cluster: LocalCluster, folder: Path, tmp_path: Path, eager: bool) -> None:
    """Ray Serve's replicas know the family, too; compiled in `make test-long`."""
    from ray import serve

    from app.artifacts import Manifest, publish
    from app.config import RunConfig
    from app.serving import stage
    from app.serving.config import DeployConfig

    publish(Manifest.draft("model", str(folder), RunConfig(), {}), {})
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    document["applications"][0]["args"] |= {"adapters": {"folder": ""}, "enforce_eager": eager}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(document))
    settings = {"model_uri": str(folder), "serve_config": str(tmp_path / "serve.yaml"), "port": cluster.endpoint_port}
    settings |= {"timeout_seconds": 600}
    stage.run(DeployConfig.model_validate(settings | {"storage_uri": str(tmp_path)}))
    try:
        with openai.OpenAI(timeout=60, max_retries=0) as client:  # address and key from the cluster's environment
            for prompt in prompts():
                made = client.completions.create(
                    model="zero-to-one", prompt=prompt, max_tokens=8, temperature=0, logprobs=0,
                    extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
                ).choices[0]  # fmt: skip
                tokens = [int(token.removeprefix("token_id:")) for token in made.logprobs.tokens]
                said = [{token: value} for token, value in zip(tokens, made.logprobs.token_logprobs, strict=True)]
                assert len(tokens) == 8
                check(folder, [prompt], [(tokens, said)])
    finally:
        serve.shutdown()
