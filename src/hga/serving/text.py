"""From tokens to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text of an answer as its tokens come. `stopped` once a stop string was met; the text ends before it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._first = 0
        self._shown = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain now: whole characters, and no beginning of a stop string."""
        self._ids.append(token)
        # Decoding a few tokens before the new ones tells how they join, without decoding the whole answer again.
        before = self._decode(self._ids[self._first : self._shown])
        text = self._decode(self._ids[self._first :])
        if len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._first, self._shown = self._shown, len(self._ids)
        return self._release(text[len(before) :])

    def end(self) -> str:
        """What was still held back."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._first : self._shown])
        rest = self._release(self._decode(self._ids[self._first :])[len(before) :])
        if self.stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        """Move what no stop string can take back any more from `_held` to the reader."""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            # The one that was complete first, so that it does not matter in which pieces the text came.
            certain, self._held, self.stopped = self._held[: min(found)[1]], "", True
            return certain
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain = self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]
        return certain

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
