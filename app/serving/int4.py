"""A 4-bit linear kernel for vLLM on CPUs, where vLLM has none that computes, as a vLLM general plugin.

vLLM's own wants AVX-512 and activations of 16 bits; elsewhere AWQ models load and fail at the first token. This one
packs the weights for torch's `_weight_int4pack_mm_for_cpu`. It steps in only on the CPU platform, and leaves to vLLM
what vLLM can do. Activations and scales go through bfloat16, the kernel's fast path; many rows at once, as in a prompt,
are faster through weights dequantized block by block, while they stay in the cache. It knows no activation reordering.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger("vllm.zero_to_one")

GROUP_SIZES = (32, 64, 128, 256)
MIDDLE = 8  # torch's kernel computes (q - 8) · scale + zero
WIDE_ROWS = 32  # from here on dequantizing costs less than it saves: 1.1 times faster at 32 rows, 1.9 times at 256
BLOCKS = {"AVX2": 32, "AVX512": 64}  # output channels that torch packs together: n in the low half of a byte, and in
# the high half the one that stands half a block further
TILE_ELEMENTS = 1 << 18  # weights dequantized at a time: 1 MiB, half of a usual second-level cache


@dataclass
class _Held:
    """The weights that this process holds in 4 bits."""

    num_layers: int = 0
    packed_bytes: int = 0  # with scales and zeros
    float32_bytes: int = 0  # what the same weights would take
    is_logged: bool = False

    def add(self, packed_bytes: int, float32_bytes: int) -> None:
        self.num_layers += 1
        self.packed_bytes += packed_bytes
        self.float32_bytes += float32_bytes

    def log_once(self) -> None:
        """With the first product, when all layers are loaded: the line is the proof that the kernel is at work."""
        if self.is_logged or not self.num_layers:
            return
        self.is_logged = True
        share = 100 * self.packed_bytes / self.float32_bytes
        text = "int4 kernel at work: %d layers in %d bytes, %.1f %% of %d in float32"
        logger.info(text, self.num_layers, self.packed_bytes, share, self.float32_bytes)


_held = _Held()


def register() -> None:
    """Put the kernel first among vLLM's CPU kernels, if this machine needs it. Called by vLLM in each process.

    It is the project's one plugin, so it also makes the model family of block_qwen3.py known.
    """
    from vllm import ModelRegistry
    from vllm.platforms import PlatformEnum, current_platform

    from app import block_qwen3

    block_qwen3.register()
    name = block_qwen3.BlockSparseQwen3ForCausalLM.__name__
    ModelRegistry.register_model(name, f"app.serving.block_qwen3:{name}")
    if not current_platform.is_cpu():
        return
    import vllm._custom_ops  # noqa: F401  loads the compiled operators
    from vllm.model_executor.kernels import linear

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if any(kernel.__name__ == "Int4LinearKernel" for kernel in kernels):
        return
    has_own = hasattr(torch.ops._C, "cpu_gemm_wna16")
    # `register_linear_kernel` would append, and vLLM's own, which claims what it cannot run, would still win.
    own = [kernel for kernel in kernels if kernel.__name__ == "CPUWNA16LinearKernel"]
    others = [kernel for kernel in kernels if kernel not in own]
    kernels[:] = [_kernel_class(has_own), *(_in_16_bits(kernel) for kernel in own if has_own), *others]
    _let_autoawq_compute_in_float32()


def _let_autoawq_compute_in_float32() -> None:
    """vLLM refuses it for the sake of GPU kernels; for compressed-tensors, with the same CPU kernels, it does not."""
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

    supported = [*AutoAWQConfig.get_supported_act_dtypes(), torch.float32]
    AutoAWQConfig.get_supported_act_dtypes = classmethod(lambda cls: supported)


def pack(
    quantized: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights for `matmul`: 4-bit values [N, K] (0 to 15), scales [K/G, N], zero points [K/G, N] or None for 8.

    Returns packed weights (uint8, N·K/2 bytes) and scales with zeros [K/G, N, 2] in bfloat16.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.to(torch.int32).contiguous(), 1)
    scales = scales.float()
    zeros = torch.zeros_like(scales) if zero_points is None else (MIDDLE - zero_points.float()) * scales
    return packed, torch.stack([scales, zeros], -1).to(torch.bfloat16).contiguous()


def block_outputs(num_outputs: int) -> int:
    """Output channels that torch packs together on this machine; 0 where the layout is another."""
    block = BLOCKS.get(torch.backends.cpu.get_cpu_capability(), 0)
    return block if block and num_outputs % block == 0 else 0


def wide_matmul(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """`matmul` in float32 throughout, for float32 x, through a few blocks of dequantized weights at a time."""
    num_rows, num_inputs = x.shape
    block = block_outputs(packed.shape[0])
    num_groups, num_blocks, half = scales_and_zeros.shape[0], packed.shape[0] // block, block // 2
    halves = packed.view(num_blocks, num_inputs, half)
    by_block = scales_and_zeros.float().view(num_groups, num_blocks, 1, block, 2).transpose(0, 1)
    scales, zeros = by_block[..., 0].contiguous(), by_block[..., 1] - MIDDLE * by_block[..., 0]  # [N/B, K/G, 1, B]
    count = max(1, TILE_ELEMENTS // (num_inputs * block))
    tile = x.new_empty(count, num_inputs, block)
    product = x.new_empty(num_blocks, num_rows, block)
    for first in range(0, num_blocks, count):
        part = slice(first, min(first + count, num_blocks))
        weights = tile[: part.stop - first]  # [count, K, B]
        weights[..., :half] = halves[part] & 15
        weights[..., half:] = halves[part] >> 4
        grouped = weights.view(-1, num_groups, num_inputs // num_groups, block)
        torch.addcmul(zeros[part], grouped, scales[part], out=grouped)
        torch.bmm(x.expand(len(weights), -1, -1), weights, out=product[part])
    return product.transpose(0, 1).reshape(num_rows, -1)


@torch.library.custom_op("zero_to_one::int4_matmul", mutates_args=())  # opaque to torch.compile: M varies at run time
def matmul(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the transposed packed weights [N, K]: [M, N] in the dtype of x."""
    _held.log_once()
    if x.shape[0] >= WIDE_ROWS and block_outputs(packed.shape[0]):
        return wide_matmul(x.float(), packed, scales_and_zeros).to(x.dtype)
    group_size = x.shape[1] // scales_and_zeros.shape[0]
    rows = x.to(torch.bfloat16).contiguous()
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)
    return product.to(x.dtype)


