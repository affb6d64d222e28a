"""What a client sees of one choice: text and logprobs, as a fold over its tokens.

Streams, whole answers, `GET /v1/requests/{id}` and its continuations run this one fold, so they agree whatever happened
in between. An echoed prompt comes first; what follows is what would come without it, behind the space that some
decoders strip at the beginning of a text. Stop strings are sought without that space, as the ledger's judge does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from spotserve.api.text import ChoiceText, Detokenizer, Joint
from spotserve.api.tokenizer import TextCodec
from spotserve.core.ports import NewRequest, RequestView
from spotserve.core.sampling import TokenLogprobs

Kind = Literal["completion", "chat"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What some tokens add: text, and one entry for each token whose logprob is told."""

    text: str = ""
    entries: tuple[Any, ...] = ()

    def __add__(self, other: Piece) -> Piece:
        return Piece(self.text + other.text, self.entries + other.entries)


class ChoiceFold:
    """One choice of an accepted request, token by token."""

    def __init__(self, request: NewRequest | RequestView, codec: TextCodec | None) -> None:
        self.kind: Kind = "chat" if request.keep_text.get("kind") == "chat" else "completion"
        self.tells_logprobs = request.sampling.logprobs is not None
        self._echoed = request.prompt_ids if request.keep_text.get("echo") else None
        self._codec = codec
        self._text = None if codec is None else ChoiceText(codec, request.stop, request.sampling.min_tokens)
        self._joint = None if codec is None or self._echoed is None else Joint(codec, self._echoed)
        self._offsets = Offsets(codec, self._echoed or ()) if self.tells_logprobs else None

    def begin(self, prompt_logprobs: Sequence[TokenLogprobs] = ()) -> Piece:
        """What comes with the first token, before it: the prompt, where it is echoed."""
        if self._echoed is None:
            return Piece()
        # Logprobs are of every token but the first; a request that failed before has none.
        is_told = self.tells_logprobs and len(prompt_logprobs) == len(self._echoed) - 1
        pieces = _pieces(self._codec, self._echoed)
        text = "".join(pieces)
        if self._offsets is not None:
            self._offsets.skip(len(text))
        if not is_told:
            return Piece(text)
        offsets = accumulate(map(len, pieces), initial=0)
        return Piece(text, tuple(map(self._entry, self._echoed, (None, *prompt_logprobs), offsets)))

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> Piece:
        """The next tokens."""
        text = "" if self._text is None else self._text.push(token_ids)
        if self._joint is not None:
            # It comes with the first token that shows, so nothing of the text has been told before.
            text = "".join(map(self._joint.push, token_ids)) + text
        if self._offsets is None:
            return Piece(text)
        offsets = [self._offsets.next(token_id) for token_id in token_ids]
        return Piece(text, tuple(map(self._entry, token_ids, logprobs, offsets)))

    def close(self) -> Piece:
        """What was held back, when the choice has ended."""
        return Piece("" if self._text is None else self._text.close())

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """A piece's logprobs in OpenAI's shape, None when nobody asked."""
        if not self.tells_logprobs:
            return None
        if self.kind == "chat":
            return {"content": list(piece.entries), "refusal": None}
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        columns = zip(*piece.entries, strict=True) if piece.entries else ((), (), (), ())
        return {name: list(column) for name, column in zip(names, columns, strict=True)}

    def _entry(self, token_id: int, logprobs: TokenLogprobs | None, offset: int) -> Any:
        if self.kind == "chat":
            assert logprobs is not None
            top = [self._chat_token(*ranked) for ranked in logprobs.top]
            return {**self._chat_token(token_id, logprobs.logprob), "top_logprobs": top}
        name = token_name(self._codec, token_id)
        if logprobs is None:
            return (name, None, None, offset)
        by_name: dict[str, float] = {}
        for other, logprob in logprobs.top:
            by_name.setdefault(token_name(self._codec, other), logprob)
        return (name, logprobs.logprob, {**by_name, name: logprobs.logprob}, offset)

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = None if self._codec is None else self._codec.token_bytes(token_id)
        name = token_name(self._codec, token_id)
        return {"token": name, "logprob": logprob, "bytes": None if data is None else list(data)}


class Offsets:
    """Where each token begins in the text that is told, before anything of it is cut off or held back."""

    __slots__ = ("_detokenizer", "_joint", "_length")

    def __init__(self, codec: TextCodec | None, before: Sequence[int] = ()) -> None:
        """`before` are the tokens of an echoed prompt, whose text is skipped."""
        self._detokenizer = None if codec is None else Detokenizer(codec)
        self._joint = None if codec is None else Joint(codec, before)
        self._length = 0

    def skip(self, length: int) -> None:
        """So much text comes before the next token."""
        self._length += length

    def next(self, token_id: int) -> int:
        """The offset of the next token; one that ends a character has that of the token that began it."""
        at = self._length
        if self._detokenizer is not None and self._joint is not None:
            self._length += len(self._joint.push(token_id)) + len(self._detokenizer.push(token_id))
        return at


def _pieces(codec: TextCodec | None, token_ids: Sequence[int]) -> list[str]:
    """The text that each token settles, and what is left at the end."""
    if codec is None:
        return [""] * (len(token_ids) + 1)
    detokenizer = Detokenizer(codec)
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


def token_name(codec: TextCodec | None, token_id: int) -> str:
    """A token as text; `bytes:\\x..` where it is part of a character, its id where there is no tokenizer."""
    if codec is None:
        return str(token_id)
    data = codec.token_bytes(token_id)
    if data is None:
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def whole_choice(request: RequestView, codec: TextCodec | None, index: int) -> tuple[str, dict[str, Any] | None]:
    """Text and logprobs of a choice as far as it has come."""
    choice = request.choices[index]
    fold, piece = ChoiceFold(request, codec), Piece()
    if choice.token_ids or choice.finish_reason is not None:
        piece = fold.begin(choice.prompt_logprobs) + fold.push(choice.token_ids, choice.logprobs)
    if choice.finish_reason is not None:
        piece += fold.close()
    return piece.text, fold.logprobs(piece)
