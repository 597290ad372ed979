"""Settings of the stage that packs conversations, and of the job that looks at them first."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.config import RunConfig


class ConversationsConfig(RunConfig):
    """What both jobs read, and how."""

    sources: tuple[str, ...] = Field(
        ("conversations.jsonl",), min_length=1, description="jsonl files or globs, plain or compressed"
    )
    layout: Literal["auto", "openai", "sharegpt", "alpaca", "preference"] = Field(
        "auto", description="of the records; auto: told by their keys, each by itself"
    )
    tokenizer_uri: str = Field(
        "tokenizer", description="tokenizer artifact, or the folder of the model to start from; its chat template rules"
    )
    block_tokens: int = Field(512, ge=8, description="T, tokens in a block: the longest conversation learned whole")
    too_long: Literal["truncate", "drop"] = Field(
        "truncate", description="a conversation of more than T tokens: its first T are learned, or nothing of it"
    )
    assistant_turns: Literal["all", "last"] = Field("all", description="answers that are learned from")
    pii: Literal["keep", "mask", "drop"] = Field(
        "keep", description="personal data: as it is, replaced by [MOBILE] and so on, or the conversation dropped"
    )
    max_malformed_percent: float = Field(
        1.0, ge=0, le=100, description="records that cannot be read; more of them are an error"
    )

    def source_uris(self) -> list[str]:
        """The sources with relative ones below storage_uri."""
        return [self.resolve(uri) for uri in self.sources]


class PackConversationsConfig(ConversationsConfig):
    """Settings of `pack_conversations`."""

    output_uri: str = Field("conversations", description="where the token blocks go")
    held_out_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the prompts, by their hash, that is not trained on but scored"
    )

    def plan(self) -> list[str]:
        """What is read and written."""
        from app.artifacts import states  # fsspec is not needed to answer --help

        what = f"pack {', '.join(self.source_uris())} into blocks of {self.block_tokens} tokens"
        return [f"{what}; {self.held_out_fraction:.0%} held out", *states(self)]


class CheckConversationsConfig(ConversationsConfig):
    """Settings of `check_conversations`."""

    examples: int = Field(2, ge=0, description="conversations that are shown as the model reads them")

    def plan(self) -> list[str]:
        """What is read."""
        return [f"read {', '.join(self.source_uris())}; nothing is written"]
