"""Matrix products of linear layers in 8 bits (FP8), by torchao: numbers are scaled and rounded as they are multiplied.

After Micikevicius et al. 2022 (arXiv:2209.05433): E4M3, with one scale for a tensor (and E5M2 for gradients) or one for
each of its rows. Weights, optimizer states and checkpoints stay what they are, and so does the exported model. Where
the chip has no FP8, as a CPU, operands are rounded all the same and multiplied in the wide type: its numbers, not its
speed. The output layer, attention itself and norms are left alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

MULTIPLE = 16  # of both widths of a layer; what the chip's products ask for
CAPABILITY = (8, 9)  # CUDA's, of the first chips that have it: Ada; then Hopper


def convert(model: Any, recipe: str, emulate: bool) -> int:
    """Make the model's linear layers multiply in FP8, in place; how many. `recipe` is tensorwise or rowwise.

    Raises ValueError when no layer could be, or the GPU has no FP8.
    """
    import torch
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    output = model.get_output_embeddings()

    def fits(layer: torch.nn.Module, name: str) -> bool:
        assert isinstance(layer, torch.nn.Linear)
        return layer is not output and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0

    if not emulate and torch.cuda.get_device_capability() < CAPABILITY:
        raise ValueError("float8: this GPU has no FP8; set it to none, and dtype to bfloat16")
    settings = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model, module_filter_fn=fits, config=settings)
    if not (converted := sum(isinstance(layer, Float8Linear) for layer in model.modules())):
        raise ValueError(f"float8: no linear layer of the model has widths that {MULTIPLE} divides; set it to none")
    return converted
