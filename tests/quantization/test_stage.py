"""Quantization on the shared cluster, and the result read back by the environment that serves it."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from app import overlays
from app.artifacts import Manifest, publish, read_manifest
from app.config import RunConfig
from app.quantization import stage
from app.quantization.config import QuantizeConfig
from tests.tiny_trained import UNTRAINED_BITS_PER_BYTE, write_artifacts

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def settings(root: Path, **changes: object) -> QuantizeConfig:
    values = {"storage_uri": str(root), "group_size": 128, "num_calibration_samples": 16, "max_loss_percent": 5.0}
    return QuantizeConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    write_artifacts(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(root: Path, cluster: object) -> Manifest:
    return stage.run(settings(root))


def test_the_packed_weights_are_small_and_the_loss_is_bounded(root: Path, quantized: Manifest) -> None:
    figures = quantized.figures
    assert figures["linear_percent"] <= 14
    assert (figures["gate"], figures["group_size"]) == ("passed", 128)
    assert abs(figures["loss_percent"]) < 5
    assert 80 < figures["same_next_token_percent"] <= 100
    assert figures["bits_per_byte_before"] < 0.5 * UNTRAINED_BITS_PER_BYTE  # something has been learned: it can be lost
    with safe_open(root / "quantized" / "model.safetensors", "np") as file:
        names = set(file.keys())
    packed = {name for name in names if name.endswith(".weight_packed")}
    assert len(packed) == 2 * 7  # q, k, v, o, gate, up, down in two layers; embedding and head stay whole
    assert not {name for name in names if name.endswith("_proj.weight")}
    assert set(quantized.inputs) == {"model", "corpus"}


def test_what_was_saved_is_what_was_measured(root: Path, quantized: Manifest) -> None:
    """transformers with the older compressed-tensors reads the files and gets the bits per byte of the manifest."""
    from app.models import load_model, load_tokenizer, score_documents

    folder = root / "quantized"
    texts = pq.read_table(root / "corpus" / "held_out" / "0.parquet")["text"].to_pylist()
    tokenizer = load_tokenizer(folder)
    documents = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    nats = sum(score_documents(load_model(folder), documents, tokenizer.eos_token_id))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits == pytest.approx(quantized.figures["bits_per_byte_after"], rel=1e-3)
    assert bits != pytest.approx(quantized.figures["bits_per_byte_before"], rel=1e-6)  # it is not the old model
    assert tokenizer.chat_template == load_tokenizer(root / "model").chat_template


def test_the_same_seed_gives_the_same_weights_and_a_rerun_skips(root: Path, quantized: Manifest) -> None:
    before = (root / "quantized" / "model.safetensors").stat().st_mtime_ns
    assert stage.run(settings(root)).digest == quantized.digest
    assert (root / "quantized" / "model.safetensors").stat().st_mtime_ns == before
    again = stage.run(settings(root, output_uri="again"))
    assert again.figures == quantized.figures
    name = "model.safetensors"
    assert (root / "again" / name).read_bytes() == (root / "quantized" / name).read_bytes()


def test_gptq_keeps_closer_to_the_source_than_the_nearest(root: Path, quantized: Manifest) -> None:
    """Other integers in the same layout."""
    nearest = stage.run(settings(root, rounding="nearest", output_uri="nearest"))
    assert nearest.figures["linear_percent"] == quantized.figures["linear_percent"]
    assert abs(nearest.figures["loss_percent"]) > abs(quantized.figures["loss_percent"])
    assert nearest.figures["same_next_token_percent"] < quantized.figures["same_next_token_percent"]
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    packed = []
    for folder in ("quantized", "nearest"):
        with safe_open(root / folder / "model.safetensors", "np") as file:
            packed.append(file.get_tensor(name))
    assert (packed[0] != packed[1]).any()


def test_layers_may_have_groups_of_their_own(root: Path, cluster: object) -> None:
    """tests/test_pipeline.py serves such a model."""
    sizes = {"re:.*down_proj": 32, "re:.*self_attn.*_proj": 64}
    found = stage.run(settings(root, layer_group_sizes=sizes, output_uri="by-layer", rounding="nearest"))
    assert found.figures["gate"] == "passed"
    with safe_open(root / "by-layer" / "model.safetensors", "np") as file:
        for name, size in (("mlp.down_proj", 32), ("self_attn.k_proj", 64), ("mlp.up_proj", 128)):
            packed, scales = (file.get_slice(f"model.layers.1.{name}.weight_{part}") for part in ("packed", "scale"))
            assert packed.get_shape()[1] * 8 == scales.get_shape()[1] * size
    with pytest.raises(ValueError, match=r"re:.*qkv_proj: no linear layer has such a name"):
        stage.run(settings(root, layer_group_sizes={"re:.*qkv_proj": 32}, output_uri="never"))


def test_autoawq_ends_in_the_same_layout(root: Path, quantized: Manifest) -> None:
    """It searches otherwise than llm-compressor, so that the weights differ; what consumers read does not."""
    found = stage.run(settings(root, backend="autoawq", output_uri="autoawq"))
    assert found.figures["gate"] == "passed"
    assert abs(found.figures["loss_percent"]) < 5
    assert found.figures["linear_percent"] <= 14
    layouts, weights = [], []
    for name in ("quantized", "autoawq"):
        layouts.append(json.loads((root / name / "config.json").read_text())["quantization_config"])
        with safe_open(root / name / "model.safetensors", "pt") as file:
            weights.append({key: file.get_tensor(key) for key in sorted(file.keys())})
    assert layouts[0] == layouts[1]
    assert list(weights[0]) == list(weights[1])
    packed = [name for name in weights[0] if name.endswith(".weight_packed")]
    assert any((weights[0][name] != weights[1][name]).any() for name in packed)


def test_autoawq_keeps_what_it_scales(root: Path, cluster: object) -> None:
    """Channels that differ much: the norm before them makes up for it, so that the model is the same."""
    import torch

    from app.models import load_model, load_tokenizer

    model, folder = load_model(root / "model"), root / "uneven"
    torch.manual_seed(0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scales = torch.randn(len(norm.weight)).exp()
            norm.weight.data /= scales
            for linear in readers:
                linear.weight.data *= scales
    model.save_pretrained(folder)
    load_tokenizer(root / "model").save_pretrained(folder)
    publish(Manifest.draft("model", str(folder), RunConfig(), {}), {})
    figures = stage.run(settings(root, backend="autoawq", model_uri="uneven", output_uri="uneven-4bit")).figures
    assert figures["gate"] == "passed"


def test_autoawq_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="AutoAWQ takes parts of names, not re:patterns"):
        QuantizeConfig(backend="autoawq", ignore=["re:.*down_proj"])
    with pytest.raises(ValueError, match="layer_group_sizes: AutoAWQ has one size for all"):
        QuantizeConfig(backend="autoawq", layer_group_sizes={"re:.*down_proj": 32})


def test_the_gate_is_a_limit_that_nothing_unknown_passes() -> None:
    assert stage.judge(2.0, 2.0) == stage.judge(-1.0, 0.0) == stage.PASSED
    assert stage.judge(2.01, 2.0) == "failed: bits per byte +2.01 %, allowed +2 % (max_loss_percent)"
    assert stage.judge(math.nan, 2.0).startswith("failed")


def test_what_loses_too_much_is_marked_after_all_sizes_were_tried_and_not_served(
    root: Path, cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No quantization gains ninety percent."""
    from app.config import validate
    from app.serving import deployment
    from app.serving.config import ServeConfig

    found = stage.run(settings(root, output_uri="refused", max_loss_percent=-90.0, search=True))
    assert str(found.figures["gate"]).startswith("failed: bits per byte")
    assert found.figures["group_size"] == 32
    tried = found.figures["tried_loss_percent"]
    assert isinstance(tried, dict)
    assert list(tried) == ["group_128", "group_64", "group_32"]
    assert tried["group_32"] == found.figures["loss_percent"]
    monkeypatch.setenv("ZERO_TO_ONE_API_KEY", "k")
    with pytest.raises(ValueError, match=r"its gate failed: .* set accept_failed"):
        deployment.build_app(validate(ServeConfig, {"model_uri": found.uri}))
    assert deployment.build_app(validate(ServeConfig, {"model_uri": found.uri, "accept_failed": True}))


def test_a_missing_overlay_names_the_command_that_installs_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "ROOT", root / "nowhere")
    with pytest.raises(ValueError, match=r"pip install --no-deps --target .*nowhere"):
        stage.run(settings(root, output_uri="never"))
    with pytest.raises(ValueError, match="no complete model artifact"):
        read_manifest(str(root / "never"), "model")


def test_a_quantized_model_is_not_quantized_again(root: Path, quantized: Manifest) -> None:
    with pytest.raises(ValueError, match="is quantized already; name the model it was made from"):
        stage.run(settings(root, model_uri="quantized", output_uri="never"))
