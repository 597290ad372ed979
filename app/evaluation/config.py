"""Settings of the evaluation stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.config import Config, RunConfig


class ChoiceConfig(Config):
    """A benchmark of questions with choices, on local files."""

    name: str = Field(pattern=r"^\w+$", description="how its figures are called")
    uri: str = Field(description="cmmlu, ceval: the folder as published; jsonl: file, folder or glob of questions")
    layout: Literal["cmmlu", "ceval", "jsonl"] = Field("jsonl", description="how the files are laid out")
    shots: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="examples shown before")
    examples_uri: str = Field("", description="jsonl: the questions shown as examples")
    subjects: list[str] = Field([], description="only these; none: all")
    max_questions: int | None = Field(None, ge=1, description="of each subject; None: all")
    answer_form: Literal["letter", "text"] = Field("letter", description="jsonl: what is compared of each choice")
    endpoint_url: str = Field("", description="ask this OpenAI endpoint, https://…/v1, instead of the model directory")
    endpoint_model: str = Field("zero-to-one", description="the model's name at the endpoint")

    @model_validator(mode="after")
    def _examples_are_there(self) -> ChoiceConfig:
        if self.layout == "jsonl" and any(self.shots) and not self.examples_uri:
            raise ValueError("shots above 0 need examples_uri, a jsonl file of questions that are not scored")
        if self.layout != "jsonl" and self.answer_form == "text":
            raise ValueError(f"answer_form: {self.layout} is defined on letters")
        return self


class SpeedConfig(Config):
    """How fast the endpoint's engine, vLLM, decodes the model; not measured without batch sizes."""

    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field([], description="sequences at once, as [1, 8, 32]")
    prompt_tokens: int = Field(32, ge=1, description="of each sequence, from held-out documents")
    new_tokens: int = Field(64, ge=1, description="decoded for each sequence")
    num_runs: int = Field(5, ge=1, description="of each batch size, after one that does not count")
    num_gpus: int = Field(1, ge=1, description="that share the model; on a CPU it has all cores but one")
    enforce_eager: bool = Field(False, description="do not compile: a faster start, and slower steps")


class EvaluateConfig(RunConfig):
    """Settings of `evaluate_model`."""

    model_uri: str = Field("model", description="model artifact to evaluate")
    corpus_uri: str = Field("corpus", description="corpus artifact; its held-out split is the test text")
    output_uri: str = Field("report", description="where report.json and report.html go")
    max_documents: int = Field(1000, ge=1, description="held-out documents scored for bits per byte")
    num_continuations: int = Field(32, ge=0, description="held-out documents continued for BLEU, ROUGE and so on")
    prompt_tokens: int = Field(48, ge=1, description="tokens of a document that the model is shown")
    continuation_tokens: int = Field(48, ge=1, description="tokens it writes, compared with the document's own")
    bertscore_dir: str = Field("", description="BERTScore's encoder, a folder on each node; none: the bundled one")
    bertscore_layer: int = Field(8, ge=0, description="of bertscore_dir: hidden states after this layer are compared")
    choices: list[ChoiceConfig] = Field([], description="benchmarks of questions with choices")
    speed: SpeedConfig = SpeedConfig()
    num_workers: int = Field(2, ge=1, description="Ray actors that share the work; no figure depends on it")

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluateConfig:
        names = [one.name for one in self.choices]
        if len(set(names)) < len(names):
            raise ValueError(f"choices: names must differ, got {', '.join(names)}")
        return self

    def plan(self) -> list[str]:
        """What is read and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        benchmarks = "".join(f", {one.name}" for one in self.choices)
        if self.speed.batch_sizes:
            benchmarks += f", tokens/s of {', '.join(map(str, self.speed.batch_sizes))} sequences at once"
        held_out = f"{self.resolve(self.corpus_uri)}/held_out"
        return [f"evaluate {self.resolve(self.model_uri)} on {held_out}{benchmarks}", *states(self)]


class EvaluateQuantizedConfig(EvaluateConfig):
    """The same of the quantized model."""

    model_uri: str = Field("quantized", description="model artifact to evaluate")
    output_uri: str = Field("quantized-report", description="where report.json and report.html go")


class ParityConfig(RunConfig):
    """Settings of `check_parity`."""

    served_uri: str = Field("quantized", description="model artifact that the endpoint serves")
    model_uri: str = Field("model", description="model it was made from; compared, not judged")
    corpus_uri: str = Field("corpus", description="corpus artifact; its held-out split gives the prompts")
    output_uri: str = Field("parity", description="where report.json goes")
    deployed_uri: str = Field("serve_config.yaml", description="what deploy_model wrote; tells the endpoint's address")
    endpoint_url: str = Field("", description="http://host:port/v1; empty for OPENAI_BASE_URL or what was deployed")
    model_id: str = Field("zero-to-one", description="the model's name at the endpoint")
    num_prompts: int = Field(16, ge=1, description="held-out documents asked about")
    prompt_tokens: int = Field(32, ge=1, description="tokens of a document that are sent")
    answer_tokens: int = Field(16, ge=1, description="tokens of each greedy answer")
    max_logprob_gap: float = Field(
        0.1, gt=0, description="gate, nats: 1e-3 holds for float32; 4-bit kernels compute in bfloat16"
    )

    def plan(self) -> list[str]:
        """What is asked and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        return [f"ask {self.endpoint_url or 'the endpoint'} {self.num_prompts} prompts", *states(self)]
