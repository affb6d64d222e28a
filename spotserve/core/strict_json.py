"""JSON from files that others wrote: bounded before it is parsed, each key once, finite numbers, and where it is wrong.

A parser reads what it is given, so size, nesting and the number of values are counted first: no small file may cost
much, whatever it holds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from spotserve.core.frozen import Frozen

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64
MAX_VALUES = 4_000_000
MAX_KEYS = 4096
"""Keys of one object."""

MAX_INTEGER = 2**53
"""Up to here every reader of JSON has the same integers."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
"""A JSON string, closed or cut off by the end of the data; possessive, so it never backtracks."""

CLOSED_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
MEASURED_BYTES = 256 * 1024
"""So much is measured at a time: taking strings out costs a hundred times the bytes of the shortest ones."""

NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
LARGE_NUMBERS = re.compile(rb"[0-9]{16}|[eE]\+?[0-9]{3}")
"""What only a number that no field takes has; reading numbers one by one is slow, so only such a file pays for it."""

PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")

F = TypeVar("F", bound=Frozen)


class JsonFaultError(ValueError):
    """What is wrong with a file, and the JSON path of where; the path is empty for the file as a whole."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path or 'file'}: {message}")
        self.path = path
        self.message = message


class _Wrong:
    """Stands in a parsed document where something cannot be accepted."""

    def __init__(self, message: str) -> None:
        self.message = message


def shown(text: object, limit: int = 300) -> str:
    """Foreign text on one line: what cannot be printed is escaped, what is long is cut."""
    plain = str(text)[: limit + 1]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in plain)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def path_text(parts: tuple[str | int, ...]) -> str:
    """`steps[3].slices[0].dim`; a key that is no name stands in quotes."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif PLAIN_KEY.fullmatch(part) and len(part) <= 80:
            text += f".{part}" if text else part
        else:
            text += f'["{shown(part, 40)}"]'
    return text


