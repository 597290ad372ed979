"""An answer on its way to the client, with nothing forbidden in what is sent, however the chunks are cut.

Of what has come in, the end that could still become a phrase or personal data is held back; the rest goes out, masked.
At a forbidden phrase the answer ends before it. Each chunk is judged together with the last characters sent.
It does not judge meaning: that needs whole sentences, and a sentence held back is latency.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.privacy import find_pii
from app.serving.lexicon import Match
from app.serving.moderation import Moderator, Verdict, blocked
from app.serving.policy import Policy

CONTEXT = 160  # characters sent before that still count: labels of numbers, borders of words
MAX_RUN = 480  # characters of a number or an address that are held back; the longest e-mail address is shorter
DECIDES = 6  # characters after a number that may say what it is: "元", ".5", "/13", "号楼"
SHORT = 4  # the same for the beginning of a number that has no digit yet

_PROVINCES = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
_DIGITS = "0-9０-９()（）+\uff0b"
_SPACES = " \u00a0\u3000"
_JOINED = (
    f"(?:[{_DIGITS}A-Za-zＡ-Ｚａ-ｚ_.%@:：·•\u30fb\uff20\uff0d\u2010-\u2015\u2212-]"
    f"|(?<=[{_DIGITS}])[{_SPACES}](?=[{_DIGITS}]|\\Z))"
)
_PLATE = f"[{_PROVINCES}](?:[A-Z\uff21-\uff3a](?:[{_SPACES}](?=[A-Z0-9Ａ-Ｚ０-９]|\\Z))?)?"
_RUN = re.compile(f"{_PLATE}{_JOINED}*|{_JOINED}+")
_NUMBER = re.compile("[0-9０-９]")
_ADDRESS = re.compile("[@\uff20:：]")


class HeldBack:
    """One streamed answer: push what the engine says, send what push returns; stop when `blocked` is set.

    Its spans are counted from the beginning of what was sent.
    """

    def __init__(self, moderator: Moderator, policy: Policy) -> None:
        self.blocked: Verdict | None = None
        self._moderator, self._policy = moderator, policy
        self._lexicon = moderator.lexicon(policy.categories)
        self._kinds = sorted({*policy.pii_mask, *policy.pii_block})
        self._sent = ""  # the last characters of it
        self._held = ""
        self._num_sent = 0

    @property
    def held(self) -> str:
        """What has come in and was not sent."""
        return self._held

    def push(self, delta: str) -> str:
        """What may be sent now that this has come in; nothing once the answer is blocked."""
        if self.blocked or not delta:
            return ""
        self._held += delta
        text = self._sent + self._held
        numbers = pii_alive_from(text, self._kinds)
        if numbers < len(text):  # a word that a number makes a part of another one stands alone beside a placeholder
            alone = {*self._lexicon.find(text[:numbers])} - {*self._lexicon.find(text)}
            numbers = min([numbers, *(one.start for one in alone)])
        cut = min(self._lexicon.alive_from(text), numbers)
        return self._release(text, max(cut, len(self._sent)), is_last=False)

    def finish(self) -> str:
        """The rest of the answer, when nothing more comes in."""
        text = self._sent + self._held
        return "" if self.blocked else self._release(text, len(text), is_last=True)

    def _release(self, text: str, cut: int, is_last: bool) -> str:
        """Send text up to the cut, or up to the first forbidden place before it."""
        begin = len(self._sent)
        found = [one for one in self._find_pii(text) if one.end > begin]
        cut = max(begin, min([cut, *(one.start for one in found if one.start < cut < one.end)]))
        cut = self._stop(cut, [one for one in found if one.category in self._policy.pii_block])
        masked, cut = self._mask(text, cut)
        if masked != text and not is_last:  # a word beside a number was a part of it, and is none beside a placeholder
            cut = max(begin, min(cut, self._lexicon.alive_from(masked)))
        cut = self._stop(cut, self._lexicon.find(masked))
        sent = masked[begin:cut]
        self._held = "" if self.blocked else masked[cut:]
        self._num_sent += len(sent)
        self._sent = masked[:cut][-CONTEXT:]
        return sent

    def _stop(self, cut: int, forbidden: Sequence[Match]) -> int:
        """The cut, or the first of these that begins before it and has not been sent; then the answer is blocked."""
        begin = len(self._sent)
        if matches := sorted(
            (one for one in forbidden if one.end > begin and one.start < cut), key=lambda one: one.start
        ):
            shift = self._num_sent - begin
            self.blocked = blocked([Match(one.category, one.start + shift, one.end + shift) for one in matches])
            return max(begin, matches[0].start)
        return cut

    def _find_pii(self, text: str) -> list[Match]:
        return [Match(one.kind, one.start, one.end) for one in find_pii(text, self._kinds)] if self._kinds else []

    def _mask(self, text: str, cut: int) -> tuple[str, int]:
        """The text with placeholders before the cut, and where the cut is now.

        Again and again, as what the longer of two left over may be a finding itself.
        """
        begin = len(self._sent)
        while found := [one for one in self._find_pii(text) if one.end > begin and one.start < cut]:
            start, end = max(found[0].start, begin), min(found[0].end, cut)
            placeholder = f"[{found[0].category.upper()}]"
            text = text[:start] + placeholder + text[end:]
            cut += len(placeholder) - (end - start)
        return text, cut


def pii_alive_from(text: str, kinds: Sequence[str]) -> int:
    """Where the longest end of the text begins that could be, or become, a part of personal data."""
    end = len(text)
    if not kinds:
        return end
    for run in _RUN.finditer(text, max(0, end - MAX_RUN - DECIDES)):
        start, stop = run.span()
        if stop < end - DECIDES:
            continue
        has_digits, is_plate = bool(_NUMBER.search(run[0])), run[0][0] in _PROVINCES
        if stop == end:
            may_be_long = has_digits or "email" in kinds or _ADDRESS.search(run[0])
            return start if may_be_long or is_plate else max(start, end - SHORT)
        enough = len(_NUMBER.findall(run[0])) >= SHORT or (has_digits and is_plate)
        if enough or _ADDRESS.search(run[0]):
            return start
    return end
