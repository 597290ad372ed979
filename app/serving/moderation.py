"""The content filter's verdicts: allow, mask or block a request or an answer, under the policy of a key.

Forbidden phrases by lexicon.py, personal data by app/privacy.py, and if the policy says so meaning by semantics.py. A
phrase or a probability blocks; personal data is replaced by placeholders or blocks. It logs nothing and keeps no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from app.privacy import find_pii, mask_pii
from app.serving.lexicon import OWN_WORDS, Lexicon, Match, Term, read_terms
from app.serving.policy import Policy
from app.serving.semantics import Classifier

Action = Literal["allow", "mask", "block"]
Message = Mapping[str, Any]  # of the OpenAI schema: role, and content as a string or a list of parts


@dataclass(frozen=True)
class Verdict:
    """What to do, why and where; the text after masking, which is not shown when the verdict is printed."""

    action: Action
    categories: tuple[str, ...] = ()
    spans: tuple[Match, ...] = ()  # places in the text that was judged; meaning has none
    text: str = field(default="", repr=False)


def build_moderator(
    policies: Mapping[str, Policy], word_uris: Sequence[str] = (), encoder_dir: str = "", own_words: bool = True
) -> Moderator:
    """The moderator with our words and the users' files, and a classifier if a policy asks for one.

    Raises ValueError for a bad word file and for a category that a policy names and nothing finds.
    """
    uris = [*([str(OWN_WORDS)] if own_words else []), *word_uris]
    terms = [term for uri in uris for term in read_terms(uri)]
    wanted = any(policy.semantics for policy in policies.values())
    return Moderator(policies, terms, Classifier.from_examples(encoder_dir) if wanted else None)


class Moderator:
    """Judges texts; one per process, shared by all requests."""

    def __init__(
        self, policies: Mapping[str, Policy], terms: Iterable[Term], classifier: Classifier | None = None
    ) -> None:
        self._policies = dict(policies)
        self._lexicon = Lexicon(terms)
        self._classifier = classifier
        self.lexicon = cache(self._lexicon_of)
        known = self._lexicon.categories | set(classifier.categories if classifier else ())
        for name, policy in self._policies.items():
            if unknown := set(policy.categories or ()) - known:
                raise ValueError(
                    f"policies.{name}.categories: {', '.join(sorted(unknown))}: no word list has such a category; "
                    f"known: {', '.join(sorted(known))}"
                )
            if policy.semantics and not classifier:
                raise ValueError(f"policies.{name}.semantics: the moderator was built without a classifier")

    def policy(self, name: str) -> Policy:
        """The policy of that name. Raises ValueError if there is none."""
        if name not in self._policies:
            raise ValueError(f"no policy named {name!r}; there are {', '.join(self._policies) or 'none'}")
        return self._policies[name]

    def _lexicon_of(self, categories: tuple[str, ...] | None) -> Lexicon:
        return self._lexicon if categories is None else self._lexicon.only(categories)

    def check_input(self, messages: Sequence[Message], policy: Policy) -> Verdict:
        """The verdict on a request: the text is all its texts, a line each. Masked messages are mask_messages'."""
        return self._check("\n".join(text for message in messages for text in texts_of(message)), policy)

    def check_output(self, text: str, policy: Policy) -> Verdict:
        """The verdict on a whole answer."""
        return self._check(text, policy)

    def mask_messages(self, messages: Sequence[Message], policy: Policy) -> list[dict[str, Any]]:
        """Copies of the messages with personal data masked as the policy says; all else is as it was."""
        return [_masked(message, policy) for message in messages] if policy.pii_mask else [*map(dict, messages)]

    def _check(self, text: str, policy: Policy) -> Verdict:
        masked, counts = mask_pii(text, policy.pii_mask)
        matches = self._forbidden(text, masked, policy)
        if policy.semantics and not matches and self._classifier:
            category, probability = self._classifier.judge(text)
            if probability >= policy.semantics_threshold and (
                policy.categories is None or category in policy.categories
            ):
                return Verdict("block", (category,))
        if matches:
            return blocked(matches)
        if not counts:
            return Verdict("allow", text=text)
        spans = tuple(Match(one.kind, one.start, one.end) for one in find_pii(text, policy.pii_mask))
        return Verdict("mask", tuple(sorted(counts)), spans, masked)

    def forbidden(self, text: str, policy: Policy) -> list[Match]:
        """Phrases in the masked text, for that is what is passed on, and personal data of the kinds that refuse."""
        return self._forbidden(text, mask_pii(text, policy.pii_mask)[0], policy)

    def _forbidden(self, text: str, masked: str, policy: Policy) -> list[Match]:
        matches = self.lexicon(policy.categories).find(masked)
        if policy.pii_block:
            kinds = {*policy.pii_block, *policy.pii_mask}  # the longer of two wins, whatever becomes of it
            found = [one for one in find_pii(text, sorted(kinds)) if one.kind in policy.pii_block]
            matches = sorted([*matches, *(Match(one.kind, one.start, one.end) for one in found)], key=lambda m: m.start)
        return matches


def blocked(matches: Sequence[Match]) -> Verdict:
    """The verdict on a text with these forbidden places."""
    return Verdict("block", tuple(sorted({match.category for match in matches})), tuple(matches))


def texts_of(message: Message) -> list[str]:
    """The texts in its content; none if it is not as it should be."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if _is_text(part)] if isinstance(content, list) else []


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _masked(message: Message, policy: Policy) -> dict[str, Any]:
    def mask(text: str) -> str:
        return mask_pii(text, policy.pii_mask)[0]

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": mask(content)}
    parts = [{**part, "text": mask(part["text"])} if _is_text(part) else part for part in content or ()]
    return {**message, "content": parts} if isinstance(content, list) else dict(message)
