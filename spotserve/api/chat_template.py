"""A model's chat template, rendered in a process that is killed when it takes too long.

The process (`template_process.py`) is started at the first chat and kept. One rendering runs at a time, in a thread
that does nothing else, so that a slow template delays only other chats.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2

from spotserve.errors import ModelError, RequestError

_PROCESS = Path(__file__).with_name("template_process.py")
_START_S = 60.0
_MAX_CHARS = 8 << 20


class ChatTemplate:
    """Turns messages into the prompt text of a chat model."""

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None, *, timeout_s: float = 10.0) -> None:
        """Check the syntax and remember the template; nothing is run.

        Args:
            source: The jinja2 template of the model folder.
            special_tokens: Names a template may use, such as `bos_token`.
            timeout_s: Wall-clock bound of one rendering.

        Raises:
            ModelError: The template is not jinja2.
        """
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise ModelError(f"the chat template cannot be read: {error}") from error
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-template")
        self._process: subprocess.Popen[bytes] | None = None

    async def render_soon(self, messages: list[dict[str, Any]]) -> str:
        """`render` for a running loop."""
        return await asyncio.wrap_future(self._thread.submit(self._render, messages))

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of these messages, generation prompt included.

        Raises:
            RequestError: The template refuses the messages, takes too long or writes too much.
        """
        return self._thread.submit(self._render, messages).result()

    def close(self) -> None:
        """End the process and its thread; nothing is rendered afterwards."""
        self._thread.submit(self._kill).result()
        self._thread.shutdown()

    def _render(self, messages: list[dict[str, Any]]) -> str:
        process = self._process or self._start()
        answer = self._ask(process, {"messages": messages}, self._timeout_s)
        if "text" not in answer:
            raise RequestError(f"the chat template refuses: {answer['error']}", parameter="messages")
        return str(answer["text"])

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process = process
        order = {"source": self._source, "special_tokens": self._special_tokens, "max_chars": _MAX_CHARS}
        answer = self._ask(process, order, _START_S)
        if "ready" not in answer:
            self._kill()
            raise RequestError(f"the chat template cannot be used: {answer['error']}", parameter="messages")
        return process

    def _ask(self, process: subprocess.Popen[bytes], question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(process, time.monotonic() + timeout_s)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self._kill()
            return {"error": f"it did not finish within {timeout_s:g} s"}
        if not line.endswith(b"\n"):
            self._kill()
            return {"error": "its process ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read_line(self, process: subprocess.Popen[bytes], deadline_s: float) -> bytes:
        """One line of the process, or what came before it ended."""
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        line = bytearray()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not part:
                break
            line += part
        return bytes(line)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
