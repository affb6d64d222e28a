"""What a client sent, read strictly: every bound is checked here before anything is allocated for the request.

One path serves every endpoint. Unknown fields are ignored; fields of a later version are refused when they ask for
something, never accepted silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import Field

from spotserve.api.choice import Kind
from spotserve.api.errors import HttpError
from spotserve.api.tokenizer import GenerationDefaults
from spotserve.core.frozen import Frozen
from spotserve.core.sampling import MAX_BIAS, MAX_BIASED_TOKENS, MAX_PENALTY, MAX_TOP_LOGPROBS
from spotserve.errors import RequestError

MAX_JSON_DEPTH = 64
MAX_CHOICES = 8
MAX_PROMPTS = 128
MAX_MESSAGES = 2048
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TIMEOUT_S = 30 * 86400.0
DEFAULT_COMPLETION_TOKENS = 16
MAX_COMPLETION_LOGPROBS = 5
MAX_SCORED_PROMPT_TOKENS = 4096
"""Prompt tokens whose logprobs may be asked for: they are kept until the first token, and travel with it."""
MAX_SCORED_TOKENS = 32_768
"""The same over all prompts and choices of a request; each token's logprobs take about 1 KB of memory."""

Prompt = str | tuple[int, ...]


class ModelInfo(Frozen):
    """The served model, as far as a client may ask about it."""

    name: str
    vocab_size: int = Field(ge=1)
    max_model_len: int = Field(ge=1)
    created_unix_s: int = 0
    defaults: GenerationDefaults = GenerationDefaults()


@dataclass(frozen=True, slots=True)
class Wishes:
    """All a generation request says beside its prompt. None: the client left it to us."""

    stream: bool
    include_usage: bool
    return_token_ids: bool
    num_choices: int
    max_tokens: int | None
    min_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    top_k: int
    ignore_eos: bool
    timeout_s: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    logprobs: int | None
    echo: bool


_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
_LATER_FIELDS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "allowed_token_ids": _NOTHING,
    "audio": _NOTHING,
    "bad_words": _NOTHING,
    "best_of": (None, 0, 1),
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": _NOTHING,
    "function_call": (*_NOTHING, "none", "auto"),
    "functions": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "include_stop_str_in_output": _NOTHING,
    "min_p": _NOTHING,
    "modalities": (*_NOTHING, ["text"]),
    "prompt_embeds": _NOTHING,
    "prompt_logprobs": (None,),
    "repetition_penalty": (*_NOTHING, 1),
    "response_format": (*_NOTHING, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "stop_token_ids": _NOTHING,
    "structured_outputs": _NOTHING,
    "suffix": _NOTHING,
    "tool_choice": (*_NOTHING, "none", "auto"),
    "tools": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "use_beam_search": _NOTHING,
}
"""Fields that ask for something we cannot do yet, with the values that ask for nothing."""


def read_json_object(data: bytes) -> dict[str, Any]:
    """A JSON object, read strictly.

    Raises:
        RequestError: Not UTF-8, not JSON, a duplicate key, a number that is no finite one, deeper than 64, a lone
            surrogate, or not an object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is invalid") from error
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise RequestError(f"the body nests deeper than {MAX_JSON_DEPTH}") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise RequestError("the body holds a number with too many digits") from error
    _check_tree(value)
    if not isinstance(value, dict):
        raise RequestError(f"the body is a {_kind(value)}, not an object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RequestError(f"the key {_shown(key)} is given twice")
            seen.add(key)
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise RequestError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RequestError(f"the number {text[:32]} is too large")
    return value


def _check_tree(value: Any) -> None:
    """Depth and lone surrogates, level by level, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                below.extend(child for child in item.values() if isinstance(child, str | dict | list))
            elif isinstance(item, list):
                below.extend(child for child in item if isinstance(child, str | dict | list))
        if depth > MAX_JSON_DEPTH and any(isinstance(item, dict | list) for item in level):
            raise RequestError(f"the body nests deeper than {MAX_JSON_DEPTH}")
        level = below


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("the body holds a lone surrogate, which is not a character") from error


