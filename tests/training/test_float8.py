"""Which layers multiply in 8 bits, and how near their numbers are to the wide ones."""

import pytest

from app import overlays

pytestmark = pytest.mark.slow  # imports torch, transformers and torchao
SHAPE = {"vocab_size": 300, "block_tokens": 32, "end_of_text_id": 0}


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(overlays.ROOT / "float8"))


def model_of(**model: object) -> object:
    import torch

    from app.training.config import TrainConfig
    from app.training.engine import fresh_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1}
    return fresh_model(TrainConfig.model_validate({"model": sizes | model}), SHAPE)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_layers_round_their_operands(recipe: str) -> None:
    import torch

    from app.training import float8

    model, wide = model_of(), model_of()
    assert float8.convert(model, recipe, emulate=True) == 2 * 7  # of a layer: q, k, v, o, gate, up, down
    assert type(model.lm_head) is torch.nn.Linear  # type: ignore[attr-defined]
    assert model.state_dict().keys() == wide.state_dict().keys()  # type: ignore[attr-defined]
    ids = torch.arange(32).view(1, 32)
    rounded, exact = (one(input_ids=ids, labels=ids) for one in (model, wide))  # type: ignore[operator]
    distance = float((rounded.logits - exact.logits).detach().norm() / exact.logits.detach().norm())
    assert 1e-3 < distance < 0.05  # of 3 bits of mantissa
    for one in (rounded, exact):
        one.loss.backward()
    for (name, mine), (_, theirs) in zip(model.named_parameters(), wide.named_parameters(), strict=True):  # type: ignore[attr-defined]
        assert mine.grad is not None, name
        assert torch.nn.functional.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), 0) > 0.98, name


def test_a_model_without_fitting_layers_is_refused() -> None:
    from app.training import float8

    with pytest.raises(ValueError, match="float8: no linear layer"):
        float8.convert(model_of(hidden_size=40, head_size=40, intermediate_size=40), "tensorwise", emulate=True)


@pytest.mark.gpu
def test_the_chip_multiplies_as_it_is_emulated() -> None:
    import torch

    from app.training import float8

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("needs a GPU with FP8")
    chip, emulated = (model_of().to("cuda", torch.bfloat16) for _ in range(2))  # type: ignore[attr-defined]
    float8.convert(chip, "tensorwise", emulate=False)
    float8.convert(emulated, "tensorwise", emulate=True)
    ids = torch.arange(32, device="cuda").view(1, 32)
    one, other = (model(input_ids=ids).logits.float() for model in (chip, emulated))
    assert float((one - other).norm() / other.norm()) < 0.02
