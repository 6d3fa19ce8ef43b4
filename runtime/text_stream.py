"""Tokens in, text out, piece by piece.

A piece of text is pushed out as soon as nothing that follows can change it:

- a character whose bytes come from several tokens (byte-level BPE) waits for its last byte;
- byte tokens of SentencePiece ('<0xE2>') wait for the end of their run: its decoder takes a run as a whole and turns
  all of it into U+FFFD when it is not valid UTF-8;
- what may be the beginning of a stop string waits until it is one or can't be one any more.

All pushed pieces together are what decoding all tokens at once gives.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

_REPLACEMENT = "\ufffd"
_CONTEXT = 4
"""Tokens kept in front of new ones. An unfinished UTF-8 character has at most three bytes, so it lies within as many
tokens; one more keeps the first new token from being decoded as the first of the text, which loses its space."""


class TextStream:
    """The text of one sequence while it grows. Each token costs the decoding of a few, however long the text is.

    Args:
        decode: token ids → text.
        has_text: whether a token has any (special tokens and ids outside the vocabulary have none).
        byte_tokens: tokens that stand for one byte each and whose text is settled only when their run ends.
        stop: strings that end the text. Of two, the one that is complete first counts.
        min_tokens: the text of so many tokens is let through without looking for stop strings.

    Attributes:
        stopped: a stop string was found; the text has ended before it, and further tokens are ignored.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        has_text: Callable[[int], bool],
        byte_tokens: Container[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self.stopped = False
        self._decode = decode
        self._has_text = has_text
        self._byte_tokens = byte_tokens
        self._stop = tuple(stop)
        self._unchecked = min_tokens
        self._window: list[int] = []  # the last tokens: some that are out already, then those that are not
        self._shown = 0  # characters of the window's text that are out
        self._held = ""  # settled text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take one more token; return the text that has become certain."""
        if self.stopped:
            return ""
        new = self._settled(token)
        if self._unchecked > 0:
            self._unchecked -= 1
            return new
        return self._before_stop(new)

    def finish(self) -> str:
        """The text that was held back. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._before_stop(self._decode(self._window)[self._shown :])
        self._window, self._shown = [], 0
        held, self._held = self._held, ""
        return text + held

    def _settled(self, token: int) -> str:
        """The new text that no later token can change."""
        if not self._has_text(token):
            return ""
        self._window.append(token)
        if token in self._byte_tokens:
            return ""
        text = self._decode(self._window)
        # A U+FFFD at the end may be a character that lacks bytes; one further left will stay.
        settled = len(text) - text.endswith(_REPLACEMENT)
        new = text[self._shown : settled]
        self._shown = settled
        if len(self._window) > 2 * _CONTEXT:
            del self._window[:-_CONTEXT]
            self._shown -= len(text) - len(self._decode(self._window))
        return new

    def _before_stop(self, new: str) -> str:
        """Append to the held text; return what lies before a stop string, or before what may become one."""
        if not self._stop:
            return new
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        certain = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