@matmul.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _in_16_bits(kernel: type[Any]) -> type[Any]:
    """vLLM's own kernel, saying at load what it would say at the first token."""

    class CPUWNA16LinearKernel(kernel):  # type: ignore[misc]
        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            if c.act_type == torch.float32:
                return False, "vLLM's own kernel computes in 16 bits only"
            can: tuple[bool, str | None] = super().can_implement(c)
            return can

    return CPUWNA16LinearKernel


def _kernel_class(has_own: bool) -> type[Any]:
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel, MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    class Int4LinearKernel(MPLinearKernel):  # type: ignore[misc]
        """x · Wᵀ with 4-bit W in groups, symmetric (uint4b8) or with zero points (uint4)."""

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
            if has_own and c.act_type != torch.float32:
                return False, "vLLM's own kernel does it"
            if c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8) or c.has_g_idx:
                return False, "only 4-bit weights without activation reordering"
            if c.zero_points != (c.weight_type == scalar_types.uint4):
                return False, "uint4 needs zero points, and uint4b8 has none"
            if c.group_size not in GROUP_SIZES or c.partition_weight_shape[0] % c.group_size:
                return False, f"group size must be one of {GROUP_SIZES} and divide the input width"
            if c.partition_weight_shape[1] % 32:
                return False, "output width must be a multiple of 32"
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """From compressed-tensors' layout (packed [N, K/8], scales [N, K/G], zero points [N/8, K/G]), or AutoAWQ's
            as vLLM has reordered it (packed [K/8, N], scales [K/G, N], zero points [N/8, K/G])."""
            weight, scales, zero_points, _ = self._get_weight_params(layer)
            quantized = unpack_quantized_values_into_int32(weight.data, self.config.weight_type, weight.packed_dim)
            quantized = quantized.t() if weight.input_dim == 0 else quantized
            scales_by_group = scales.data.t() if scales.output_dim == 0 else scales.data
            zeros = None
            if self.config.zero_points:
                zeros = unpack_quantized_values_into_int32(
                    zero_points.data, self.config.weight_type, zero_points.packed_dim
                )
                zeros = zeros.t() if zero_points.output_dim == 0 else zeros
            packed, scales_and_zeros = pack(quantized, scales_by_group, zeros)
            self._transform_param(layer, self.w_q_name, lambda _: packed)
            self._transform_param(layer, self.w_s_name, lambda _: scales_and_zeros)
            if self.w_zp_name:
                setattr(layer, self.w_zp_name, None)
            _held.add(packed.nbytes + scales_and_zeros.nbytes, quantized.nbytes)

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            packed, scales_and_zeros, _, _ = self._get_weight_params(layer)
            product: torch.Tensor = matmul(x.reshape(-1, x.shape[-1]), packed, scales_and_zeros).reshape(
                *x.shape[:-1], -1
            )
            return product if bias is None else product + bias

    return Int4LinearKernel
