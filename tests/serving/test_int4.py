"""The 4-bit kernel against a dequantised float32 reference."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_rows", [1, 5, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_agrees_with_the_dequantised_weights(group_size: int, num_rows: int, symmetric: bool) -> None:
    import torch

    from app.serving.int4 import matmul, pack

    generator = torch.Generator().manual_seed(0)
    outputs, inputs = 96, 256
    quantized = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = torch.rand(inputs // group_size, outputs, generator=generator) * 0.02 + 0.005
    zero_points = None if symmetric else torch.randint(0, 16, (inputs // group_size, outputs), generator=generator)
    x = torch.randn(num_rows, inputs, generator=generator)

    middle = torch.full_like(scales, 8) if zero_points is None else zero_points.float()
    spread = [matrix.repeat_interleave(group_size, 0).t() for matrix in (middle, scales)]  # [N, K]
    expected = x @ ((quantized - spread[0]) * spread[1]).t()

    packed, scales_and_zeros = pack(quantized, scales, zero_points)
    got = matmul(x, packed, scales_and_zeros, group_size)
    assert packed.nbytes == outputs * inputs // 2
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.9999


def test_vllm_is_given_the_kernel_where_its_own_is_missing() -> None:
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from app.serving.int4 import register

    register()
    register()
    names = [kernel.__name__ for kernel in linear._POSSIBLE_KERNELS[PlatformEnum.CPU]]
    is_missing = not hasattr(torch.ops._C, "cpu_gemm_wna16")
    assert names.count("Int4LinearKernel") == (1 if is_missing else 0)
    assert not is_missing or names[0] == "Int4LinearKernel"
