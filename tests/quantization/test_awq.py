from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.quantization.awq import (
    choose_windows,
    linear_sizes,
    refuse_blocks,
    refuse_experts,
    refuse_group_size,
    refuse_layer_group_sizes,
)
from app.quantization.config import QuantizeConfig


def test_sizes_of_packed_linear_layers(tmp_path: Path) -> None:
    rows, columns, group = 64, 256, 128
    save_file(
        {
            "layer.weight_packed": np.zeros((rows, columns // 8), np.int32),
            "layer.weight_scale": np.zeros((rows, columns // group), np.float32),
            "layer.weight_zero_point": np.zeros((rows // 8, columns // group), np.int32),
            "layer.weight_shape": np.array([rows, columns]),
            "embedding.weight": np.zeros((1000, 256), np.float32),
        },
        tmp_path / "model.safetensors",
    )
    sizes = linear_sizes(tmp_path)
    assert sizes["linear_float32_bytes"] == rows * columns * 4
    assert sizes["linear_weight_bytes"] == rows * columns // 2 + rows * 2 * 4 + rows // 8 * 2 * 4 + 16
    assert sizes["linear_percent"] == pytest.approx(
        100 * sizes["linear_weight_bytes"] / sizes["linear_float32_bytes"], abs=0.01
    )


def test_calibration_windows_are_full_and_depend_on_the_seed_only() -> None:
    documents = [[number] * 7 for number in range(50)]
    windows = choose_windows(documents, 5, 10, seed=1)
    assert [len(window) for window in windows] == [10] * 5
    assert choose_windows(documents, 5, 10, seed=1) == windows != choose_windows(documents, 5, 10, seed=2)
    with pytest.raises(ValueError, match="fewer than 1000 tokens"):
        choose_windows(documents, 5, 1000, seed=1)


def test_a_group_size_that_does_not_divide_a_width_is_refused() -> None:
    refuse_group_size({"hidden_size": 256, "intermediate_size": 768}, 128)
    with pytest.raises(ValueError, match=r"128 does not divide the model's intermediate_size 704; use \[32, 64\]"):
        refuse_group_size({"hidden_size": 256, "intermediate_size": 704}, 128)


def test_a_mixture_of_experts_is_refused() -> None:
    refuse_experts({"hidden_size": 256})
    with pytest.raises(ValueError, match="a mixture of experts is not quantized yet"):
        refuse_experts({"hidden_size": 256, "num_experts": 8})


def test_chosen_blocks_are_refused() -> None:
    refuse_blocks({"hidden_size": 256})
    with pytest.raises(ValueError, match="attention_block_tokens is not quantized yet"):
        refuse_blocks({"hidden_size": 256, "attention_block_tokens": 128})


def test_sizes_of_layers_name_layers_that_can_be_served() -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", "lm_head")
    layers = [f"model.layers.{index}.{name}" for index in range(2) for name in names]
    others = ["model", *(f"model.layers.{index}.{name}" for index in range(2) for name in ("self_attn", "mlp"))]

    def refuse(sizes: dict[str, int]) -> None:
        refuse_layer_group_sizes(layers, others, QuantizeConfig.model_validate({"layer_group_sizes": sizes}))

    refuse({})
    refuse({"re:.*(q|k|v)_proj": 32, "re:.*down_proj": 64, "model.layers.1.self_attn.o_proj": 32})
    with pytest.raises(ValueError, match=r"re:down_proj: no linear layer has such a name"):  # it matches from the start
        refuse({"re:down_proj": 32, "re:.*o_proj": 32})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.qkv_proj is one .* gets sizes \[32, 128\]"):
        refuse({"model.layers.1.self_attn.v_proj": 32})
    with pytest.raises(
        ValueError, match=r"re:\.\*self_attn names model\.layers\.0\.self_attn, which is no linear layer"
    ):
        refuse({"re:.*self_attn": 32})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj .* gets sizes \[32, 64\]"):
        refuse({"re:.*down_proj": 64, "re:.*mlp.d": 32})