def parse(data: bytes) -> Any:
    """The document in `data`. Raises JsonFaultError with the path of the first thing that is not strict JSON."""
    if len(data) > MAX_FILE_BYTES:
        raise JsonFaultError("", f"file size {len(data)} exceeds {MAX_FILE_BYTES} bytes")
    if data.startswith(BYTE_ORDER_MARK):
        raise JsonFaultError("", "not JSON: it begins with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonFaultError("", f"not JSON: byte {error.start} is not UTF-8") from error
    reader = _Reader(number_by_number=_measured(data))
    try:
        document = reader.read(text)
    except (ValueError, RecursionError) as error:
        raise JsonFaultError("", f"not JSON: {shown(error, 160)}") from error
    if reader.first is not None:
        path, wrong = _first_wrong(document, ()) or ((), reader.first)
        raise JsonFaultError(path_text(path), wrong.message)
    return document


def _measured(data: bytes) -> bool:
    """Whether the numbers must be looked at one by one. Raises JsonFaultError for a structure beyond its bounds."""
    parts = []
    values = depth = 0
    for part in _without_strings(data):
        brackets = part.translate(None, NOT_BRACKETS)
        values += part.count(b",") + len(brackets)
        if values > MAX_VALUES:
            raise JsonFaultError("", f"values and brackets exceed {MAX_VALUES}")
        for bracket in brackets:
            depth += 1 if bracket in b"[{" else -1
            if depth > MAX_DEPTH:
                raise JsonFaultError("", f"nesting exceeds {MAX_DEPTH} levels")
        parts.append(part)
    return LARGE_NUMBERS.search(b"".join(parts)) is not None


def _without_strings(data: bytes) -> Iterator[bytes]:
    """What is outside of strings, part by part; no part begins or ends in a string."""
    begin = 0
    while begin < len(data):
        end = min(begin + MEASURED_BYTES, len(data))
        part = data[begin:end]
        strings = STRING.findall(part)
        yield STRING.sub(b"", part)
        if strings and CLOSED_STRING.fullmatch(strings[-1]) is None:  # The last one goes on.
            whole = STRING.match(data, end - len(strings[-1]))
            assert whole is not None
            end = whole.end()
        begin = end


class _Reader:
    """One reading of one document; what it cannot accept it marks in place, so that its path can be told."""

    def __init__(self, *, number_by_number: bool) -> None:
        self.number_by_number = number_by_number
        self.first: _Wrong | None = None

    def read(self, text: str) -> Any:
        """The document, with a mark where something is wrong."""
        return json.loads(
            text,
            object_pairs_hook=self._unique,
            parse_constant=lambda name: self._wrong(f"{name} is not a number that JSON has"),
            parse_int=self._integer if self.number_by_number else None,
            parse_float=self._float if self.number_by_number else None,
        )

    def _wrong(self, message: str) -> _Wrong:
        """The mark: one for all, as a file may be wrong a million times; of interest is the first."""
        self.first = self.first or _Wrong(message)
        return self.first

    def _unique(self, pairs: list[tuple[str, object]]) -> object:
        """An object; two readers of one with a key twice could see two documents."""
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            return self._wrong(f"the key {shown(twice, 40)!r} is there twice")
        if len(result) > MAX_KEYS:
            return self._wrong(f"{len(result)} keys exceed {MAX_KEYS}")
        return result

    def _integer(self, text: str) -> object:
        if len(text) > len(str(MAX_INTEGER)) + 1 or abs(int(text)) > MAX_INTEGER:
            return self._wrong(f"the integer {shown(text, 24)} is beyond {MAX_INTEGER}")
        return int(text)

    def _float(self, text: str) -> object:
        value = float(text)
        return value if abs(value) < float("inf") else self._wrong(f"the number {shown(text, 24)} is not finite")


def _inner(document: object) -> Iterable[tuple[str | int, object]]:
    """What an object or array holds, by key or index; nothing for any other value."""
    if isinstance(document, dict):
        return document.items()
    return enumerate(document) if isinstance(document, list) else ()


def _first_wrong(document: object, path: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], _Wrong] | None:
    """Where the first mark stands."""
    if isinstance(document, _Wrong):
        return path, document
    for key, value in _inner(document):
        found = _first_wrong(value, (*path, key)) if isinstance(value, dict | list | _Wrong) else None
        if found is not None:
            return found
    return None


def refuse_large_numbers(document: object, path: tuple[str | int, ...] = ()) -> None:
    """Raise JsonFaultError for an integer beyond `MAX_INTEGER`, in data that another parser has read.

    Its depth must be bounded already.
    """
    if isinstance(document, int) and abs(document) > MAX_INTEGER:
        raise JsonFaultError(path_text(path), f"an integer is beyond {MAX_INTEGER}")
    for key, value in _inner(document):
        refuse_large_numbers(value, (*path, key))


def read_as(kind: type[F], data: bytes) -> F:
    """A frozen value from the bytes of a JSON file. Raises JsonFaultError."""
    return shaped(kind, parse(data))


def shaped(kind: type[F], document: Any) -> F:
    """A parsed document as a frozen value. Raises JsonFaultError with the path of the first wrong value."""
    if not isinstance(document, dict):
        raise JsonFaultError("", f"the file holds {_kind_of(document)}, not an object")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise JsonFaultError(_path_of(document, first["loc"]), shown(_lowered(first["msg"]), 200)) from error
    except RecursionError as error:
        raise JsonFaultError("", f"nesting exceeds {MAX_DEPTH} levels") from error


def _path_of(document: Any, location: tuple[str | int, ...]) -> str:
    """The JSON path of a validation error's location, which also names the chosen branches of unions."""
    parts: list[str | int] = []
    here = document
    for number, part in enumerate(location):
        is_there = (isinstance(here, Mapping) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if is_there:
            here = here[part]
            parts.append(part)
        elif number == len(location) - 1 and isinstance(here, Mapping) and isinstance(part, str):
            parts.append(part)  # A field that is missing.
    return path_text(tuple(parts))


def _kind_of(document: object) -> str:
    names = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(document), "a number")


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
