"""Scoring of documents against a computation by hand, on a tiny model with random weights."""

import math

import pytest

pytestmark = pytest.mark.slow
END = 0


@pytest.mark.parametrize(("context", "logits"), [(8, 1 << 28), (64, 50 * 8), (8, 50 * 17)])
def test_every_token_is_scored_once_whatever_the_windows(
    context: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows are of 8 tokens by the model's context, or because there is room for no more logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app import models
    from app.models import score_documents

    monkeypatch.setattr(models, "SCORING_LOGITS", logits)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=context, **sizes)).eval()
    documents = [[5, 6, 7], list(range(1, 30)), [], [9]]
    expected = []
    for document in documents:
        nats = 0.0
        for index, token in enumerate(document):
            start = index - index % 7  # windows of C - 1 = 7 tokens, each after the token before it
            before = [END, *document][start : index + 1]
            with torch.no_grad():
                last = model(torch.tensor([before])).logits[0, -1].double()
            nats -= float(torch.log_softmax(last, 0)[token])
        expected.append(nats)
    got = score_documents(model, documents, END)
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[2] == 0.0
    assert got[1] / 29 == pytest.approx(math.log(50), rel=0.05)
