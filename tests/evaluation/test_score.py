"""Scoring of documents against a computation by hand, on a tiny model with random weights."""

import math

import pytest

pytestmark = pytest.mark.slow
END = 0


def test_every_token_is_scored_once_whatever_the_windows() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app.models import score_documents

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=8, **sizes)).eval()
    documents = [[5, 6, 7], list(range(1, 30)), [], [9]]
    expected = []
    for document in documents:
        nats = 0.0
        for index, token in enumerate(document):
            start = index - index % 7  # windows of C - 1 = 7 tokens, each after the token before it
            context = [END, *document][start : index + 1]
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1].double()
            nats -= float(torch.log_softmax(logits, 0)[token])
        expected.append(nats)
    got = score_documents(model, documents, END)
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[2] == 0.0
    assert got[1] / 29 == pytest.approx(math.log(50), rel=0.05)
