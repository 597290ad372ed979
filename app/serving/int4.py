"""A 4-bit linear kernel for vLLM on CPUs whose vLLM build has none (AVX2), as a vLLM general plugin.

vLLM's own kernel wants AVX-512 operators; without them AWQ models load and fail at the first token. This one packs the
weights for torch's `_weight_int4pack_mm_for_cpu`. It steps in only on the CPU platform and only when vLLM's operator
is missing; elsewhere `register` does nothing. Activations and scales go through bfloat16, the kernel's fast path.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("vllm.zero_to_one")

GROUP_SIZES = (32, 64, 128, 256)
MIDDLE = 8  # torch's kernel computes (q - 8) · scale + zero


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
    kernels.insert(0, _kernel_class())  # register_linear_kernel appends: vLLM's own would still win


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


def matmul(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [..., K] times the transposed packed weights [N, K], in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)
    return product.to(x.dtype).reshape(*x.shape[:-1], -1)


def _kernel_class() -> type[Any]:
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel, MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    class Int4LinearKernel(MPLinearKernel):
        """x · Wᵀ with 4-bit W in groups, symmetric (uint4b8) or with zero points (uint4)."""

        num_layers = packed_bytes = float32_bytes = 0

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
            """From compressed-tensors' layout: packed [N, K/8], scales [N, K/G], zero points [N/8, K/G]."""
            weight, scales, zero_points, _ = self._get_weight_params(layer)
            if weight.input_dim == 0:
                raise ValueError("int4 kernel: only weights of shape [output, input] are known")
            quantized = unpack_quantized_values_into_int32(weight.data, self.config.weight_type, 1)
            scales_by_group = scales.data.t() if scales.output_dim == 0 else scales.data
            zeros = None
            if self.config.zero_points and zero_points is not None:
                zeros = unpack_quantized_values_into_int32(
                    zero_points.data, self.config.weight_type, zero_points.packed_dim
                )
                zeros = zeros.t() if zero_points.output_dim == 0 else zeros
            packed, scales_and_zeros = pack(quantized, scales_by_group, zeros)
            self._transform_param(layer, self.w_q_name, lambda _: packed)
            self._transform_param(layer, self.w_s_name, lambda _: scales_and_zeros)
            if self.w_zp_name:
                setattr(layer, self.w_zp_name, None)
            self._count(packed.nbytes + scales_and_zeros.nbytes, quantized.nbytes)

        @classmethod
        def _count(cls, packed_bytes: int, float32_bytes: int) -> None:
            cls.num_layers += 1
            cls.packed_bytes += packed_bytes
            cls.float32_bytes += float32_bytes
            share = 100 * cls.packed_bytes / cls.float32_bytes
            layers, held, whole = cls.num_layers, cls.packed_bytes, cls.float32_bytes
            logger.info("int4 kernel: %d layers, %d bytes held, %.1f %% of %d in float32", layers, held, share, whole)

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            packed, scales_and_zeros, _, _ = self._get_weight_params(layer)
            product = matmul(x, packed, scales_and_zeros, self.config.group_size)
            return product if bias is None else product + bias

    return Int4LinearKernel
