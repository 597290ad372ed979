"""A 4-bit linear kernel for vLLM on CPUs whose vLLM build has none (AVX2), as a vLLM general plugin.

vLLM's own kernel wants AVX-512 operators; without them AWQ models load and fail at the first token. This one packs the
weights for torch's `_weight_int4pack_mm_for_cpu`. It steps in only on the CPU platform and only when vLLM's operator
is missing; elsewhere `register` does nothing. Activations and scales go through bfloat16, the kernel's fast path; many
rows at once, as in a prompt, are faster through weights dequantized for the moment. It knows no activation reordering.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger("vllm.zero_to_one")

GROUP_SIZES = (32, 64, 128, 256)
MIDDLE = 8  # torch's kernel computes (q - 8) · scale + zero
WIDE_ROWS = 64  # from here on dequantizing costs less than it saves: 1.6 times faster at 256 rows, 2 times at 2048
BLOCK = 32  # output channels that torch packs together on AVX2: n in the low half of a byte, n + 16 in the high half


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
    """Put the kernel first among vLLM's CPU kernels, if this machine needs it. Called by vLLM in each process."""
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu():
        return
    import vllm._custom_ops  # noqa: F401  loads the compiled operators
    from vllm.model_executor.kernels import linear

    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if hasattr(torch.ops._C, "cpu_gemm_wna16") or any(kernel.__name__ == "Int4LinearKernel" for kernel in kernels):
        return
    # `register_linear_kernel` would append, and vLLM's own, which cannot run here, would still win.
    kernels[:] = [_kernel_class(), *(kernel for kernel in kernels if kernel.__name__ != "CPUWNA16LinearKernel")]


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


def unpack(packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """The weights as float32 [K, N], from what `pack` returned on an AVX2 machine."""
    num_outputs, num_inputs = packed.shape[0], packed.shape[1] * 2
    num_groups = scales_and_zeros.shape[0]
    blocks = packed.view(num_outputs // BLOCK, num_inputs, BLOCK // 2)
    quantized = torch.cat([blocks & 15, blocks >> 4], -1).permute(1, 0, 2).reshape(num_groups, -1, num_outputs)
    scales, zeros = scales_and_zeros.float().unsqueeze(1).unbind(-1)  # [K/G, 1, N]
    return torch.addcmul(zeros - MIDDLE * scales, quantized.float(), scales).view(num_inputs, num_outputs)


@torch.library.custom_op("zero_to_one::int4_matmul", mutates_args=())  # opaque to torch.compile: M varies at run time
def matmul(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the transposed packed weights [N, K]: [M, N] in the dtype of x."""
    _held.log_once()
    if x.shape[0] >= WIDE_ROWS and torch.backends.cpu.get_cpu_capability() == "AVX2":  # others pack differently
        return (x.float() @ unpack(packed, scales_and_zeros)).to(x.dtype)
    group_size = x.shape[1] // scales_and_zeros.shape[0]
    rows = x.to(torch.bfloat16).contiguous()
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)
    return product.to(x.dtype)


@matmul.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _kernel_class() -> type[Any]:
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
            if c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8) or c.has_g_idx:
                return False, "only 4-bit weights without activation reordering"
            if c.group_size not in GROUP_SIZES or c.partition_weight_shape[0] % c.group_size:
                return False, f"group size must be one of {GROUP_SIZES} and divide the input width"
            if c.partition_weight_shape[1] % 32:
                return False, "output width must be a multiple of 32"
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """From compressed-tensors' layout (packed [N, K/8], scales [N, K/G], zero points [N/8, K/G]), or AutoAWQ's
            as vLLM has reordered it (packed [K/8, N], scales [K/G, N], zero points [K/G, N/8])."""
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
