"""Renders the results of `benchmarks.preemption` as markdown. Every number is computed from the JSON, aims included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.measures import percentile

Run = Mapping[str, Any]

OURS = "live"
STALL_ITERATIONS = 3.0
SHORTER = 5.0
COPY_SHARE = 0.8
FIRST_BYTE_MS = 250.0


@dataclass(frozen=True, slots=True)
class Aim:
    """A goal beside what was measured."""

    text: str
    measured: str
    is_met: bool | None
    """None: nothing was measured."""


def render(results: Mapping[str, Any]) -> str:
    """The whole page."""
    links = list(dict.fromkeys(run["link"] for run in results["runs"]))
    parts = [_head(results), _aims_table(results, links)]
    for link in links:
        runs = [run for run in results["runs"] if run["link"] == link]
        parts += [f"## Links: {link}", _policy_table(runs), _disturbance_table(runs)]
    parts += [_copies(results["copies"]), _notes()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    facts = results["circumstances"]
    workload, model = results["workload"], results["model"]
    trace = "; ".join(_trace_event(event) for event in results["trace"])
    dirty = f" + {facts['uncommitted_files']} uncommitted files" if facts["uncommitted_files"] else ""
    return "\n".join(
        [
            "# Preemption: three policies on one trace",
            "",
            f"- Command: `{facts['command']}`",
            f"- Commit: `{facts['commit']}`{dirty}",
            f"- Hardware: {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB; "
            f"load average before {facts['load_average_before'][0]:.1f}",
            f"- Software: {facts['system']}, Python {facts['python']}, torch {facts['torch']}, one thread a process",
            f"- Model: random Llama, {model['num_layers']} layers, hidden {model['hidden_size']}, "
            f"{model['num_q_heads']}/{model['num_kv_heads']} heads, vocabulary {model['vocab_size']}, float32, "
            f"seed {model['seed']}",
            f"- Daemon: `spotserve run MODEL {' '.join(results['daemon_args'])}`",
            f"- Trace: {trace}",
            f"- Load: {workload['requests']} requests in {workload['duration_s']:g} s (Poisson, "
            f"{workload['rate_rps']:g}/s), prompts {_range(workload['prompt_tokens'])} tokens, outputs "
            f"{_range(workload['output_tokens'])} tokens, every third one sampled; seed {workload['seed']}",
            f"- Rounds: {results['rounds']}, policies interleaved. Cells are the median [smallest, largest] round.",
        ]
    )


def _trace_event(event: Mapping[str, Any]) -> str:
    what = ",".join(event.get("instances", ())) or f"{event['count']} instances"
    grace = f" ({event['grace_s']:g} s grace)" if "grace_s" in event else ""
    return f"{event['at_s']:g} s {event['kind']} {what}{grace}"


def _range(bounds: Sequence[int]) -> str:
    return f"{bounds[0]}–{bounds[1]}"


# Aims --------------------------------------------------------------------------------------------------------------


def _aims_table(results: Mapping[str, Any], links: Sequence[str]) -> str:
    lines = ["## Aims", "", "| links | aim | measured | met |", "| --- | --- | --- | --- |"]
    for link in links:
        runs = [run for run in results["runs"] if run["link"] == link]
        lines += [_aim_line(link, aim) for aim in run_aims(runs)]
    lines += [_aim_line("uncapped, idle", aim) for aim in copy_aims(results["copies"])]
    return "\n".join(lines)


def _aim_line(link: str, aim: Aim) -> str:
    met = "not measured" if aim.is_met is None else "yes" if aim.is_met else "**no**"
    return f"| {link} | {aim.text} | {aim.measured} | {met} |"


def run_aims(runs: Sequence[Run]) -> list[Aim]:
    """What is aimed at for one link rate."""
    ours = [run for run in runs if run["policy"] == OURS]
    if not ours:
        return []
    iterations = noticed_iterations(ours)
    recomputed = [d["recomputed_tokens"] for run in ours for d in run["disturbances"] if d["noticed_in_time"]]
    first_bytes = [d["first_byte_ms"] for d in _disturbances(ours, "notice") if d["first_byte_ms"] is not None]
    damaged = sum(run["tokens"][key] for run in ours for key in ("lost", "duplicated", "wrong"))
    accepted = sum(run["requests"]["accepted"] for run in ours)
    ended = sum(run["requests"]["finished"] for run in ours)
    aims = [
        _aim(
            f"noticed stall P99 ≤ {STALL_ITERATIONS:g} iterations",
            iterations,
            lambda values: percentile(values, 0.99) <= STALL_ITERATIONS,
            lambda values: (
                f"{percentile(values, 0.99):.1f} of {len(values)} stalls (P50 {percentile(values, 0.5):.1f})"
            ),
        ),
        _aim(
            "0 tokens recomputed when the notice suffices",
            recomputed,
            lambda values: sum(values) == 0,
            lambda values: f"{sum(values)} in {len(values)} notices",
        ),
        Aim(
            "no token lost, doubled or changed; every accepted request ends",
            f"{damaged} tokens; {ended} of {accepted} requests finished",
            damaged == 0 and ended == accepted,
        ),
    ]
    whole, noticed = "longest stall of the whole run", "longest stall around notices"
    aims += _against(runs, "reparallelize", whole, lambda run: float(run["longest_stall_s"]), SHORTER)
    aims += _against(runs, "reparallelize", noticed, lambda run: _longest(run, "notice"), SHORTER)
    for baseline in ("reroute", "reparallelize"):
        aims += _against(runs, baseline, "latency P99", lambda run: float(run["latency_p99_s"]), 1.0)
    aims.append(
        _aim(
            f"notice → first byte ≤ {FIRST_BYTE_MS:g} ms",
            first_bytes,
            lambda values: median(values) <= FIRST_BYTE_MS,
            lambda values: f"{_spread(values, '.0f')} ms, {len(values)} notices",
        )
    )
    return aims


def _against(runs: Sequence[Run], baseline: str, what: str, value: Callable[[Run], float], factor: float) -> list[Aim]:
    """Ours beside a baseline, by the medians of the rounds."""
    ours = [value(run) for run in runs if run["policy"] == OURS]
    theirs = [value(run) for run in runs if run["policy"] == baseline]
    if not ours or not theirs:
        return []
    text = f"{what} ≥ {factor:g}× shorter than `{baseline}`" if factor > 1 else f"{what} never worse than `{baseline}`"
    ratio = median(theirs) / median(ours)
    measured = f"{_spread(ours, '.2f')} s against {_spread(theirs, '.2f')} s ({ratio:.1f}×)"
    return [Aim(text, measured, ratio >= factor)]


def copy_aims(copies: Sequence[Mapping[str, Any]]) -> list[Aim]:
    """The copy rate with decoding idle."""
    aims = []
    for key, name in (("socket_reused_bytes_per_s", "reused"), ("socket_fresh_bytes_per_s", "fresh")):
        shares = [copy["bytes_per_s"] / copy[key] for copy in copies]
        aims.append(
            _aim(
                f"copy rate ≥ {COPY_SHARE:g} of a raw socket (into {name} memory)",
                shares,
                lambda values: median(values) >= COPY_SHARE,
                lambda values: f"{_spread(values, '.2f')} of {len(values)} copies",
            )
        )
    return aims


def noticed_iterations(runs: Sequence[Run]) -> list[float]:
    """Stalls at the cut-over of notices that sufficed, each in median iterations of its own run."""
    return [
        1000 * stall_s / run["iteration_ms"]
        for run in runs
        for disturbance in run["disturbances"]
        if disturbance["noticed_in_time"]
        for stall_s in disturbance["cut_over_stalls_s"]
    ]


def _aim(
    text: str,
    values: Sequence[float],
    is_met: Callable[[Sequence[float]], bool],
    shown: Callable[[Sequence[float]], str],
) -> Aim:
    if not values:
        return Aim(text, "—", None)
    return Aim(text, shown(values), is_met(values))


# Tables ------------------------------------------------------------------------------------------------------------


def _policy_table(runs: Sequence[Run]) -> str:
    policies = list(
        dict.fromkeys(run["policy"] for run in sorted(runs, key=lambda r: (r["policy"] != OURS, r["policy"])))
    )
    rows: list[tuple[str, Callable[[Run], float], str]] = [
        ("latency P50 (s)", lambda r: r["latency_p50_s"], ".2f"),
        ("latency P99 (s)", lambda r: r["latency_p99_s"], ".2f"),
        ("TTFT P50 (s)", lambda r: r["ttft_p50_s"], ".2f"),
        ("TTFT P99 (s)", lambda r: r["ttft_p99_s"], ".2f"),
        ("longest stall (s)", lambda r: r["longest_stall_s"], ".2f"),
        ("longest stall, notices only (s)", lambda r: _longest(r, "notice"), ".2f"),
        ("longest stall, kill only (s)", lambda r: _longest(r, "kill"), ".2f"),
        ("longest stall, join only (s)", lambda r: _longest(r, "join"), ".2f"),
        ("median iteration (ms)", lambda r: r["iteration_ms"], ".0f"),
        ("P99 gap while nothing happens (ms)", lambda r: r["calm_gap_p99_ms"], ".0f"),
        ("tokens recomputed", lambda r: r["recomputed_tokens"], ".0f"),
        ("weight bytes copied (MB)", lambda r: _sum(r, "weight_bytes_copied") / 1e6, ".0f"),
        ("weight bytes loaded from storage (MB)", lambda r: _sum(r, "weight_bytes_loaded") / 1e6, ".0f"),
        ("KV bytes moved (MB)", lambda r: _sum(r, "kv_bytes") / 1e6, ".1f"),
        ("requests accepted", lambda r: r["requests"]["accepted"], ".0f"),
        ("… refused", lambda r: r["requests"]["refused"], ".0f"),
        ("… failed", lambda r: r["requests"]["failed"], ".0f"),
        ("… unfinished at the end", lambda r: r["requests"]["unfinished"], ".0f"),
        ("tokens lost", lambda r: r["tokens"]["lost"], ".0f"),
        ("tokens duplicated", lambda r: r["tokens"]["duplicated"], ".0f"),
        ("tokens changed", lambda r: r["tokens"]["wrong"], ".0f"),
        ("streams identical to the reference (%)", _identical_percent, ".0f"),
    ]
    lines = ["| | " + " | ".join(f"`{policy}`" for policy in policies) + " |", "| --- |" + " --- |" * len(policies)]
    for title, value, form in rows:
        cells = [_spread([value(run) for run in runs if run["policy"] == policy], form) for policy in policies]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _disturbance_table(runs: Sequence[Run]) -> str:
    lines = [
        "Each event of the trace, all rounds together:",
        "",
        "| policy | event | in time | answered in (s) | cut-over stall P50 / P99 (ms) "
        "| longest gap of any stream meanwhile (ms) | recomputed | first byte (ms) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = dict.fromkeys(
        (run["policy"], d["kind"], d["instance"])
        for run in sorted(runs, key=lambda r: (r["policy"] != OURS, r["policy"]))
        for d in run["disturbances"]
    )
    for policy, kind, instance in keys:
        found = [
            d
            for run in runs
            if run["policy"] == policy
            for d in run["disturbances"]
            if (d["kind"], d["instance"]) == (kind, instance)
        ]
        cut_overs = [1000 * stall_s for d in found for stall_s in d["cut_over_stalls_s"]]
        longest = [1000 * max(d["stalls_s"], default=0.0) for d in found]
        first = [d["first_byte_ms"] for d in found if d["first_byte_ms"] is not None]
        in_time = f"{sum(d['noticed_in_time'] for d in found)} of {len(found)}" if kind == "notice" else "—"
        stalls = f"{percentile(cut_overs, 0.5):.0f} / {percentile(cut_overs, 0.99):.0f}" if cut_overs else "—"
        lines.append(
            f"| `{policy}` | {kind} {instance or ''} | {in_time} | {_spread([d['lasted_s'] for d in found], '.2f')} "
            f"| {stalls} | {_spread(longest, '.0f')} | {_spread([d['recomputed_tokens'] for d in found], '.0f')} "
            f"| {_spread(first, '.0f') if first else '—'} |"
        )
    return "\n".join(lines)


def _copies(copies: Sequence[Mapping[str, Any]]) -> str:
    if not copies:
        return ""
    lines = [
        "## Copy of weights with decoding idle, links uncapped",
        "",
        "| round | MB | s | MB/s | raw socket, fresh memory (MB/s) | raw socket, reused buffer (MB/s) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {copy['round']} | {copy['bytes'] / 1e6:.0f} | {copy['seconds']:.3f} | {copy['bytes_per_s'] / 1e6:.0f} "
        f"| {copy['socket_fresh_bytes_per_s'] / 1e6:.0f} | {copy['socket_reused_bytes_per_s'] / 1e6:.0f} |"
        for copy in copies
    ]
    return "\n".join(lines)


def _notes() -> str:
    return "\n".join(
        [
            "## How to read it",
            "",
            "- An *iteration* is the median gap between two tokens of a stream while nothing happens to the cluster,"
            " of the same run.",
            "- A *noticed stall* (cut-over stall) is the gap between a stream's last token of the old replica"
            " generation and its first of the new one, for every request that changed hands in a run that was over"
            " before the instance was taken. Beside it stands the longest gap of any stream from the notice to the end"
            " of the run: it has the prefills of requests that arrive meanwhile in it, as calm gaps do.",
            "- Latency and TTFT count from the time a request was due to be sent. A request that is unfinished when the"
            " run ends counts with its latency so far, and its stream's last gap runs to the end of the run.",
            "- *Recomputed* are tokens that were prefilled a second time. Bytes are those received and verified by"
            " workers.",
            "- *First byte*: from the notice's entry in the journal to the first transfer chunk (≤ 1 MiB) in place at a"
            " destination.",
            "- The copy rate is verified bytes ÷ the step's time in the journal, so commands, allocation and checksums"
            " are in it; the raw socket does none of that.",
        ]
    )


def _disturbances(runs: Sequence[Run], kind: str) -> list[Mapping[str, Any]]:
    return [d for run in runs for d in run["disturbances"] if d["kind"] == kind]


def _longest(run: Run, kind: str) -> float:
    return max((max(d["stalls_s"], default=0.0) for d in run["disturbances"] if d["kind"] == kind), default=0.0)


def _sum(run: Run, key: str) -> float:
    return float(sum(d[key] for d in run["disturbances"]))


def _identical_percent(run: Run) -> float:
    return 100.0 * float(run["tokens"]["identical_streams"]) / float(run["requests"]["accepted"])


def _spread(values: Sequence[float], form: str) -> str:
    """Median [smallest, largest]; one number where they do not differ."""
    texts = [format(value, form) for value in (median(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} [{texts[1]}, {texts[2]}]"
