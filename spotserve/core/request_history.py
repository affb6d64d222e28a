"""The life of one request, from the journal's entries: where it waited, ran, stood still, moved, and how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.controller import Entry
from spotserve.core.ids import RequestId
from spotserve.core.replay import Moment, moments
from spotserve.core.state import ClusterState
from spotserve.core.strict_json import shown
from spotserve.core.timeline import rounded
from spotserve.core.wire import ChoicePosition
from spotserve.errors import SpotServeError

Json = dict[str, Any]
"""Plain JSON data, hence `Any`."""

FORMAT_VERSION = "0.1"
RECENT_IDS = 10_000
"""Latest ids among which the nearest to an unknown one is sought."""

STATES = ("queued", "prefilling", "decoding", "suspended")
"""What a request can be before its end."""


def request_report(state: ClusterState, entries: Iterable[Entry], request: str) -> Json:
    """What the entries tell about a request.

    Args:
        state: the fold of all before the first entry.
        entries: of the journal, in order.
        request: its id.

    Raises SpotServeError naming the nearest ids if the journal has no such request, StateDirError for an entry that
    cannot follow those before it.
    """
    history = RequestHistory(RequestId(request), state)
    recent: deque[RequestId] = deque(state.requests, maxlen=RECENT_IDS)
    last_at_s = state.at_s
    for moment in moments(state, entries):
        if isinstance(moment.entry.event, ev.RequestAccepted):
            recent.append(moment.entry.event.request)
        history.take(moment)
        last_at_s = moment.after.at_s
    if not history.is_known:
        raise SpotServeError(f"request {shown(request, 80)} is not in the journal", hint=_nearest(request, recent))
    return history.report(last_at_s)


def _nearest(request: str, recent: Iterable[RequestId]) -> str:
    """Ids that begin like it, else those that look like it."""
    known: list[str] = list(dict.fromkeys(recent))
    if not known:
        return "no request is in the journal"
    alike = [name for name in known if request and name.startswith(request)][-3:]
    alike = alike or get_close_matches(request, known, n=3, cutoff=0.5)
    if alike:
        return f"did you mean {', '.join(shown(name, 80) for name in alike)}?"
    return f"the latest is {shown(known[-1], 80)}; x-request-id of an answer names its request"


class RequestHistory:
    """Collects what concerns one request. Feed it every moment, in order.

    Args:
        request: its id.
        state: the fold of all before the first moment; the request may be in it.
    """

    def __init__(self, request: RequestId, state: ClusterState) -> None:
        self.request = request
        self.steps: list[Json] = []
        self._facts: Json = {}
        self._accepted_at_s: float | None = None
        self._ended: ev.RequestEnded | None = None
        self._in_state_s = dict.fromkeys(STATES, 0.0)
        self._since_s = state.at_s
        known = state.requests.get(request)
        self.is_known = known is not None
        self._state = None if known is None else known.state
        if known is not None:
            self._facts = {
                "prompt_tokens": known.prompt_tokens,
                "num_choices": known.num_choices,
                "max_tokens": known.max_tokens,
            }

    def take(self, moment: Moment) -> None:
        """Note what one entry means for the request."""
        before = moment.before.requests.get(self.request)
        after = moment.after.requests.get(self.request)
        if before is None and after is None:
            return
        self.is_known = True
        told = [*self._event_steps(moment), *self._command_steps(moment)]
        is_changed = before is None or after is None or (before.state, before.replica) != (after.state, after.replica)
        if is_changed and not told:
            told = [{"what": "changed", "cause": moment.entry.event.kind}]
        state = after.state if after is not None else "ended"
        self._spend(moment.after.at_s, state)
        for index, step in enumerate(told):
            # Of several in one entry the last one has the state that all of them lead to.
            is_last = index == len(told) - 1
            where = {"state": state, "replica": None if after is None else after.replica} if is_last else {}
            self.steps.append(
                {"sequence": moment.entry.sequence, "at_s": rounded(moment.entry.event.at_s), **step, **where}
            )

    def _spend(self, at_s: float, state: str) -> None:
        """Count the time in the state that it was in until now."""
        if self._state in self._in_state_s:
            self._in_state_s[self._state] += at_s - self._since_s
        self._state, self._since_s = state, at_s

    def _event_steps(self, moment: Moment) -> Iterator[Json]:
        event = moment.entry.event
        if isinstance(event, ev.Quiesced):
            choices = [position for position in event.positions if position.request == self.request]
            if choices:
                yield {"what": "quiesced", "on": event.replica, "epoch": event.epoch, "choices": _progress(choices)}
        elif isinstance(event, ev.TimerFired):
            if event.timer == f"request:{self.request}":
                yield {"what": "deadline_passed"}
        elif getattr(event, "request", None) == self.request:
            yield self._own_event(event)

    def _own_event(self, event: ev.Event) -> Json:
        """An event that is about this request alone."""
        if isinstance(event, ev.RequestAccepted):
            self._accepted_at_s = event.at_s
            self._facts = {
                "prompt_tokens": event.prompt_tokens,
                "num_choices": event.num_choices,
                "max_tokens": event.sampling.max_tokens,
                "timeout_s": event.timeout_s,
                "sampling": event.sampling.model_dump(mode="json", exclude_defaults=True),
            }
            return {"what": "accepted"}
        if isinstance(event, ev.FirstToken):
            names = ("generation", "stall_ms", "recomputed_tokens")
            return {"what": "first_token", "on": event.replica, **{name: getattr(event, name) for name in names}}
        if isinstance(event, ev.RequestEvicted):
            return {"what": "evicted", "on": event.replica}
        if isinstance(event, ev.RequestEnded):
            self._ended = event
            return {"what": "ended", "outcome": event.outcome, "tokens": list(event.tokens)}
        return {"what": event.kind}

    def _command_steps(self, moment: Moment) -> Iterator[Json]:
        for command in moment.entry.commands:
            if isinstance(command, cmd.AdmitRequests):
                if any(admission.request == self.request for admission in command.admissions):
                    what = "named_again" if command.again else "admitted"
                    yield {"what": what, "to": command.replica, "generation": command.generation}
            elif isinstance(command, cmd.BeginRun):
                for action in command.plan.requests:
                    if action.request == self.request:
                        to = {"to": action.to_replica, "epoch": command.plan.epoch.to}
                        yield {"what": "planned", "action": action.action, **to}
            elif isinstance(command, cmd.CommitRun):
                yield from self._committed(command)
            elif isinstance(command, cmd.EndRequest) and command.request == self.request:
                yield {"what": "told_to_end", "outcome": command.outcome, "error": command.error}

    def _committed(self, command: cmd.CommitRun) -> Iterator[Json]:
        owner = next((owner for owner in command.owners if owner.request == self.request), None)
        if any(admission.request == self.request for admission in command.moved):
            yield {"what": "moved", "epoch": command.epoch, "to": None if owner is None else owner.replica}
        elif self.request in command.recomputed:
            yield {"what": "left_to_recompute", "epoch": command.epoch}

    def report(self, last_at_s: float) -> Json:
        """All of it. `last_at_s` is the journal's end: until then an open request is what it is."""
        if self._ended is None:
            self._spend(last_at_s, self._state or "ended")
        firsts = [step for step in self.steps if step["what"] == "first_token"]
        stalls_ms = [step["stall_ms"] for step in firsts if step["stall_ms"] > 0]
        accepted_s, ended = self._accepted_at_s, self._ended
        ended_s = None if ended is None else ended.at_s
        homes = [(step["on"], step["generation"]) for step in firsts]
        return {
            "format_version": FORMAT_VERSION,
            "request": self.request,
            "state": self._state if ended is None else ended.outcome,
            **self._facts,
            "accepted_at_s": None if accepted_s is None else rounded(accepted_s),
            "ended_at_s": None if ended_s is None else rounded(ended_s),
            "tokens": None if ended is None else list(ended.tokens),
            "totals": {
                "ttft_s": _after(accepted_s, firsts[0]["at_s"] if firsts else None),
                "latency_s": _after(accepted_s, ended_s),
                "in_state_s": {name: rounded(value) for name, value in self._in_state_s.items()},
                "num_stalls": len(stalls_ms),
                "stall_ms_max": max(stalls_ms, default=0.0),
                "recomputed_tokens": sum(step["recomputed_tokens"] for step in firsts),
                "num_moves": sum(1 for step in self.steps if step["what"] == "moved"),
                "num_evictions": sum(1 for step in self.steps if step["what"] == "evicted"),
                "replicas": [{"id": name, "generation": generation} for name, generation in dict.fromkeys(homes)],
            },
            "steps": self.steps,
        }


def _progress(choices: Iterable[ChoicePosition]) -> list[Json]:
    return [{"choice": one.choice, "tokens": one.tokens, "kv_tokens": one.kv_tokens} for one in choices]


def _after(begun_s: float | None, ended_s: float | None) -> float | None:
    return None if begun_s is None or ended_s is None else rounded(ended_s - begun_s)
