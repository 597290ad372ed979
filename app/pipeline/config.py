"""Settings of the whole pipeline: a section for each stage, usually the stage's own YAML file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.config import RunConfig
from app.corpus.config import CorpusConfig
from app.evaluation.config import EvaluateConfig, EvaluateQuantizedConfig, ParityConfig
from app.quantization.config import QuantizeConfig
from app.serving.config import DeployConfig
from app.tokens.config import PackConfig, TokenizerConfig
from app.training.config import TrainConfig


class PipelineConfig(RunConfig):
    """Settings of `run_pipeline`; its storage_uri and overwrite are those of every stage."""

    prepare_corpus: CorpusConfig
    train_tokenizer: TokenizerConfig = TokenizerConfig()
    pack_tokens: PackConfig = PackConfig()
    train_model: TrainConfig = TrainConfig()
    evaluate_model: EvaluateConfig = EvaluateConfig()
    quantize_model: QuantizeConfig = QuantizeConfig()
    evaluate_quantized: EvaluateQuantizedConfig | None = Field(
        None, description="settings of the quantized model's evaluation; none: bits per byte and next tokens only"
    )
    deploy_model: DeployConfig | None = Field(None, description="settings of the endpoint; none: not deployed")
    check_parity: ParityConfig | None = Field(None, description="the gate behind the endpoint; none: not checked")

    def sections(self) -> dict[str, RunConfig]:
        """The stages' settings by job name, in order, with this run's storage."""
        run = {"storage_uri": self.storage_uri, "overwrite": self.overwrite}
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value.with_overrides(run) for name, value in values if isinstance(value, RunConfig)}

    def plan(self) -> list[str]:
        """The plans of all stages."""
        return [f"{name}: {line}" for name, section in self.sections().items() for line in section.plan()]


class ShowLineageConfig(RunConfig):
    """Settings of `show_lineage`."""

    artifact_uri: str = Field("quantized", description="artifact whose origin is told, a model for a card")
    kind: Literal["corpus", "augmented", "tokenizer", "tokens", "model", "adapter", "report"] = Field(
        "model", description="its kind"
    )
    card: bool = Field(False, description="write README.md, a model card, into the model's folder")
    report_uris: tuple[str, ...] = Field(
        ("report", "quantized-report", "parity"), description="evaluations that the card may show"
    )

    def plan(self) -> list[str]:
        """What is read, and what is written."""
        uri = self.resolve(self.artifact_uri)
        return [f"walk the manifests from {uri}", *([f"write {uri}/README.md"] if self.card else [])]
