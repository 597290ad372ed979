"""Settings of the evaluation stage."""

from __future__ import annotations

from pydantic import Field

from app.config import RunConfig


class EvaluateConfig(RunConfig):
    """Settings of `evaluate_model`."""

    model_uri: str = Field("model", description="model artifact to evaluate")
    corpus_uri: str = Field("corpus", description="corpus artifact; its held-out split is the test text")
    output_uri: str = Field("report", description="where report.json and report.html go")
    max_documents: int = Field(1000, ge=1, description="held-out documents scored for bits per byte")
    num_continuations: int = Field(32, ge=0, description="held-out documents continued for BLEU and ROUGE")
    prompt_tokens: int = Field(48, ge=1, description="tokens of a document that the model is shown")
    continuation_tokens: int = Field(48, ge=1, description="tokens it writes, compared with the document's own")
    num_shards: int = Field(2, ge=1, description="Ray tasks that share the documents; the figures do not depend on it")

    def plan(self) -> list[str]:
        """What is read and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        return [f"evaluate {self.resolve(self.model_uri)} on {self.resolve(self.corpus_uri)}/held_out", *states(self)]


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
