"""The clients of a run: each request is streamed, and the time of every token's arrival is kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2 as httpx

from benchmarks.workload import Arrival

TIMEOUT_S = 600.0


@dataclass(slots=True)
class ClientStream:
    """What one client saw. Times are monotonic seconds."""

    arrival: Arrival
    due_s: float = 0.0
    headers_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    request: str = ""
    status_code: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether the daemon took the request: from then on it counts."""
        return self.status_code == 200

    @property
    def is_finished(self) -> bool:
        """Whether it got to its regular end."""
        return self.finish_reason in ("length", "stop") and self.error is None


async def send_all(url: str, arrivals: Sequence[Arrival], *, began_s: float, until_s: float) -> list[ClientStream]:
    """Send each request at its time and follow it; what is not over at `until_s` (monotonic) is left unfinished."""
    model = await _model_name(url)
    streams = [ClientStream(arrival, due_s=began_s + arrival.at_s) for arrival in arrivals]
    limits = httpx.Limits(max_connections=len(streams) + 1)
    async with httpx.AsyncClient(timeout=httpx.Timeout(TIMEOUT_S), limits=limits) as client:
        tasks = [asyncio.create_task(_follow(client, url, model, stream)) for stream in streams]
        _, open_tasks = await asyncio.wait(tasks, timeout=max(0.0, until_s - time.monotonic()))
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)
        for task in set(tasks) - open_tasks:
            task.result()
    return streams


async def _model_name(url: str) -> str:
    async with httpx.AsyncClient(timeout=httpx.Timeout(30.0)) as client:
        answer = await client.get(f"{url}/v1/models")
        return str(answer.json()["data"][0]["id"])


async def _follow(client: httpx.AsyncClient, url: str, model: str, stream: ClientStream) -> None:
    arrival = stream.arrival
    await asyncio.sleep(max(0.0, stream.due_s - time.monotonic()))
    body = {
        "model": model,
        "prompt": list(arrival.prompt_ids),
        "max_tokens": arrival.max_tokens,
        "temperature": arrival.temperature,
        "seed": arrival.seed,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            stream.headers_s = time.monotonic()
            stream.status_code = answer.status_code
            stream.request = answer.headers.get("x-request-id", "")
            if not stream.is_accepted:
                stream.error = (await answer.aread()).decode(errors="replace")[:500]
                return
            async for line in answer.aiter_lines():
                take_line(stream, line, time.monotonic())
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__}: {error}"


def take_line(stream: ClientStream, line: str, now_s: float) -> None:
    """One line of server-sent events."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        stream.error = str(chunk["error"])
        return
    for choice in chunk["choices"]:
        token_ids = choice.get("token_ids") or []
        stream.token_ids += token_ids
        stream.times_s += [now_s] * len(token_ids)
        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
