"""The three systems of the paper's evaluation as policies of ours, and one run of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.scenarios import FLUCTUATING, RELOAD_BYTES_PER_S, RUNS, phases_of, published_requests, scenario_of
from spotserve.core.controller import Entry
from spotserve.core.events import RequestAccepted, RequestEnded
from spotserve.core.ids import RequestId
from spotserve.sim.measures import Moment, RunResult
from spotserve.sim.scenario import Scenario
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan

HOLE_S = 60.0
"""An outage of at least so long is no migration."""


@dataclass(frozen=True, slots=True)
class System:
    """A policy and what its artifact does beside: solvers, the (P, M) that it keeps, batches, and how it reloads.

    `batches` are the static batches' worth of requests that a pipeline may hold; `reloads` how often an engine's
    start-up is waited for.
    """

    name: str
    policy: str
    solvers: Mapping[str, str] = field(default_factory=dict)
    keeps_shape: bool = False
    batches: int = 1
    reloads: int = 1


BASELINE = {"configure": "paper", "arrange": "paper"}
"""The baselines have SpotServe's optimizer, and stop as late as it does."""

SYSTEMS = (
    System("SpotServe", "paper+static"),
    System("Rerouting", "reroute+static", BASELINE, keeps_shape=True, batches=2, reloads=2),
    System("Reparallelization", "reparallelize+static", BASELINE, batches=2),
)
SPOTSERVE = SYSTEMS[0]


def scenario(data: Path, model: str, trace: str, system: System, *, reload_bytes_per_s: float) -> Scenario:
    """A system's run; where demand changes the artifact gives an idle pipeline one batch and nobody more."""
    return scenario_of(
        data,
        model,
        trace,
        published_requests(data, model, trace),
        seed=0,
        knows_load=True,
        solvers=system.solvers,
        shape=RUNS[model].rerouted if system.keeps_shape else None,
        static_batches=0 if trace in FLUCTUATING else system.batches,
        reload_bytes_per_s=reload_bytes_per_s / system.reloads,
    )


class Ends:
    """A journal that keeps nothing but how long each request took that ended well within the trace."""

    def __init__(self, until_s: float) -> None:
        self.latencies_s: list[float] = []
        self._until_s = until_s
        self._arrived_at_s: dict[RequestId, float] = {}

    async def append(self, entries: Sequence[Entry]) -> None:
        """Take note of arrivals and ends."""
        for entry in entries:
            event = entry.event
            if isinstance(event, RequestAccepted):
                self._arrived_at_s[event.request] = event.at_s
            elif isinstance(event, RequestEnded) and event.outcome == "finished" and event.at_s <= self._until_s:
                self.latencies_s.append(event.at_s - self._arrived_at_s[event.request])


@dataclass(frozen=True, slots=True)
class Played:
    """A run, and the latencies that the artifact would have counted: of requests that ended within the trace."""

    run: RunResult
    ended_s: Sequence[float]


def play(
    data: Path, model: str, trace: str, system: System, *, reload_bytes_per_s: float = RELOAD_BYTES_PER_S
) -> Played:
    """One run."""
    return _played(data, model, system, scenario(data, model, trace, system, reload_bytes_per_s=reload_bytes_per_s))


def play_on_demand(data: Path, model: str, instances: int, *, duration_s: float) -> Played:
    """SpotServe on a fleet that stays, at its price."""
    base = scenario(data, model, "B_S", SPOTSERVE, reload_bytes_per_s=RELOAD_BYTES_PER_S)
    fleet = replace(base, ondemand_instances=instances, duration_s=duration_s).of_policy("ondemand")
    return _played(data, model, SPOTSERVE, fleet)


def _played(data: Path, model: str, system: System, played: Scenario) -> Played:
    ends = Ends(played.duration_s)
    run = simulate(played, system.policy, make_plan, phases=phases_of(data, model), journal=ends)
    return Played(run, sorted(ends.latencies_s))


def row_of(played: Played) -> dict[str, Any]:
    """What the tables and their readers need of a run."""
    run, ended_s = played.run, played.ended_s
    return {
        "policy": run.policy,
        "average_s": run.latency_s.mean,
        "p50_s": run.latency_s.p50,
        "p99_s": run.latency_s.p99,
        "longest_s": run.latency_s.max,
        "ended_average_s": sum(ended_s) / max(1, len(ended_s)),
        # The artifact's own percentile (plot.py).
        "ended_p99_s": ended_s[int(len(ended_s) * 0.99)] if ended_s else 0.0,
        "ended": len(ended_s),
        "longest_stall_s": run.stall_s.max,
        "usd": run.cost.usd,
        "accepted": run.requests.accepted,
        "finished": run.requests.finished,
        "open": run.requests.open,
        "lost": run.requests.lost,
        "recomputed_tokens": run.recomputed_tokens,
        "layouts": layouts_of(run.timeline),
        "holes": holes_of(run.timeline),
        "migrations": [
            {
                "at_s": one.at_s,
                "trigger": one.trigger,
                "mode": one.mode,
                "outcome": one.outcome,
                "stall_s": one.stall_s_max,
            }
            for one in run.migrations
        ],
    }


def layouts_of(timeline: Sequence[Moment]) -> list[tuple[float, str]]:
    """(time, layout) of each layout that served for more than a moment."""
    served = [moment for moment in timeline if moment.service == "serving" and moment.layout != "-"]
    changes: list[tuple[float, str]] = []
    for moment in served:
        if not changes or changes[-1][1] != moment.layout:
            changes.append((round(moment.at_s, 1), moment.layout))
    return changes


def holes_of(timeline: Sequence[Moment]) -> list[tuple[float, float]]:
    """(begin, end) of each outage that is no migration: nothing serves although requests come."""
    holes: list[tuple[float, float]] = []
    begin_s: float | None = None
    for moment in timeline:
        if not moment.gpus:
            begin_s = moment.at_s if begin_s is None else begin_s
        elif begin_s is not None:
            if moment.at_s - begin_s >= HOLE_S:
                holes.append((round(begin_s, 1), round(moment.at_s, 1)))
            begin_s = None
    return holes
