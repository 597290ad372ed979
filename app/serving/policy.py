"""What a key's requests and answers may contain: one policy per key, by name.

Categories of forbidden phrases that refuse, kinds of personal data that are masked or refuse, and how sure the
classifier of meaning must be. It decides nothing; moderation.py does.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from app.config import Config
from app.privacy import KINDS

HAN = re.compile("[\u3400-\u9fff]")


class Policy(Config):
    """One key's rules. The default blocks every category and masks what identifies a person for life."""

    categories: tuple[str, ...] | None = Field(None, description="categories that refuse; null for all that are known")
    pii_mask: tuple[str, ...] = Field(
        ("resident_id", "bank_card", "passport"), description="kinds of personal data to mask"
    )
    pii_block: tuple[str, ...] = Field((), description="kinds of personal data that refuse")
    semantics: bool = Field(False, description="judge meaning as well: a request, an answer that is not streamed")
    semantics_threshold: float = Field(0.6, gt=0, lt=1, description="probability of harm from which on it refuses")
    refusal_zh: str = Field(
        "抱歉，这个请求或回答涉及不允许的内容，无法继续。", description="said to who writes Chinese"
    )
    refusal_en: str = Field(
        "Sorry, this request or its answer touches content that is not allowed here.", description="said to others"
    )

    @field_validator("pii_mask", "pii_block")
    @classmethod
    def _are_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"no such kind of personal data: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
        return kinds

    @model_validator(mode="after")
    def _is_either(self) -> Policy:
        if both := set(self.pii_mask) & set(self.pii_block):
            raise ValueError(f"masked or blocked, not both: {', '.join(sorted(both))}")
        return self

    def refusal(self, request: str) -> str:
        """The refusal in the language of the request: Chinese if it holds Chinese characters."""
        return self.refusal_zh if HAN.search(request) else self.refusal_en
