"""From token ids to the text a client sees, one token at a time, and where a stop string ends it.

The text of a choice is defined as a fold over its tokens, so it does not depend on how the tokens were cut into
chunks: streaming, non-streaming, `GET /v1/requests/{id}` and the ledger's stop judgement all run this one fold.
A piece of text leaves the fold only when no later token can change it: never half a multi-byte character, and
never the beginning of what may become a stop string.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_CUT_EVERY_TOKENS = 32
"""Undecided tokens (broken bytes) after which the detokeniser looks for a safe place to let go of some."""
_KEPT_SCANS = 256


class TokenDecoder(Protocol):
    """What text needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these ids, broken bytes as U+FFFD."""

    def hidden(self, token_id: int) -> bool:
        """True for an id that never shows: special tokens, ids the tokenizer does not know."""


class Detokenizer:
    """The text of a growing list of tokens; a trailing U+FFFD may be half a character, so it waits.

    `_context` are the tokens of the last piece: decoding them along keeps decoders right that treat the first
    token of a text differently (a stripped leading space).
    """

    __slots__ = ("_context", "_context_text", "_decoder", "_pending")

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token settles, often its own, sometimes none."""
        if self._decoder.hidden(token_id):
            return ""
        self._pending.append(token_id)
        piece = self._pending_text(len(self._pending))
        if piece and not piece.endswith(_REPLACEMENT):
            self._settle(len(self._pending))
            return piece
        if len(self._pending) % _CUT_EVERY_TOKENS == 0:
            return self._cut(piece)
        return ""

    def finish(self) -> str:
        """What is left when no token follows; a broken character shows as U+FFFD."""
        piece = self._pending_text(len(self._pending)) if self._pending else ""
        self._settle(len(self._pending))
        return piece

    def _pending_text(self, count: int) -> str:
        pending = self._pending[:count]
        whole = self._decoder.decode(self._context + pending)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        return self._decoder.decode(pending)

    def _settle(self, count: int) -> None:
        self._context, self._pending = self._pending[:count], self._pending[count:]
        self._context_text = self._decoder.decode(self._context) if self._context else ""

    def _cut(self, piece: str) -> str:
        for count in range(len(self._pending) - 1, 0, -1):
            head = self._pending_text(count)
            if head + self._decoder.decode(self._pending[count:]) == piece:
                self._settle(count)
                return head
        return ""


class Joint:
    """What a decoder strips at the beginning of a text, and shows where that text follows another: a space, mostly."""

    __slots__ = ("_before", "_decoder", "_is_past")

    def __init__(self, decoder: TokenDecoder, before: Sequence[int]) -> None:
        self._decoder = decoder
        self._before = before
        self._is_past = not before

    def push(self, token_id: int) -> str:
        """What is to be put before the text of this token: nothing but for the first one that shows."""
        if self._is_past or self._decoder.hidden(token_id):
            return ""
        self._is_past = True
        last = next((other for other in reversed(self._before) if not self._decoder.hidden(other)), None)
        if last is None:
            return ""
        head, alone = self._decoder.decode([last]), self._decoder.decode([token_id])
        both = self._decoder.decode([last, token_id])
        # Otherwise both are bytes of one character, and each text has its own half of it.
        is_behind = both.startswith(head) and both.endswith(alone) and len(both) > len(head) + len(alone)
        return both[len(head) : len(both) - len(alone)] if is_behind else ""


class ChoiceText:
    """The visible text of one choice: detokenised, cut at the earliest stop string, possible beginnings held back."""

    __slots__ = ("_detokenizer", "_held", "_min_tokens", "_stops", "num_tokens", "stopped")

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        """A stop string that is complete within the first `min_tokens` tokens is text like any other."""
        self._detokenizer = Detokenizer(decoder)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._held = ""
        self.num_tokens = 0
        """Tokens taken so far; the one that completes a stop string is the last."""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that becomes visible with these tokens. Tokens after a completed stop string are not taken."""
        visible = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            visible.append(self._release(self._detokenizer.push(token_id), final=False))
        return "".join(visible)

    def close(self) -> str:
        """What was held back, when the choice has ended."""
        if self.stopped:
            return ""
        return self._release(self._detokenizer.finish(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        if not self._stops:
            return piece
        text = self._held + piece
        if self.num_tokens > self._min_tokens:
            # It must end in the new piece: what is held may hold one that was complete too early.
            starts = [text.find(stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stops]
            found = [at for at in starts if at >= 0]
            if found:
                self.stopped = True
                self._held = ""
                return text[: min(found)]
        keep_from = len(text) if final else min(_possible_start(text, stop) for stop in self._stops)
        self._held = text[keep_from:]
        return text[:keep_from]


def _possible_start(text: str, stop: str) -> int:
    """Where the earliest suffix of `text` begins that is a proper beginning of `stop`; its length if none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)


def visible_text(
    decoder: TokenDecoder, token_ids: Sequence[int], stops: Sequence[str], *, closed: bool, min_tokens: int = 0
) -> str:
    """The text a client may see of a choice with these tokens."""
    text = ChoiceText(decoder, stops, min_tokens)
    visible = text.push(token_ids)
    return visible + text.close() if closed else visible


class StopJudge:
    """Says where new tokens complete a stop string; the ledger asks it as it appends.

    A pure function of its arguments: what it remembers of earlier calls only saves folding from the first token
    again. One thread at a time may call it.
    """

    def __init__(self, decoder: TokenDecoder | None) -> None:
        self._decoder = decoder
        self._scans: OrderedDict[tuple[tuple[str, ...], int, tuple[int, ...]], ChoiceText] = OrderedDict()

    def __call__(
        self, stops: Sequence[str], token_ids: Sequence[int], new_ids: Sequence[int], min_tokens: int = 0
    ) -> int | None:
        """How many of `new_ids` are kept because a stop string is complete then; None if none is.

        Args:
            stops: The stop strings of the request.
            token_ids: The choice's tokens so far, none of which completed a stop string.
            new_ids: Tokens that follow them.
            min_tokens: So many tokens of the choice complete no stop string.
        """
        if self._decoder is None or not stops:
            return None
        before = tuple(token_ids)
        scan = self._scans.pop((tuple(stops), min_tokens, before), None)
        if scan is None:
            scan = ChoiceText(self._decoder, stops, min_tokens)
            scan.push(before)
        scan.push(new_ids)
        if scan.stopped:
            return max(0, scan.num_tokens - len(before))
        self._scans[(tuple(stops), min_tokens, (*before, *new_ids))] = scan
        if len(self._scans) > _KEPT_SCANS:
            self._scans.popitem(last=False)
        return None
