"""The five state machines, as tables.

SERVICE is what `spotserve status` shows: a function of the whole state (`core/service.py`), whose table here lists
every pair that the function can yield while a coordinator lives (a new one begins where the fold leaves it).
INSTANCE follows one preemptible machine, REPLICA one generation of a data-parallel pipeline, PLAN_RUN one execution of
a plan, REQUEST one accepted request. Whatever is not in a table cannot happen: firing it is our bug and raises. The
pictures in `docs/lifecycles.md` are drawn from these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from transitions import Machine

from spotserve.errors import InvariantError


@dataclass(frozen=True, slots=True)
class Edge:
    """`trigger` takes any of `sources` to `destination`."""

    trigger: str
    sources: tuple[str, ...]
    destination: str


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """A named table of edges over listed states."""

    name: str
    states: tuple[str, ...]
    initial: str
    edges: tuple[Edge, ...]


INSTANCE = Lifecycle(
    name="instance",
    states=("requested", "joining", "ready", "doomed", "gone"),
    initial="requested",
    edges=(
        Edge("worker_registered", ("requested",), "joining"),
        Edge("all_registered", ("joining",), "ready"),
        Edge("noticed", ("joining", "ready"), "doomed"),
        Edge("withdrawn", ("doomed",), "ready"),
        Edge("lost", ("requested", "joining", "ready", "doomed"), "gone"),
    ),
)

REPLICA = Lifecycle(
    name="replica",
    states=("preparing", "serving", "quiesced", "retired", "lost"),
    initial="preparing",
    edges=(
        Edge("activated", ("preparing",), "serving"),
        Edge("quiesced", ("serving",), "quiesced"),
        Edge("resumed", ("quiesced",), "serving"),
        Edge("retired", ("preparing", "quiesced"), "retired"),
        Edge("lost", ("preparing", "serving", "quiesced"), "lost"),
    ),
)

PLAN_RUN = Lifecycle(
    name="plan_run",
    states=("proposed", "preparing", "prepared", "committed", "released", "aborted"),
    initial="proposed",
    edges=(
        Edge("begun", ("proposed",), "preparing"),
        Edge("prepared", ("preparing",), "prepared"),
        Edge("committed", ("prepared",), "committed"),
        Edge("released", ("committed",), "released"),
        Edge("aborted", ("proposed", "preparing", "prepared"), "aborted"),
    ),
)

REQUEST = Lifecycle(
    name="request",
    states=("queued", "prefilling", "decoding", "suspended", "finished", "cancelled", "failed"),
    initial="queued",
    edges=(
        Edge("admitted", ("queued", "suspended"), "prefilling"),
        Edge("first_token", ("prefilling", "suspended"), "decoding"),
        Edge("suspended", ("queued", "prefilling", "decoding"), "suspended"),
        Edge("evicted", ("prefilling", "decoding", "suspended"), "queued"),
        Edge("finished", ("queued", "prefilling", "decoding", "suspended"), "finished"),
        Edge("cancelled", ("queued", "prefilling", "decoding", "suspended"), "cancelled"),
        Edge("failed", ("queued", "prefilling", "decoding", "suspended"), "failed"),
    ),
)

_LIVE_SERVICE = ("serving", "draining", "migrating", "resuming", "degraded")

SERVICE = Lifecycle(
    name="service",
    states=("provisioning", "serving", "draining", "migrating", "resuming", "degraded", "stopping", "stopped"),
    initial="provisioning",
    edges=(
        Edge("provisioning", ("degraded",), "provisioning"),
        Edge("serving", ("provisioning", "draining", "migrating", "resuming", "degraded"), "serving"),
        Edge("draining", ("provisioning", "serving", "resuming", "migrating", "degraded"), "draining"),
        Edge("migrating", ("provisioning", "serving", "draining", "resuming", "degraded"), "migrating"),
        Edge("resuming", ("provisioning", "migrating", "draining", "degraded", "serving"), "resuming"),
        Edge("degraded", ("provisioning", "serving", "draining", "migrating", "resuming"), "degraded"),
        Edge("stopping", ("provisioning", *_LIVE_SERVICE), "stopping"),
        Edge("stopped", ("provisioning", "stopping", *_LIVE_SERVICE), "stopped"),
    ),
)

LIFECYCLES = (SERVICE, INSTANCE, REPLICA, PLAN_RUN, REQUEST)


@cache
def machine(lifecycle: Lifecycle) -> Machine:
    """The one shared `transitions` machine of a lifecycle; it has no model, states live in our own values."""
    return Machine(
        model=None,
        states=list(lifecycle.states),
        initial=lifecycle.initial,
        transitions=[
            {"trigger": edge.trigger, "source": list(edge.sources), "dest": edge.destination}
            for edge in lifecycle.edges
        ],
        auto_transitions=False,
        queued=False,
    )


def can_fire(lifecycle: Lifecycle, state: str, trigger: str) -> bool:
    """Whether `trigger` is allowed in `state`."""
    event = machine(lifecycle).events.get(trigger)
    return event is not None and bool(event.transitions.get(state))


def fire(lifecycle: Lifecycle, state: str, trigger: str) -> str:
    """The state that `trigger` leads to from `state`. Raises InvariantError for a pair that is not in the table."""
    if not can_fire(lifecycle, state, trigger):
        raise InvariantError(f"{lifecycle.name} cannot take {trigger!r} in state {state!r}")
    return str(machine(lifecycle).events[trigger].transitions[state][0].dest)


def mermaid(lifecycle: Lifecycle) -> str:
    """The lifecycle as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {lifecycle.initial}"]
    lines += [
        f"    {source} --> {edge.destination}: {edge.trigger}" for edge in lifecycle.edges for source in edge.sources
    ]
    return "\n".join(lines) + "\n"
