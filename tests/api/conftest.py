"""A front door on a loopback port, in a thread with its own loop, over a fake daemon."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest

from spotserve.api.fake import FakeAdministration, FakeFrontdoor
from spotserve.api.protocol import ReceiptBounds
from spotserve.api.server import bind, build_app, serve
from spotserve.api.text import StopJudge
from spotserve.api.tokenizer import GenerationDefaults, TextCodec
from spotserve.api.validation import ModelInfo
from tests.api.folder import MAX_MODEL_LEN, VOCAB_SIZE, write_folder

T = TypeVar("T")
KEY = "a-secret-key"
ANSWER = "the quick brown fox jumps over the lazy dog, grüße aus köln 🙂"


@dataclass
class Served:
    """A running front door and the fake behind it."""

    url: str
    frontdoor: FakeFrontdoor
    administration: FakeAdministration
    codec: TextCodec | None
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self.url.rsplit(":", 1)[1])

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def do(self, action: Callable[[], Any]) -> Any:
        """Call something in the server's loop."""

        async def call() -> Any:
            return action()

        return self.run(call())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to come true in the server's loop."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        self.run(asyncio.wait_for(poll(), 20))

    def openai(self) -> openai.OpenAI:
        """The official client."""
        if not self.clients:
            self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0))
        return self.clients[0]

    def http(self) -> httpx.Client:
        """A plain client; use it as a context."""
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, verify=False)  # noqa: S501 - plain http, saves time

    def raw(self, data: bytes, *, timeout_s: float = 20.0) -> bytes:
        """Send bytes and read to the end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(data)
            received = b""
            while part := connection.recv(65536):
                received += part
            return received


def start(
    folder: Path | None,
    *,
    keep_alive_s: float = 5.0,
    api_key: str | None = None,
    bounds: ReceiptBounds | None = None,
    defaults: GenerationDefaults | None = None,
) -> Served:
    """Serve in a thread; the caller stops it."""
    codec = None if folder is None else TextCodec.load(folder)
    answer = codec.encode(ANSWER, add_special_tokens=False) if codec is not None else tuple(range(10, 50))

    def rule(prompt: tuple[int, ...], choice: int, position: int) -> int:
        return answer[(position + choice) % len(answer)]

    loop, url, ready = asyncio.new_event_loop(), [""], threading.Event()
    frontdoor = FakeFrontdoor(rule, StopJudge(codec), chunk=2)
    administration = FakeAdministration()
    model = ModelInfo(
        name="tiny",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        created_unix_s=1700000000,
        defaults=defaults or (GenerationDefaults() if folder is None else GenerationDefaults.load(folder)),
    )
    app = build_app(frontdoor, administration, codec, model, api_key=api_key, keep_alive_s=keep_alive_s)

    def started(where: str) -> None:
        url[0] = where
        ready.set()

    async def run() -> None:
        try:
            await serve(app, bind("127.0.0.1", 0), started, bounds=bounds)
        except asyncio.CancelledError:
            await frontdoor.close()

    task = loop.create_task(run())

    def run_thread() -> None:
        loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run_thread)
    thread.start()
    assert ready.wait(60)

    def stop() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
        thread.join(60)
        assert not thread.is_alive()

    return Served(url[0], frontdoor, administration, codec, loop, stop)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model folder."""
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def serving(folder: Path) -> Iterator[Callable[..., Served]]:
    """Starts front doors and stops them at the end."""
    running: list[Served] = []

    def begin(**options: Any) -> Served:
        running.append(start(options.pop("folder", folder), **options))
        return running[-1]

    yield begin
    for served in running:
        for client in served.clients:
            client.close()
        served.stop()


@pytest.fixture
def served(serving: Callable[..., Served]) -> Served:
    """A front door with the tiny model and no key."""
    return serving()


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Served]:
    """One front door for all tests of a module that leave it as it was."""
    served = start(folder)
    yield served
    for client in served.clients:
        client.close()
    served.stop()
