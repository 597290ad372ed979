"""The 4-bit kernel against dequantized float32 weights."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.models import load_model, load_tokenizer
from app.serving import int4
from tests.serving.tiny import TEXT, dequantize, pack_words, write_autoawq

pytestmark = pytest.mark.slow

ROWS, NARROW, WIDE = 192, 5, 200
NUM_LAYERS = 8  # two blocks of qkv, o, gate_up, down
LOGPROB_TOLERANCE = 0.1  # of activations in bfloat16; logprobs here are about -3
BFLOAT16_ERROR = 0.01  # relative; bfloat16 keeps 8 bits of a mantissa


def weights(num_inputs: int, group_size: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random values [N, K], scales [N, K/G], exact in bfloat16, and zero points [N, K/G]."""
    generator = torch.Generator().manual_seed(group_size)
    shape = (ROWS, num_inputs // group_size)
    quantized = torch.randint(0, 16, (ROWS, num_inputs), generator=generator, dtype=torch.int32)
    scales = torch.rand(shape, generator=generator).to(torch.bfloat16).float()
    zero_points = torch.randint(0, 16, shape, generator=generator, dtype=torch.int32)
    return quantized, scales, torch.full_like(zero_points, 8) if symmetric else zero_points


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_equal_the_dequantized_ones(group_size: int, symmetric: bool) -> None:
    quantized, scales, zero_points = weights(512, group_size, symmetric)
    reference = dequantize(quantized, scales, zero_points)
    packed, scales_and_zeros = int4.pack(quantized, scales.t(), None if symmetric else zero_points.t())
    assert packed.nbytes * 8 == reference.nbytes
    for num_rows, tolerance in ((1, BFLOAT16_ERROR), (NARROW, BFLOAT16_ERROR), (WIDE, BFLOAT16_ERROR / 2)):
        x = torch.randn(num_rows, 512, generator=torch.Generator().manual_seed(1))
        product = int4.matmul(x, packed, scales_and_zeros)
        assert product.dtype == x.dtype
        assert relative_error(product, x @ reference.t()) < tolerance


@pytest.mark.parametrize("num_inputs", [256, 6144], ids=["all blocks at once", "one at a time"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_many_rows_are_multiplied_in_float32(num_inputs: int, symmetric: bool) -> None:
    if not int4.block_outputs(ROWS):
        pytest.skip("torch packs otherwise here, and matmul does not dequantize")
    quantized, scales, zero_points = weights(num_inputs, 32, symmetric)
    reference = dequantize(quantized, scales, zero_points)
    packed, scales_and_zeros = int4.pack(quantized, scales.t(), None if symmetric else zero_points.t())
    x = torch.randn(WIDE, num_inputs, generator=torch.Generator().manual_seed(1))
    product = int4.wide_matmul(x, packed, scales_and_zeros)
    assert relative_error(product, x @ reference.t()) < (1e-6 if symmetric else 2e-3)  # zeros are kept in bfloat16


def test_the_operator_is_fit_for_torch_compile() -> None:
    quantized, scales, _ = weights(256, 32, symmetric=True)
    packed, scales_and_zeros = int4.pack(quantized, scales.t(), None)
    torch.library.opcheck(int4.matmul, (torch.randn(3, 256), packed, scales_and_zeros))


@pytest.fixture(name="plugin")
def plugin_fixture() -> Iterator[Any]:
    """vLLM's table of linear kernels with ours registered; left as it was found."""
    import vllm._custom_ops  # noqa: F401  loads the compiled operators
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu():
        pytest.skip("the kernel is for CPUs")
    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    before = list(kernels)
    int4.register()
    int4.register()
    assert [kernel.__name__ for kernel in kernels].count("Int4LinearKernel") == 1
    yield linear
    kernels[:] = before


def layer_config(zero_points: bool, group_size: int = 32, act_type: torch.dtype = torch.float32) -> Any:
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    return MPLinearLayerConfig(
        full_weight_shape=(256, ROWS),
        partition_weight_shape=(256, ROWS),
        weight_type=scalar_types.uint4 if zero_points else scalar_types.uint4b8,
        act_type=act_type,
        group_size=group_size,
        zero_points=zero_points,
        has_g_idx=False,
    )


def parameter(data: torch.Tensor, **dims: int) -> torch.nn.Parameter:
    """A parameter that says which dimension is what, as vLLM's do."""
    made = torch.nn.Parameter(data.contiguous(), requires_grad=False)
    for name, value in dims.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("layout", ["compressed-tensors", "autoawq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_vllm_chooses_it_and_it_reads_both_layouts(plugin: Any, layout: str, symmetric: bool) -> None:
    quantized, scales, zero_points = weights(256, 32, symmetric)
    layer = torch.nn.Module()
    layer.z = parameter(pack_words(zero_points.t().contiguous()).t(), input_dim=1, output_dim=0, packed_dim=0)
    if layout == "compressed-tensors":
        layer.w = parameter(pack_words(quantized), input_dim=1, output_dim=0, packed_dim=1)
        layer.s = parameter(scales, input_dim=1, output_dim=0)
    else:
        layer.w = parameter(pack_words(quantized).t(), input_dim=0, output_dim=1, packed_dim=0)
        layer.s = parameter(scales.t(), input_dim=0, output_dim=1)
    config = layer_config(zero_points=not symmetric)
    chosen = plugin.choose_mp_linear_kernel(config)
    assert chosen.__name__ == "Int4LinearKernel"
    kernel = chosen(config, "w", "s", None if symmetric else "z")
    kernel.process_weights_after_loading(layer)
    x, bias = torch.randn(2, NARROW, 256), torch.randn(ROWS)
    reference = x @ dequantize(quantized, scales, zero_points).t() + bias
    assert relative_error(kernel.apply_weights(layer, x, bias), reference) < BFLOAT16_ERROR


def test_what_it_cannot_do_is_refused_at_load(plugin: Any) -> None:
    with pytest.raises(ValueError, match="group size must be one of"):
        plugin.choose_mp_linear_kernel(layer_config(zero_points=False, group_size=-1))


def test_it_leaves_to_vllm_what_vllm_can_do(plugin: Any) -> None:
    """On AVX-512 vLLM's own kernel computes in 16 bits, and fails in float32."""
    has_own = hasattr(torch.ops._C, "cpu_gemm_wna16")
    chosen = plugin.choose_mp_linear_kernel(layer_config(zero_points=True, act_type=torch.bfloat16))
    assert chosen.__name__ == ("CPUWNA16LinearKernel" if has_own else "Int4LinearKernel")
    assert plugin.choose_mp_linear_kernel(layer_config(zero_points=True)).__name__ == "Int4LinearKernel"


def answers(model: Path, prompts: list[list[int]], hide_avx512: bool) -> tuple[int, list[dict[int, float]]]:
    """Of vLLM's engine in this process, with the plugin that it finds by itself: layers in 4 bits, and logprobs."""
    if hide_avx512:  # from vLLM; from torch by ATEN_CPU_CAPABILITY
        for name in dir(torch.cpu):
            if name.startswith("_is_avx512") or name.startswith("_is_amx"):
                setattr(torch.cpu, name, lambda: False)
    import vllm

    engine = vllm.LLM(str(model), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 26, seed=0)
    options = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    found = []
    for prompt in prompts:  # one at a time: the number of rows chooses the way of multiplication
        (request,) = engine.generate({"prompt_token_ids": prompt}, options, use_tqdm=False)
        found.append({token: said.logprob for token, said in request.outputs[0].logprobs[0].items()})
    return int4._held.num_layers, found


HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize("hide_avx512", [False, True] if HAS_AVX512 else [False])
def test_an_engine_answers_from_autoawqs_files_as_from_the_dequantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hide_avx512: bool
) -> None:
    packed, twin = write_autoawq(tmp_path)
    ids, model = load_tokenizer(twin)(TEXT * 8)["input_ids"], load_model(twin)
    prompts = [ids[:20], ids[:120]]  # narrow and wide
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if hide_avx512:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # torch reads its capability when it is imported
        num_layers, answered = pool.submit(answers, packed, prompts, hide_avx512).result()
    assert num_layers == NUM_LAYERS
    for prompt, found in zip(prompts, answered, strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert len(found) == 5
        assert max(found, key=found.__getitem__) == wanted.argmax()
        assert list(found.values()) == pytest.approx(wanted[list(found)].tolist(), abs=LOGPROB_TOLERANCE)


def test_it_leaves_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms
    from vllm.model_executor.kernels import linear

    monkeypatch.setattr(vllm.platforms, "_current_platform", SimpleNamespace(is_cpu=lambda: False))
    before = {platform: list(kernels) for platform, kernels in linear._POSSIBLE_KERNELS.items()}
    int4.register()
    assert before == linear._POSSIBLE_KERNELS
