"""AWQ's scales and clipping found by AutoAWQ, applied to the model in place; awq.py then rounds and packs.

AutoAWQ (https://github.com/casper-hansen/AutoAWQ, MIT) is no longer maintained; it is here because many know its
results. It does not write its own file layout: both backends end in compressed-tensors, so that no consumer needs a
branch. Imports AutoAWQ, so it runs only where its overlay is on the path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.quantization.config import QuantizeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def search(model: PreTrainedModel, windows: Sequence[Sequence[int]], config: QuantizeConfig) -> None:
    """Scale and clip the weights of the decoder's layers, calibrated on token windows of one length (lists of ids).

    Raises ValueError for an architecture that AutoAWQ does not know.
    """
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from awq.quantize.quantizer import AwqQuantizer

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        """AutoAWQ's, which restores the weights that it tries scales on also where they are in the CPU's memory.

        It keeps them as `tensor.cpu()`, which is the same tensor there, and spoils it with the first scales.
        """

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, inspected: Any, *rest: Any) -> Any:
            plain = inspected.state_dict
            inspected.state_dict = lambda: {name: tensor.clone() for name, tensor in plain().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, inspected, *rest)
            finally:
                del inspected.state_dict

    kind = model.config.model_type
    if kind not in AWQ_CAUSAL_LM_MODEL_MAP:
        raise ValueError(f"backend: AutoAWQ does not know the architecture {kind}; use llm-compressor")
    wrapped = AWQ_CAUSAL_LM_MODEL_MAP[kind](model, kind, False, model.config, None, None)
    settings = {"w_bit": 4, "q_group_size": config.group_size, "zero_point": not config.symmetric, "version": "GEMM"}
    if config.ignore:
        wrapped.modules_to_not_convert = config.ignore
    wrapped.quantize(
        quant_config=settings,
        calib_data=[list(window) for window in windows],
        max_calib_samples=len(windows),
        max_calib_seq_len=len(windows[0]),
        export_compatible=True,
        quantizer_cls=Quantizer,
    )
