"""What of a model one worker has where several share it: its share of each matrix, or its stage of a pipeline.

Pure arithmetic on TrainConfig; what the parts take in memory is estimate.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from app.training.config import TrainConfig
from app.training.sizes import Parameters, count_parameters, stage_costs
from app.training.stages import balance


@dataclass(frozen=True)
class Part:
    """What of the model one worker has: all of it, its share of each matrix, or its stage of a pipeline."""

    config: TrainConfig  # the job, its model as narrow and with as many layers as the part
    parameters: Parameters
    passes: int = 1  # forward passes whose activations it holds at once
    is_first: bool = True
    is_last: bool = True


def parts_of(config: TrainConfig, vocab_size: int, num_devices: int) -> list[Part]:
    """One part for each stage; of workers that share matrices or tokens each has as much as the others.

    A stage holds the activations of the passes that later stages have not sent back yet (one forward, one backward:
    Narayanan et al. 2021, arXiv:2104.04473).
    """
    narrow, stages = _narrow(config), config.pipeline_stages
    if stages == 1:
        whole = count_parameters(narrow.model, vocab_size)
        return [Part(narrow, replace(whole, head=whole.head // config.tensor_parallel))]  # a tied one stays whole
    passes, parts = config.accumulation_steps(num_devices), []
    for index, (start, end) in enumerate(pairwise(balance(stage_costs(config.model, vocab_size), stages).bounds)):
        is_first, is_last = index == 0, index == stages - 1
        cut = narrow.with_overrides({"model.num_layers": end - start})
        whole = count_parameters(cut.model, vocab_size)
        parameters = replace(
            whole,
            embedding=whole.embedding if is_first or (is_last and not whole.head) else 0,  # both ends have a tied one
            head=whole.head if is_last else 0,
            norms=whole.norms - (0 if is_last else config.model.hidden_size),
        )
        parts.append(Part(cut, parameters, min(stages - index, passes), is_first, is_last))
    return parts


def _narrow(config: TrainConfig) -> TrainConfig:
    """The job with the heads and the MLP's width that one of the workers has that share matrices."""
    model, degree = config.model, config.tensor_parallel
    if degree == 1:
        return config
    shares = {
        name: getattr(model, name) // degree for name in ("num_heads", "num_key_value_heads", "intermediate_size")
    }
    changes = {f"model.{name}": share for name, share in shares.items()}
    return config.with_overrides({**changes, "model.head_size": model.head_width})
