"""The numbers of a run, as pure functions of what clients saw and the journal tells.

Everything is counted: a request that was accepted and has not ended when the run does keeps its latency so far (it can
only be longer) and its stream's last gap runs to the end of the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

from benchmarks.clients import ClientStream
from benchmarks.timeline import KV_STEPS, LOAD_STEPS, WEIGHT_STEPS, Disturbance, PlanRunSpan, Timeline

SETTLE_S = 0.5
"""A gap this close behind a disturbance still counts to it and not to the undisturbed iterations."""


@dataclass(frozen=True, slots=True)
class Gap:
    """The time between two tokens of one stream, on the journal's clock."""

    request: str
    start_s: float
    stop_s: float

    @property
    def length_s(self) -> float:
        """How long."""
        return self.stop_s - self.start_s


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """A stream beside its reference."""

    lost: int
    duplicated: int
    wrong: int
    missing_at_end: int
    """Of an unfinished stream: what had not come yet."""

    @property
    def is_identical(self) -> bool:
        """Nothing lost, doubled or changed; the end may still be to come."""
        return not (self.lost or self.duplicated or self.wrong)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed (nearest rank: never made up)."""
    if not values:
        raise ValueError("percentile of no values")
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * round(share * 1000) // 1000))
    return ordered[rank - 1]


def check_tokens(received: Sequence[int], reference: Sequence[int], *, is_over: bool) -> TokenCheck:
    """What is wrong with a stream. Lost and doubled tokens are told apart from changed ones by alignment."""
    if is_over and list(received) == list(reference):
        return TokenCheck(0, 0, 0, 0)
    if not is_over and list(received) == list(reference[: len(received)]):
        return TokenCheck(0, 0, 0, len(reference) - len(received))
    lost = duplicated = wrong = missing = 0
    for tag, a0, a1, b0, b1 in SequenceMatcher(a=reference, b=received, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if tag == "delete" and not is_over and a1 == len(reference):
            missing += a1 - a0
            continue
        wrong += min(a1 - a0, b1 - b0)
        lost += max(0, (a1 - a0) - (b1 - b0))
        duplicated += max(0, (b1 - b0) - (a1 - a0))
    return TokenCheck(lost, duplicated, wrong, missing)


def gaps_of(streams: Sequence[ClientStream], *, offset_s: float, ended_s: float) -> list[Gap]:
    """All gaps between tokens, on the journal's clock; an unfinished stream's last one runs to the end of the run."""
    gaps = []
    for stream in streams:
        times_s = [time_s - offset_s for time_s in stream.times_s]
        if times_s and stream.is_accepted and not stream.is_finished:
            times_s.append(ended_s - offset_s)
        gaps += [Gap(stream.request, before_s, after_s) for before_s, after_s in pairwise(times_s)]
    return gaps


def undisturbed(gaps: Sequence[Gap], disturbances: Sequence[Disturbance]) -> list[Gap]:
    """The gaps outside every disturbance."""
    return [gap for gap in gaps if not any(d.overlaps(gap.start_s - SETTLE_S, gap.stop_s) for d in disturbances)]


def stalls_during(gaps: Sequence[Gap], disturbance: Disturbance) -> dict[str, float]:
    """The longest gap of each stream that overlaps a disturbance."""
    stalls: dict[str, float] = {}
    for gap in gaps:
        if disturbance.overlaps(gap.start_s, gap.stop_s):
            stalls[gap.request] = max(stalls.get(gap.request, 0.0), gap.length_s)
    return stalls


def cut_over_stalls(gaps: Sequence[Gap], run: PlanRunSpan) -> dict[str, float]:
    """Of each request that changed hands in a run: the gap in which the commit lies."""
    if run.commit_s is None:
        return {}
    return {
        gap.request: gap.length_s
        for gap in gaps
        if gap.request in run.owners_changed and gap.start_s <= run.commit_s <= gap.stop_s
    }


def disturbance_measures(gaps: Sequence[Gap], timeline: Timeline, disturbance: Disturbance) -> dict[str, object]:
    """One disturbance: what it cost the streams and what it moved."""
    runs = disturbance.runs
    first_bytes = [run.first_byte_s for run in runs if run.first_byte_s is not None]
    cut_overs = [stall_s for run in runs for stall_s in cut_over_stalls(gaps, run).values()]
    return {
        "kind": disturbance.kind,
        "instance": disturbance.instance,
        "at_s": round(disturbance.at_s, 3),
        "lasted_s": round(disturbance.ended_s - disturbance.at_s, 3),
        "noticed_in_time": disturbance.is_noticed_in_time,
        "runs": [
            {
                "epoch": run.epoch,
                "trigger": run.trigger,
                "mode": run.mode,
                "rung": run.rung,
                "outcome": "completed" if run.is_completed else "aborted" if run.is_aborted else "open",
                "seconds": None if run.ended_s is None else round(run.ended_s - run.began_s, 3),
                "requests_that_changed_hands": len(run.owners_changed),
            }
            for run in runs
        ],
        "stalls_s": sorted(round(stall_s, 4) for stall_s in stalls_during(gaps, disturbance).values()),
        "cut_over_stalls_s": sorted(round(stall_s, 4) for stall_s in cut_overs),
        "recomputed_tokens": timeline.recomputed_during(disturbance),
        "weight_bytes_copied": sum(run.bytes_of(*WEIGHT_STEPS) for run in runs),
        "weight_bytes_loaded": sum(run.bytes_of(*LOAD_STEPS) for run in runs),
        "kv_bytes": sum(run.bytes_of(*KV_STEPS) for run in runs),
        "first_byte_ms": round(1000 * (min(first_bytes) - disturbance.at_s), 1) if first_bytes else None,
    }


def run_measures(
    streams: Sequence[ClientStream],
    references: Mapping[int, Sequence[int]],
    timeline: Timeline,
    *,
    offset_s: float,
    ended_s: float,
) -> dict[str, object]:
    """All numbers of one run of one policy."""
    accepted = [stream for stream in streams if stream.is_accepted]
    if not accepted:
        raise ValueError("no request was accepted")
    gaps = gaps_of(streams, offset_s=offset_s, ended_s=ended_s)
    calm = undisturbed(gaps, timeline.disturbances)
    calm_s = [gap.length_s for gap in calm]
    checks = [
        # A stream that failed has lost what it did not get; only one that still runs may have it to come.
        check_tokens(
            stream.token_ids, references[stream.arrival.index], is_over=stream.is_finished or bool(stream.error)
        )
        for stream in accepted
    ]
    latencies_s = [
        (stream.times_s[-1] if stream.is_finished and stream.times_s else ended_s) - stream.due_s for stream in accepted
    ]
    ttfts_s = [(stream.times_s[0] if stream.times_s else ended_s) - stream.due_s for stream in accepted]
    disturbances = [disturbance_measures(gaps, timeline, d) for d in timeline.disturbances]
    iteration_s = statistics.median(calm_s)
    return {
        "requests": {
            "sent": len(streams),
            "refused": len(streams) - len(accepted),
            "accepted": len(accepted),
            "finished": sum(stream.is_finished for stream in accepted),
            "failed": sum(stream.error is not None for stream in accepted),
            "unfinished": sum(not stream.is_finished and stream.error is None for stream in accepted),
        },
        "tokens": {
            "expected": sum(len(references[stream.arrival.index]) for stream in accepted),
            "received": sum(len(stream.token_ids) for stream in accepted),
            "lost": sum(check.lost for check in checks),
            "duplicated": sum(check.duplicated for check in checks),
            "wrong": sum(check.wrong for check in checks),
            "missing_at_end": sum(check.missing_at_end for check in checks),
            "identical_streams": sum(check.is_identical for check in checks),
        },
        "latency_p50_s": percentile(latencies_s, 0.5),
        "latency_p99_s": percentile(latencies_s, 0.99),
        "ttft_p50_s": percentile(ttfts_s, 0.5),
        "ttft_p99_s": percentile(ttfts_s, 0.99),
        "iteration_ms": 1000 * iteration_s,
        "calm_gap_p99_ms": 1000 * percentile(calm_s, 0.99),
        "calm_gap_max_ms": 1000 * max(calm_s),
        "num_calm_gaps": len(calm_s),
        "longest_stall_s": max((gap.length_s for gap in gaps), default=0.0),
        "recomputed_tokens": sum(tokens for _, tokens in timeline.recomputed_at_s),
        "disturbances": disturbances,
    }
