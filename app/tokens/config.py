"""Settings of the tokenizer and the packing stage."""

from __future__ import annotations

from pydantic import Field

from app.config import RunConfig


class TokenizerConfig(RunConfig):
    """Settings of `train_tokenizer`."""

    corpus_uri: str = Field("corpus", description="corpus artifact; its train split is learned from")
    output_uri: str = Field("tokenizer", description="where the tokenizer goes, in the Hugging Face layout")
    vocab_size: int = Field(8000, ge=300, description="tokens, special ones and the 256 bytes included")
    min_frequency: int = Field(2, ge=1, description="a pair seen less often is not merged")
    max_training_bytes: int = Field(2 << 30, ge=1, description="text to learn from; more is left out")

    def plan(self) -> list[str]:
        """What is read and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        return [f"learn {self.vocab_size} tokens from {self.resolve(self.corpus_uri)}/train", *states(self)]


class PackConfig(RunConfig):
    """Settings of `pack_tokens`."""

    corpus_uri: str = Field("corpus", description="corpus artifact")
    tokenizer_uri: str = Field("tokenizer", description="tokenizer artifact, or the folder of the model to start from")
    output_uri: str = Field("tokens", description="where the token blocks go")
    block_tokens: int = Field(256, ge=8, description="T, tokens in a block; the context a model is trained on")

    def plan(self) -> list[str]:
        """What is read and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        return [f"pack {self.resolve(self.corpus_uri)} into blocks of {self.block_tokens} tokens", *states(self)]
