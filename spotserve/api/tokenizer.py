"""Text to token ids and back with a model folder's own files, without importing transformers.

`tokenizer.json` holds the whole pipeline, BOS and EOS included (transformers ignores `add_bos_token` beside it);
`tokenizer_config.json` holds the chat template; `generation_config.json` and `config.json` the EOS ids and sampling
defaults. Nothing in a folder is executed but the chat template, in a process of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from tokenizers import Tokenizer

from spotserve.api.chat_template import ChatTemplate
from spotserve.core.frozen import Frozen
from spotserve.errors import ModelError

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LONGEST_TOKEN_BYTES = 16
"""Bytes per token assumed at least when a text is refused as too long before it is tokenised."""


class GenerationDefaults(Frozen):
    """What a folder says about generating: where to stop and how to sample unless a request says else."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000)

    @classmethod
    def load(cls, folder: Path) -> GenerationDefaults:
        """Read `generation_config.json`, and `config.json` for EOS ids that it does not name.

        `do_sample: false` means greedy, which is temperature 0.
        """
        generation = _read_json(folder / "generation_config.json")
        config = _read_json(folder / "config.json")
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        fields: dict[str, Any] = {
            name: generation[name] for name in ("temperature", "top_p", "top_k") if generation.get(name) is not None
        }
        if generation.get("do_sample") is False:
            fields["temperature"] = 0.0
        try:
            return cls(eos_token_ids=_as_ids(eos), **fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(
                f"{folder}/generation_config.json: {first['loc'][0]} {first['input']!r}: {first['msg']}"
            ) from error


class TextCodec:
    """The tokenizer of a folder: encodes prompts, decodes tokens, renders chats."""

    def __init__(
        self, tokenizer: Tokenizer, *, eos_token_ids: Sequence[int] = (), template: ChatTemplate | None
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.template = template
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        self._visible = frozenset(vocabulary.values()) - special - set(eos_token_ids)
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._decoders = _decoders(tokenizer)
        self._decoder_kinds = {str(decoder["type"]) for decoder in self._decoders}
        self._token_bytes: dict[int, bytes | None] = {}
        self._longest_token_bytes = max(
            (len(token.encode(errors="replace")) for token in vocabulary), default=_LONGEST_TOKEN_BYTES
        )

    @classmethod
    def load(cls, folder: Path) -> TextCodec | None:
        """The codec of a model folder; None when it has no `tokenizer.json`, so that it serves ids only.

        Raises:
            ModelError: A file is there but cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every kind of broken file
            raise ModelError(f"{path} cannot be read: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, config)
        template = None if source is None else ChatTemplate(source, _special_tokens(config))
        return cls(tokenizer, eos_token_ids=GenerationDefaults.load(folder).eos_token_ids, template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, as transformers would give."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def hidden(self, token_id: int) -> bool:
        """True for special tokens, EOS and ids past the tokenizer's own vocabulary: they have no text."""
        return token_id not in self._visible

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token alone stands for, special ones as they are written; None for an id the tokenizer lacks.

        Tokens of byte-level tokenizers, and byte fallbacks, may be parts of characters.
        """
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = self._find_bytes(token_id)
        return self._token_bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        kinds = self._decoder_kinds
        if "ByteLevel" in kinds and all(letter in _BYTE_OF for letter in token):
            return bytes(_BYTE_OF[letter] for letter in token)
        fallback = _BYTE_FALLBACK.fullmatch(token)
        if "ByteFallback" in kinds and fallback is not None:
            return bytes([int(fallback[1], 16)])
        if kinds & {"Replace", "Metaspace"}:
            for decoder in self._decoders:
                token = _replaced(token, decoder)
            return token.encode()
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()

    def max_text_bytes(self, max_tokens: int) -> int:
        """A longer text cannot be `max_tokens` tokens; it is refused before it is tokenised."""
        return max_tokens * max(self._longest_token_bytes, _LONGEST_TOKEN_BYTES)

    def close(self) -> None:
        """End the template's process."""
        if self.template is not None:
            self.template.close()


def _letters_of_bytes() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _decoders(tokenizer: Tokenizer) -> tuple[dict[str, Any], ...]:
    """The steps by which a tokenizer makes text of tokens, as `tokenizer.json` has them."""
    if tokenizer.decoder is None:
        return ()
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return tuple(decoder["decoders"]) if decoder["type"] == "Sequence" else (decoder,)


def _replaced(token: str, decoder: dict[str, Any]) -> str:
    """A token's letters after one decoder that exchanges some."""
    if decoder["type"] == "Metaspace":
        return token.replace(decoder["replacement"], " ")
    pattern = decoder.get("pattern", {}).get("String")
    return token.replace(pattern, decoder["content"]) if decoder["type"] == "Replace" and pattern else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _as_ids(value: Any) -> tuple[int, ...]:
    """EOS ids are an int or a list of ints on disk."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens, each a string or an object with `content` on disk."""
    tokens = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own wins over `tokenizer_config.json`; of several the one named default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
