"""The clients of the demo: one question each through the real `openai` client, and what became of its answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import openai

ANSWER_TIMEOUT_S = 300.0
MAX_TOKENS = 256


@dataclass(slots=True)
class Answer:
    """One streamed answer: what came, when, and how it ended. Written by its own thread, read by the screen."""

    question: str
    request: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        """Whether its stream has ended, well or not."""
        return self.thread is not None and not self.thread.is_alive()

    @property
    def longest_stall_s(self) -> float:
        """The longest gap between two chunks with tokens."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


def ask_all(url: str, model: str, questions: tuple[str, ...]) -> list[Answer]:
    """Ask every question at once, greedily; the answers grow while the caller looks at them."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S)
    answers = [Answer(question) for question in questions]
    for answer in answers:
        answer.thread = threading.Thread(target=_ask, args=(client, model, answer), daemon=True)
        answer.thread.start()
    return answers


def _ask(client: openai.OpenAI, model: str, answer: Answer) -> None:
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": answer.question}],
            stream=True,
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body={"return_token_ids": True},
        )
        answer.request = raw.headers["x-request-id"]
        for chunk in raw.parse():
            for choice in chunk.choices:
                token_ids = (choice.model_extra or {}).get("token_ids") or []
                if token_ids:
                    answer.times_s.append(time.monotonic())
                answer.token_ids += token_ids
                answer.text += choice.delta.content or ""
                answer.finish_reason = choice.finish_reason or answer.finish_reason
    except Exception as error:  # noqa: BLE001 - any end but a proper one is a lost request, which the table counts
        answer.error = f"{type(error).__name__}: {error}"
