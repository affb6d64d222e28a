"""What `/metrics` tells in Prometheus' text format: few series, base units, no label a client can choose."""

from __future__ import annotations

from collections import Counter
from typing import Any

_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """A histogram of seconds."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name = name
        self._help_text = help_text
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, value_s: float) -> None:
        """Count one value."""
        index = next((at for at, bound_s in enumerate(_BUCKETS_S) if value_s <= bound_s), len(_BUCKETS_S))
        self._counts[index] += 1
        self._sum_s += value_s

    def lines(self) -> list[str]:
        """The series."""
        lines, total = _heading(self._name, "histogram", self._help_text), 0
        for bound, count in zip([*map(str, _BUCKETS_S), "+Inf"], self._counts, strict=True):
            total += count
            lines.append(f'{self._name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{self._name}_sum {self._sum_s}", f"{self._name}_count {total}"]


class Metrics:
    """Counters of the front door; the daemon's own numbers are added from its status."""

    def __init__(self) -> None:
        self._responses: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.time_to_first_token = Histogram(
            "spotserve_time_to_first_token_seconds", "From a request's acceptance to its first durable token."
        )

    def count_response(self, route: str, status: int) -> None:
        """Count one answer; `route` is a path of ours, never a client's."""
        self._responses[(route, status)] += 1

    def render(self, status: dict[str, Any], service_state: str) -> str:
        """The whole exposition."""
        lines = _heading("spotserve_state", "gauge", "1 for the service state the daemon is in.")
        lines.append(f'spotserve_state{{state="{service_state}"}} 1')
        lines += _heading("spotserve_http_responses_total", "counter", "Answers by route and status.")
        for (route, code), count in sorted(self._responses.items()):
            lines.append(f'spotserve_http_responses_total{{route="{route}",code="{code}"}} {count}')
        lines += _single("spotserve_prompt_tokens_total", "counter", "Prompt tokens accepted.", self.prompt_tokens)
        lines += _single(
            "spotserve_generation_tokens_total", "counter", "Tokens sent to clients.", self.generation_tokens
        )
        lines += self.time_to_first_token.lines()
        lines += _status_lines(status)
        return "\n".join(lines) + "\n"


def _status_lines(status: dict[str, Any]) -> list[str]:
    lines = []
    if isinstance(status.get("epoch"), int):
        lines += _single("spotserve_epoch", "gauge", "The last committed plan epoch.", status["epoch"])
    lines += _heading("spotserve_requests", "gauge", "Requests by state since the journal's start.")
    for state, count in sorted(status.get("requests", {}).items()):
        lines.append(f'spotserve_requests{{state="{state}"}} {count}')
    instances = Counter(instance["state"] for instance in status.get("instances", []))
    lines += _heading("spotserve_instances", "gauge", "Instances by state.")
    lines += [f'spotserve_instances{{state="{state}"}} {count}' for state, count in sorted(instances.items())]
    return lines + _migration_lines(status.get("migrations", []))


def _migration_lines(migrations: list[dict[str, Any]]) -> list[str]:
    outcomes = Counter((str(run["trigger"]), str(run["outcome"] or "running")) for run in migrations)
    lines = _heading("spotserve_migrations", "gauge", "Plan runs by trigger and outcome.")
    for (trigger, outcome), count in sorted(outcomes.items()):
        lines.append(f'spotserve_migrations{{trigger="{trigger}",outcome="{outcome}"}} {count}')
    lines += _heading("spotserve_migrated_bytes_total", "counter", "Bytes received and verified by workers.")
    for kind in ("kv", "weight"):
        total = sum(run.get(f"{kind}_bytes") or 0 for run in migrations)
        lines.append(f'spotserve_migrated_bytes_total{{kind="{kind}"}} {total}')
    recomputed = sum(run.get("recomputed_tokens") or 0 for run in migrations)
    return lines + _single("spotserve_recomputed_tokens_total", "counter", "Tokens prefilled again.", recomputed)


def _heading(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]


def _single(name: str, kind: str, help_text: str, value: float) -> list[str]:
    return [*_heading(name, kind, help_text), f"{name} {value}"]
