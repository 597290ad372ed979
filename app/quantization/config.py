"""Settings of the quantization stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.config import RunConfig


class QuantizeConfig(RunConfig):
    """Settings of `quantize_model`."""

    model_uri: str = Field("model", description="model artifact to quantize")
    corpus_uri: str = Field("corpus", description="corpus artifact: calibration text, and held-out text to compare on")
    output_uri: str = Field("quantized", description="where the 4-bit model goes, in the Hugging Face layout")
    backend: Literal["llm-compressor", "autoawq"] = Field(
        "llm-compressor", description="what searches AWQ's scales; AutoAWQ is slower and not maintained any more"
    )
    group_size: Literal[32, 64, 128] = Field(
        128, description="weights that share a scale; must divide all input widths"
    )
    layer_group_sizes: dict[str, Literal[32, 64, 128]] = Field(
        {}, description="other sizes, by name or re:pattern of linear layers: smaller where rounding costs most"
    )
    symmetric: bool = Field(False, description="scales only, instead of scales and zero points")
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq", description="of the scaled weights; gptq makes up for errors in later columns, nearest is AWQ alone"
    )
    ignore: list[str] = Field(["lm_head"], description="linear layers left as they are, by name or re:pattern")
    num_calibration_samples: int = Field(64, ge=1, description="windows of clean text that AWQ looks at")
    num_comparison_documents: int = Field(200, ge=1, description="held-out documents for the bits-per-byte comparison")
    max_loss_percent: float = Field(
        2.0, description="gate: bits per byte may grow by so much on held-out text; above, serving refuses the model"
    )
    search: bool = Field(False, description="try smaller groups, down to 32, until the gate is passed")
    num_cpus: int = Field(2, ge=1, description="CPUs of the task, each a thread; AWQ searches on them without a GPU")
    seed: int = Field(0, ge=0, description="choice of the calibration text")

    @model_validator(mode="after")
    def _autoawq_can_do_less(self) -> QuantizeConfig:
        if self.backend == "autoawq" and any(name.startswith("re:") for name in self.ignore):
            raise ValueError("ignore: AutoAWQ takes parts of names, not re:patterns; or use backend llm-compressor")
        if self.backend == "autoawq" and self.layer_group_sizes:
            raise ValueError("layer_group_sizes: AutoAWQ has one size for all; use backend llm-compressor")
        return self

    def plan(self) -> list[str]:
        """What is read and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        sizes = ", then ".join(map(str, self.group_sizes))
        what = f"quantize {self.resolve(self.model_uri)} to 4-bit AWQ by {self.backend}, groups of {sizes}"
        what += "".join(f", {layers}: {size}" for layers, size in self.layer_group_sizes.items())
        return [f"{what}; gate at {self.max_loss_percent:+g} % bits per byte", *states(self)]

    @property
    def group_sizes(self) -> list[int]:
        """Those to try in order, the smallest files first."""
        return [size for size in (128, 64, 32) if size <= self.group_size] if self.search else [self.group_size]
