"""Likelihoods of continuations: against a table, and against lm-evaluation-harness's own class for such models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.evaluation.likelihood import encode_pair, score_pairs
from app.models import load_model, load_tokenizer
from tests.evaluation import known_logits

pytestmark = pytest.mark.slow
PAIRS = [
    ("问题\nA. 甲\nB. 乙\n答案：", " A"),
    ("问题\nA. 甲\nB. 乙\n答案：", " B"),
    ("问题", "答案： A 答案"),
    ("  ", "甲乙"),
    ("", "答案：" * 20),
    ("甲 ", "乙"),
    ("很长的问题" * 60, " C"),
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float64]]:
    folder = tmp_path_factory.mktemp("known")
    return folder / "model", known_logits.write(folder, "B")


def test_likelihoods_are_those_of_the_table(known: tuple[Path, NDArray[np.float64]]) -> None:
    folder, table = known
    tokenizer = load_tokenizer(folder)
    pairs = [encode_pair(tokenizer, *pair) for pair in PAIRS]
    found = score_pairs(load_model(folder), pairs)
    for (context, continuation), likelihood in zip(pairs, found, strict=True):
        steps = list(zip([context[-1], *continuation], continuation, strict=False))
        kept = steps[-known_logits.CONTEXT_TOKENS :]  # of a continuation longer than the model's context
        assert likelihood.logprob == pytest.approx(sum(table[last, token] for last, token in kept), rel=1e-5)
        assert likelihood.is_greedy == all(table[last].argmax() == token for last, token in kept)
        assert likelihood.is_cut == (len(context) + len(continuation) > known_logits.CONTEXT_TOKENS + 1)
    assert [one.is_cut for one in found] == [False] * 6 + [True]
    with pytest.raises(ValueError, match="adds no token"):
        score_pairs(load_model(folder), [([1], [])])


def test_tokens_and_likelihoods_are_those_of_the_harness(known: tuple[Path, NDArray[np.float64]]) -> None:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer(known[0])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.5, **sizes)
    model = LlamaForCausalLM(config).eval()
    harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    pairs = [
        ("问题甲乙答案", "丙丁"),
        ("答案：", " A"),
        ("答案：", " B"),
        ("", "问题"),
        ("问题 ", "A"),
        ("甲乙丙丁" * 9, "问"),
    ]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    expected = harness.loglikelihood(requests, disable_tqdm=True)
    found = score_pairs(model, [encode_pair(tokenizer, *pair) for pair in pairs])
    assert [one.logprob for one in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-4)
    assert [one.is_greedy for one in found] == [is_greedy for _, is_greedy in expected]
    assert [one.is_cut for one in found] == [False] * 5 + [True]