class Fields:
    """The fields of a JSON object by type; `null` counts as missing."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def get(self, name: str) -> Any:
        """The raw value."""
        return self._body.get(name)

    def flag(self, name: str) -> bool:
        """A boolean, false when missing."""
        value = self._body.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise _wrong_type(name, value, "a boolean")

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._body.get(name)
        if value is None or isinstance(value, str):
            return value
        raise _wrong_type(name, value, "a string")

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        """An integer in [low, high]; a boolean or a float is none."""
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(name, value, "an integer")
        return int(_bounded(name, value, low=low, high=high))

    def number(self, name: str, *, low: float, high: float) -> float | None:
        """A finite number in [low, high]."""
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, value, "a number")
        return float(_bounded(name, value, low=low, high=high))


def read_model(fields: Fields, model: ModelInfo) -> None:
    """Check that the request is for the served model.

    Raises:
        RequestError: No model is named.
        HttpError: Another model is named (404).
    """
    name = fields.text("model")
    if name is None:
        raise RequestError("model is missing", parameter="model", hint=f"this server has {model.name!r}")
    check_model(name, model)


def check_model(name: str, model: ModelInfo) -> None:
    """Raise the 404 for a model that is not the served one."""
    if name != model.name:
        raise HttpError(
            404,
            f"the model {_shown(name)} does not exist",
            reason="model_not_found",
            parameter="model",
            hint=f"this server has {model.name!r}",
        )


def read_wishes(fields: Fields, model: ModelInfo, *, kind: Kind, has_text: bool) -> Wishes:
    """Everything but the prompt. `has_text` is False for a model without tokenizer, which knows no stop strings."""
    _refuse_later_fields(fields)
    echo = _read_echo(fields, kind)
    stream = fields.flag("stream")
    defaults = model.defaults
    temperature = fields.number("temperature", low=0.0, high=2.0)
    top_p = fields.number("top_p", low=0.0, high=1.0)
    if top_p == 0.0:
        raise RequestError("top_p 0 leaves no token; it must be above 0", parameter="top_p")
    top_k = fields.integer("top_k", low=-1, high=1_000_000)
    num_choices = fields.integer("n", low=1, high=MAX_CHOICES)
    stop = _read_stop(fields)
    if stop and not has_text:
        raise RequestError("stop needs a tokenizer, which this model lacks", parameter="stop")
    return Wishes(
        stream=stream,
        include_usage=_read_include_usage(fields, stream=stream),
        return_token_ids=fields.flag("return_token_ids"),
        num_choices=1 if num_choices is None else num_choices,
        max_tokens=_read_max_tokens(fields, model, low=0 if echo else 1),
        min_tokens=fields.integer("min_tokens", low=0, high=2**31) or 0,
        seed=fields.integer("seed", low=-(2**63), high=2**64 - 1),
        stop=stop,
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        top_k=defaults.top_k if top_k is None else max(0, top_k),
        ignore_eos=fields.flag("ignore_eos"),
        timeout_s=_read_timeout(fields),
        presence_penalty=fields.number("presence_penalty", low=-MAX_PENALTY, high=MAX_PENALTY) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", low=-MAX_PENALTY, high=MAX_PENALTY) or 0.0,
        logit_bias=_read_logit_bias(fields, model),
        logprobs=_read_completion_logprobs(fields) if kind == "completion" else _read_chat_logprobs(fields),
        echo=echo,
    )


def _refuse_later_fields(fields: Fields) -> None:
    for name, neutral in _LATER_FIELDS.items():
        value = fields.get(name)
        if value not in neutral:
            raise RequestError(f"{name} {_shown(value)} is not supported yet", parameter=name, hint=f"leave {name} out")


def _read_echo(fields: Fields, kind: Kind) -> bool:
    echo = fields.flag("echo")
    if echo and kind == "chat":
        raise RequestError("echo is not supported in chats", parameter="echo", hint="use /v1/completions")
    return echo


def _read_completion_logprobs(fields: Fields) -> int | None:
    """The likeliest tokens to tell beside each one: `logprobs` is their number."""
    if fields.get("top_logprobs") not in (None, 0):
        raise RequestError("top_logprobs is a chat's", parameter="top_logprobs", hint="logprobs is the number here")
    if fields.get("logprobs") is False:
        return None
    return fields.integer("logprobs", low=0, high=MAX_COMPLETION_LOGPROBS)


def _read_chat_logprobs(fields: Fields) -> int | None:
    """The likeliest tokens to tell beside each one: `logprobs` says whether, `top_logprobs` how many."""
    wanted = fields.flag("logprobs")
    num_top = fields.integer("top_logprobs", low=0, high=MAX_TOP_LOGPROBS)
    if num_top and not wanted:
        raise RequestError("top_logprobs needs logprobs true", parameter="top_logprobs")
    return (num_top or 0) if wanted else None


_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _read_logit_bias(fields: Fields, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    """Token ids, strings in JSON, with what is added to their logits; what adds nothing is left out."""
    bias = fields.get("logit_bias")
    if bias is None:
        return ()
    if not isinstance(bias, dict):
        raise _wrong_type("logit_bias", bias, "an object")
    if len(bias) > MAX_BIASED_TOKENS:
        raise RequestError(f"logit_bias has {len(bias)} entries, more than {MAX_BIASED_TOKENS}", parameter="logit_bias")
    pairs = []
    for name, value in bias.items():
        if not _TOKEN_ID.fullmatch(name):
            raise RequestError(f"logit_bias holds {_shown(name)}, which is no token id", parameter="logit_bias")
        if int(name) >= model.vocab_size:
            raise RequestError(
                f"logit_bias holds token id {name}, outside the vocabulary of {model.vocab_size}",
                parameter="logit_bias",
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_BIAS <= value <= MAX_BIAS:
            raise RequestError(
                f"logit_bias of token id {name} is {_shown(value)}, not a number from -100 to 100",
                parameter="logit_bias",
            )
        pairs.append((int(name), float(value)))
    return tuple(sorted(pair for pair in pairs if pair[1] != 0.0))


def _read_include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong_type("stream_options", options, "an object")
    if not stream:
        raise RequestError("stream_options needs stream true", parameter="stream_options")
    include_usage = options.get("include_usage")
    if include_usage is None or isinstance(include_usage, bool):
        return bool(include_usage)
    raise _wrong_type("stream_options.include_usage", include_usage, "a boolean")


def _read_max_tokens(fields: Fields, model: ModelInfo, *, low: int) -> int | None:
    """`max_completion_tokens` is the newer name of `max_tokens` and wins."""
    older = fields.integer("max_tokens", low=low, high=2**31)
    newer = fields.integer("max_completion_tokens", low=low, high=2**31)
    value, name = (older, "max_tokens") if newer is None else (newer, "max_completion_tokens")
    if value is not None and value >= model.max_model_len:
        raise too_long(f"{name} {value} leaves no room for a prompt in {model.max_model_len} tokens", parameter=name)
    return value


def _read_timeout(fields: Fields) -> float | None:
    timeout_s = fields.number("timeout_s", low=0.0, high=MAX_TIMEOUT_S)
    if timeout_s == 0.0:
        raise RequestError("timeout_s 0 must be above 0", parameter="timeout_s")
    return timeout_s


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong_type("stop", value, "a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} strings, more than {MAX_STOPS}", parameter="stop")
    for stop in stops:
        if not stop:
            raise RequestError("stop holds an empty string", parameter="stop")
        if len(stop) > MAX_STOP_CHARS:
            raise RequestError(f"stop string of {len(stop)} characters exceeds {MAX_STOP_CHARS}", parameter="stop")
    return tuple(dict.fromkeys(stops))


def read_prompts(fields: Fields, model: ModelInfo) -> tuple[Prompt, ...]:
    """The prompts of a completion: a string, a list of strings, ids, or a list of lists of ids."""
    value = fields.get("prompt")
    if value is None:
        raise RequestError("prompt is missing", parameter="prompt")
    if isinstance(value, str):
        return (_nonempty(value),)
    if not isinstance(value, list):
        raise _wrong_type("prompt", value, "a string, token ids, or a list of either")
    if not value:
        raise RequestError("prompt is empty", parameter="prompt")
    if not isinstance(value[0], str | list):
        return (_read_ids(value, model),)
    if len(value) > MAX_PROMPTS:
        raise RequestError(f"prompt holds {len(value)} prompts, more than {MAX_PROMPTS}", parameter="prompt")
    if all(isinstance(item, str) for item in value):
        return tuple(_nonempty(item) for item in value)
    if all(isinstance(item, list) for item in value):
        return tuple(_read_ids(item, model) for item in value)
    raise RequestError("prompt mixes texts, ids and lists", parameter="prompt")


def _nonempty(text: str) -> str:
    if not text:
        raise RequestError("prompt is empty", parameter="prompt")
    return text


def _read_ids(ids: list[Any], model: ModelInfo) -> tuple[int, ...]:
    if not ids:
        raise RequestError("prompt is empty", parameter="prompt")
    if len(ids) >= model.max_model_len:
        raise prompt_too_long(len(ids), 1, model)
    for position, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestError(
                f"prompt holds {_shown(token_id)} at position {position}, which is no token id", parameter="prompt"
            )
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                f"token id {_shown(token_id)} at position {position} is outside the vocabulary of {model.vocab_size}",
                parameter="prompt",
            )
    return tuple(ids)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles taken, and what the template gets: `developer` is the newer name of `system`."""


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages of a chat, reduced to role and text."""
    value = fields.get("messages")
    if value is None:
        raise RequestError("messages is missing", parameter="messages")
    if not isinstance(value, list):
        raise _wrong_type("messages", value, "a list")
    if not value:
        raise RequestError("messages is empty", parameter="messages")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"messages holds {len(value)}, more than {MAX_MESSAGES}", parameter="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong_type(where, message, "an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role {_shown(role)} is not one of {', '.join(_ROLES)}", parameter=f"{where}.role")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise RequestError(f"{where}.{name} is not supported yet", parameter=f"{where}.{name}")
    return {"role": _ROLES[role], "content": _read_content(message.get("content"), f"{where}.content")}


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _wrong_type(where, content, "a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise _wrong_type(at, part, "an object")
        if part.get("type") != "text":
            raise RequestError(f"{at}.type {_shown(part.get('type'))} is not supported: only text is", parameter=at)
        if not isinstance(part.get("text"), str):
            raise _wrong_type(f"{at}.text", part.get("text"), "a string")
        texts.append(part["text"])
    return "\n".join(texts)


def resolve_max_tokens(wishes: Wishes, num_prompt_tokens: int, model: ModelInfo, *, default: int | None) -> int:
    """How many tokens may be generated; the default (None: no other) shrinks to what the model has room for.

    Raises:
        HttpError: Prompt and `max_tokens` together exceed the model's length.
        RequestError: `min_tokens` exceeds it, or the prompt is too long for its logprobs.
    """
    room = model.max_model_len - num_prompt_tokens
    if room < 1 or (wishes.max_tokens is not None and wishes.max_tokens > room):
        raise prompt_too_long(num_prompt_tokens, wishes.max_tokens or 1, model)
    if wishes.echo and wishes.logprobs is not None and num_prompt_tokens > MAX_SCORED_PROMPT_TOKENS:
        raise RequestError(
            f"echo with logprobs of a prompt of {num_prompt_tokens} tokens exceeds {MAX_SCORED_PROMPT_TOKENS}",
            parameter="echo",
        )
    max_tokens = wishes.max_tokens
    if max_tokens is None:
        max_tokens = room if default is None else min(default, room)
    if wishes.min_tokens > max_tokens:
        raise RequestError(f"min_tokens {wishes.min_tokens} exceeds max_tokens {max_tokens}", parameter="min_tokens")
    return max_tokens


def check_scored_tokens(wishes: Wishes, num_prompt_tokens: Sequence[int]) -> None:
    """Refuse more scored prompts at once than memory is meant for; `num_prompt_tokens` are those of every prompt.

    Raises:
        RequestError: `echo` with `logprobs` would score too many tokens.
    """
    scored = sum(num_prompt_tokens) * wishes.num_choices
    if wishes.echo and wishes.logprobs is not None and scored > MAX_SCORED_TOKENS:
        raise RequestError(
            f"echo with logprobs of {scored} prompt tokens, over all prompts and choices, exceeds {MAX_SCORED_TOKENS}",
            parameter="echo",
            hint="send fewer prompts at once, or n 1",
        )


def prompt_too_long(num_prompt_tokens: int, max_tokens: int, model: ModelInfo) -> HttpError:
    """The 400 for a request that does not fit the model's length."""
    return too_long(
        f"prompt of {num_prompt_tokens} tokens and max_tokens {max_tokens} exceed {model.max_model_len} tokens"
    )


def too_long(message: str, *, parameter: str = "prompt") -> HttpError:
    """The 400 that clients know by `context_length_exceeded`."""
    return HttpError(400, message, reason="context_length_exceeded", parameter=parameter)


def _bounded(name: str, value: float, *, low: float, high: float) -> float:
    if value < low:
        raise RequestError(f"{name} {_shown(value)} is below {low}", parameter=name)
    if value > high:
        raise RequestError(f"{name} {_shown(value)} exceeds {high}", parameter=name)
    return value


def _wrong_type(name: str, value: Any, expected: str) -> RequestError:
    return RequestError(f"{name} is a {_kind(value)}, not {expected}", parameter=name)


_KINDS = {bool: "boolean", int: "integer", float: "float", str: "string", list: "list", dict: "object"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def _shown(value: Any) -> str:
    """A value inside a message: short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 64 else text[:61] + "..."
