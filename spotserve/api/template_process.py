"""The process that renders a chat template: it may be killed, and its memory is bounded.

A template comes out of a model folder, so it is somebody else's code. The sandbox keeps it from Python's
internals; only a process of its own bounds the time and memory that loops and string products take. It runs as a
script with the standard library and jinja2 alone, reads JSON lines on stdin and answers with JSON lines on stdout.

First line in: `{"source", "special_tokens", "max_chars"}`, answered by `{"ready": true}` or `{"error"}`.
Then each line `{"messages"}` is answered by `{"text"}` or `{"error"}`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

_MEMORY_BYTES = 1 << 30
_CPU_S = 20


def main() -> None:
    """Serve renderings until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _bound_cpu()
    order = json.loads(sys.stdin.buffer.readline())
    try:
        template = _environment().from_string(order["source"])
    except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError) as error:
        _answer({"error": _one_line(error)})
        return
    _answer({"ready": True})
    for line in sys.stdin.buffer:
        _bound_cpu()
        _answer(_render(template, json.loads(line)["messages"], order["special_tokens"], order["max_chars"]))


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _render(
    template: jinja2.Template, messages: list[dict[str, Any]], special_tokens: dict[str, str], max_chars: int
) -> dict[str, str]:
    pieces, num_chars = [], 0
    try:
        for piece in template.generate(messages=messages, add_generation_prompt=True, **special_tokens):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > max_chars:
                return {"error": f"the chat template wrote more than {max_chars} characters"}
    except MemoryError:
        return {"error": "the chat template ran out of memory"}
    except RecursionError:
        return {"error": "the chat template nests too deeply"}
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return {"error": _one_line(error)}
    return {"text": "".join(pieces)}


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, *, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _bound_cpu() -> None:
    """Let the next rendering take this much CPU time, even if nobody is left to kill it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + _CPU_S, hard))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
