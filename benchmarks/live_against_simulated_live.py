"""A live run of the scenario, what its clients saw, and the durations that its journal has.

A duration is taken from the entry that orders something to the event that answers it, as the simulator counts it: the
commit of the journal and the way to the worker are in it. What has no pair of entries is told by clients beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.clients import ClientStream, send_all
from benchmarks.daemon import running
from benchmarks.live_against_simulated_scene import NUM_INSTANCES, PATIENCE_S, Scene, read_entries
from benchmarks.measures import percentile
from benchmarks.timeline import Timeline, clock_offset_s, timeline_of
from benchmarks.workload import Arrival
from spotserve.core.controller import Entry
from spotserve.core.cost import balanced, slowest_stage_ms
from spotserve.core.spec import ServingSpec

RPC_STEPS = ("reserve", "release")


@dataclass(frozen=True, slots=True)
class LiveRun:
    """One run: its journal, its clients, and how the two clocks relate (client minus journal)."""

    entries: Sequence[Entry]
    streams: Sequence[ClientStream]
    offset_s: float
    load_before: float

    @property
    def spec(self) -> ServingSpec:
        """What the daemon served by."""
        event = self.entries[0].event
        assert event.kind == "journal_begun"
        return event.spec

    @property
    def served_at_s(self) -> float:
        """When the first placement was over, on the journal's clock: the trace counts from there."""
        return next(
            entry.event.at_s for entry in self.entries if any(one.kind == "finish_run" for one in entry.commands)
        )

    @property
    def began_at_s(self) -> float:
        """When the clients began, on the journal's clock."""
        return min(stream.due_s - stream.arrival.at_s for stream in self.streams) - self.offset_s


def live_run(
    scene: Scene,
    checkpoint: Path,
    state_dir: Path,
    arrivals: Sequence[Arrival],
    environment: Mapping[str, str],
) -> LiveRun:
    """Let a daemon live through the trace while the requests come. Raises RuntimeError for an answer that is short."""
    trace = state_dir.parent / f"{state_dir.name}.trace.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text(json.dumps({"format_version": "0.1", "events": scene.trace}), encoding="utf-8")
    load_before = os.getloadavg()[0]
    args = [str(checkpoint), *scene.args, "--trace", str(trace)]
    with running(state_dir, args, environment) as daemon:
        began_s = time.monotonic()
        streams = asyncio.run(
            send_all(daemon.url, arrivals, began_s=began_s, until_s=began_s + scene.end_s + PATIENCE_S)
        )

        def is_over() -> bool:
            """The instance that joins may serve after the last answer."""
            status = daemon.status()
            serves = status["state"] == "serving" and len(status["replicas"]) == NUM_INSTANCES
            return serves and time.monotonic() > began_s + scene.end_s

        daemon.wait_for(is_over, "joined", PATIENCE_S)
    entries = read_entries(state_dir)
    wrong = [stream for stream in streams if len(stream.token_ids) != stream.arrival.max_tokens]
    if wrong:
        raise RuntimeError(f"{len(wrong)} answers are not whole, the first: {wrong[0].error}")
    offset_s = clock_offset_s(_bounds(streams, timeline_of(entries)))
    return LiveRun(entries, streams, offset_s, load_before)


def _bounds(streams: Sequence[ClientStream], timeline: Timeline) -> list[tuple[float, float, float]]:
    return [
        (stream.due_s, timeline.accepted_s[stream.request], stream.headers_s)
        for stream in streams
        if stream.headers_s is not None and stream.request in timeline.accepted_s
    ]


# What clients saw


def client_latencies(run: LiveRun) -> dict[str, float]:
    """The compared figures, in seconds."""
    streams = run.streams
    latencies_s = [stream.times_s[-1] - stream.due_s for stream in streams]
    ttfts_s = [stream.times_s[0] - stream.due_s for stream in streams]
    tpots_s = [(stream.times_s[-1] - stream.times_s[0]) / (len(stream.times_s) - 1) for stream in streams]
    stalls_s = [after - before for stream in streams for before, after in pairwise(stream.times_s)]
    return {
        "ttft_p50_s": percentile(ttfts_s, 0.5),
        "ttft_p99_s": percentile(ttfts_s, 0.99),
        "tpot_p50_s": percentile(tpots_s, 0.5),
        "tpot_p99_s": percentile(tpots_s, 0.99),
        "latency_p50_s": percentile(latencies_s, 0.5),
        "latency_p99_s": percentile(latencies_s, 0.99),
        "longest_stall_s": max(stalls_s),
    }


# What the journal's durations are


@dataclass(frozen=True, slots=True)
class Measured:
    """A duration of the hardware table: the median of how many samples, and how they were taken."""

    seconds: float
    samples: int
    how: str


def of_the_world(run: LiveRun) -> dict[str, Measured]:
    """What instances, plans and their steps take, from a run of the scenario with other requests."""
    entries = run.entries
    return _medians(
        {
            "start_s": (_launches(entries), "LaunchInstance to WorkerRegistered"),
            "rpc_s": (_round_trips(entries), "TakeSnapshot, reserve and release to their answers"),
            "commit_s": (_answers(entries, "make_durable", "ledger_durable"), "MakeDurable to LedgerDurable"),
            "join_s": (_steps(entries, ("join_group",)), "join_group steps"),
            "activate_s": (_steps(entries, ("activate",)), "activate steps"),
            "detect_s": (_answers(entries, "kill_instance", "instance_lost"), "KillInstance to InstanceLost"),
            "solve_s": (_answers(entries, "solve_plan", "plan_ready"), "SolvePlan to PlanReady, the checker included"),
            "transfer_s": (_transfers(run, "copy_kv_delta"), "copy_kv_delta steps, less their bytes at the link rate"),
            "follow_s": (_transfers(run, "copy_kv"), "copy_kv steps, less their bytes at the link rate"),
        }
    )


def around_requests(run: LiveRun) -> dict[str, Measured]:
    """What surrounds an iteration and a request, from a run whose requests came one at a time and unpaced."""
    return _medians(
        {
            "iteration_s": (_iterations(run), "gaps between tokens of a request alone, less the profile's layers"),
            "accept_s": (_accepts(run), "a client's call to RequestAccepted"),
            "deliver_s": (_deliveries(run), "FirstToken to the client that reads it, and the ledger's commit before"),
        }
    )


def _medians(samples: Mapping[str, tuple[Sequence[float], str]]) -> dict[str, Measured]:
    return {name: Measured(median(values), len(values), how) for name, (values, how) in samples.items() if values}


def _answers(entries: Sequence[Entry], command: str, event: str) -> list[float]:
    """From each entry with such a command to the next event of a kind."""
    spans: list[float] = []
    ordered: list[float] = []
    for entry in entries:
        if entry.event.kind == event and ordered:
            spans.append(entry.event.at_s - ordered.pop(0))
        ordered += [entry.event.at_s for one in entry.commands if one.kind == command]
    return spans


def _launches(entries: Sequence[Entry]) -> list[float]:
    asked: dict[str, float] = {}
    spans = []
    for entry in entries:
        event = entry.event
        if event.kind == "worker_registered" and event.instance in asked:
            spans.append(event.at_s - asked[event.instance])
        for command in entry.commands:
            if command.kind == "launch_instance":
                asked[command.instance] = event.at_s
    return spans


def _steps(entries: Sequence[Entry], kinds: Sequence[str]) -> list[float]:
    spans = (span for run in timeline_of(entries).runs for span in run.steps.values())
    return [span.done_s - span.began_s for span in spans if span.step.kind in kinds and span.done_s is not None]


def _round_trips(entries: Sequence[Entry]) -> list[float]:
    return [*_answers(entries, "take_snapshot", "snapshot_taken"), *_steps(entries, RPC_STEPS)]


def _transfers(run: LiveRun, kind: str) -> list[float]:
    rate = run.spec.profile.link_bytes_per_s
    spans = (span for one in timeline_of(run.entries).runs for span in one.steps.values())
    return [
        max(0.0, span.done_s - span.began_s - span.num_bytes / rate)
        for span in spans
        if span.step.kind == kind and span.done_s is not None
    ]


def _iterations(run: LiveRun) -> list[float]:
    """What is left of each request's median gap: alone, it has the replica and most of a core for itself."""
    spec = run.spec
    alone_s = slowest_stage_ms(spec, balanced(spec.model, pipeline=1, tensor=1), tokens=1) / 1000.0
    gaps = [median(after - before for before, after in pairwise(one.times_s)) for one in run.streams]
    return [max(0.0, gap_s - alone_s) for gap_s in gaps]


def _accepts(run: LiveRun) -> list[float]:
    accepted_s = timeline_of(run.entries).accepted_s
    return [accepted_s[one.request] + run.offset_s - one.due_s for one in run.streams]


def _deliveries(run: LiveRun) -> list[float]:
    """The clocks' offset is known to a few milliseconds; what is too much here is too little in `accept_s`."""
    events = [entry.event for entry in run.entries]
    first_s: dict[str, float] = {event.request: event.at_s for event in reversed(events) if event.kind == "first_token"}
    commits_s = _answers(run.entries, "make_durable", "ledger_durable")
    commit_s = median(commits_s) if commits_s else 0.0
    return [
        max(0.0, commit_s + one.times_s[0] - run.offset_s - first_s[one.request])
        for one in run.streams
        if one.request in first_s
    ]
