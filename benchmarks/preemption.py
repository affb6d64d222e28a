"""Serves one workload through one capacity trace with every policy and reports what clients saw.

    python -m benchmarks.preemption [--rounds 3] [--links 64MB,uncapped] [--out benchmarks/results/preemption]

For each link rate and round, every policy runs the real daemon (`spotserve run`) on the same trace and the same seeded
requests, one policy after the other and in another order each round. All share one model, one measured profile and
one undisturbed reference of every stream. A phase without any request then measures the bulk copy of weights beside a
plain socket. Results are a JSON file and the same as markdown (benchmarks/report.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks.ceiling import measure_ceiling
from benchmarks.clients import ClientStream, send_all
from benchmarks.daemon import running
from benchmarks.measures import run_measures
from benchmarks.random_llama import ModelShape, random_llama
from benchmarks.report import render
from benchmarks.results_file import circumstances, say, write_results
from benchmarks.timeline import WEIGHT_STEPS, Timeline, clock_offset_s, read_timeline
from benchmarks.workload import Arrival, WorkloadShape, draw_arrivals

POLICIES = ("live", "reroute", "reparallelize")
TRACE = (
    {"at_s": 8.0, "kind": "notice", "instances": ["i0"], "grace_s": 15.0},
    {"at_s": 26.0, "kind": "notice", "instances": ["i2"], "grace_s": 15.0},
    {"at_s": 44.0, "kind": "add", "count": 2},
    {"at_s": 58.0, "kind": "kill", "instances": ["i3"]},
)
"""The first notice takes half of one replica of two, the second half of the last one while a spare waits; two new
instances come; then half of the replica that the spare completed is killed without notice."""
TRACE_S = 66.0
PATIENCE_S = 60.0
"""How long after the last arrival a run waits for what is still open."""
NUM_INSTANCES = 4
GPU_MEMORY = "400MiB"
"""Too little for the whole model: a replica needs two GPUs."""
PINNED = ("--pipeline-parallel-size", "2", "--tensor-parallel-size", "1")
"""One shape for all policies: emulated GPUs share the machine's cores, so the speed-up that a profile expects of a
larger tensor degree is not there to be had."""
MAX_NUM_SEQS = "16"
COPIES_PER_ROUND = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of an invocation share."""

    folder: Path
    checkpoint: Path
    seed: int

    def environment(self, link_bytes_per_s: float | None) -> dict[str, str]:
        """Variables of a daemon."""
        cap = {} if link_bytes_per_s is None else {"SPOTSERVE_LINK_BYTES_PER_S": f"{link_bytes_per_s:.0f}"}
        return {"SPOTSERVE_PROFILE_CACHE": str(self.folder / "profiles"), **cap}

    def args(self, policy: str, *more: str) -> list[str]:
        """Arguments of `spotserve run`."""
        shared = [
            "--instances",
            str(NUM_INSTANCES),
            "--gpu-memory",
            GPU_MEMORY,
            *PINNED,
            "--max-num-seqs",
            MAX_NUM_SEQS,
        ]
        return [str(self.checkpoint), "--policy", policy, "--seed", str(self.seed), *shared, *more]

    def state_dir(self, name: str) -> Path:
        """A fresh state dir."""
        path = self.folder / "state" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preemption", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--links", default="64MB,uncapped", help="bytes per second of a worker's link, or `uncapped`")
    parser.add_argument("--rate", type=float, default=0.4, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "spotserve-benchmarks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "preemption")
    parser.add_argument("--render", type=Path, help="only write the markdown of a results file again")
    options = parser.parse_args(arguments)
    if options.render is not None:
        write_results(options.render.with_suffix(""), json.loads(options.render.read_text(encoding="utf-8")), render)
        return 0
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    options.work_dir.mkdir(parents=True, exist_ok=True)
    results = measure(options)
    write_results(options.out, results, render)
    say(f"written: {options.out}.md, {options.out}.json")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All phases, in the order of the module's docstring."""
    shape = ModelShape(seed=options.seed)
    setting = Setting(options.work_dir, random_llama(shape, options.work_dir), options.seed)
    workload = WorkloadShape(rate_rps=options.rate, duration_s=TRACE_S, vocab_size=shape.vocab_size, seed=options.seed)
    arrivals = draw_arrivals(workload)
    results: dict[str, Any] = {
        "format_version": "0.1",
        "circumstances": circumstances("benchmarks.preemption"),
        "model": asdict(shape),
        "workload": {**asdict(workload), "requests": len(arrivals)},
        "trace": TRACE,
        "daemon_args": setting.args("POLICY")[1:],
        "rounds": options.rounds,
        "runs": [],
        "copies": [],
    }
    say(f"{len(arrivals)} requests; the undisturbed reference of each first")
    references = measure_references(setting, arrivals)
    policies = options.policies.split(",")
    for link, round_number, policy in schedule(options.links.split(","), options.rounds, policies):
        name = f"{policy}-{link}-{round_number}"
        say(name)
        run = measure_run(setting, policy, _rate_of(link), name, arrivals, references)
        results["runs"].append({"policy": policy, "link": link, "round": round_number, **run})
        (setting.folder / "unfinished.json").write_text(json.dumps(results), encoding="utf-8")
    for round_number in range(options.rounds):
        say(f"copies with decoding idle, round {round_number}")
        results["copies"] += measure_copies(setting, round_number)
    results["circumstances"]["load_average_after"] = os.getloadavg()
    return results


def schedule(links: Sequence[str], rounds: int, policies: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """(link, round, policy): policies interleaved, each round beginning with another one."""
    for link in links:
        for round_number in range(rounds):
            first = round_number % len(policies)
            for policy in (*policies[first:], *policies[:first]):
                yield link, round_number, policy


def measure_references(setting: Setting, arrivals: Sequence[Arrival]) -> dict[int, list[int]]:
    """The tokens of every stream when nothing happens to the cluster."""
    hurried = [  # All as soon as there is room: when a request comes changes nothing about its tokens.
        Arrival(a.index, 0.0, a.prompt_ids, a.max_tokens, a.temperature, a.seed) for a in arrivals
    ]
    with running(setting.state_dir("reference"), setting.args("live"), setting.environment(None)) as daemon:
        began_s = time.monotonic()
        streams = asyncio.run(send_all(daemon.url, hurried, began_s=began_s, until_s=began_s + 600.0))
    for stream in streams:
        if not stream.is_finished or len(stream.token_ids) != stream.arrival.max_tokens:
            raise RuntimeError(f"reference {stream.arrival.index} has {len(stream.token_ids)} tokens: {stream.error}")
    return {stream.arrival.index: stream.token_ids for stream in streams}


def measure_run(
    setting: Setting,
    policy: str,
    link_bytes_per_s: float | None,
    name: str,
    arrivals: Sequence[Arrival],
    references: Mapping[int, Sequence[int]],
) -> dict[str, object]:
    """One policy, once."""
    trace = setting.folder / "trace.json"
    trace.write_text(json.dumps({"format_version": "0.1", "events": TRACE}), encoding="utf-8")
    state_dir = setting.state_dir(name)
    load_before = os.getloadavg()[0]
    with running(
        state_dir, setting.args(policy, "--trace", str(trace)), setting.environment(link_bytes_per_s)
    ) as daemon:
        began_s = time.monotonic()
        until_s = began_s + TRACE_S + PATIENCE_S
        streams = asyncio.run(send_all(daemon.url, arrivals, began_s=began_s, until_s=until_s))
        ended_s = time.monotonic()
    timeline = read_timeline(state_dir)
    offset_s = clock_offset_s(_bounds(streams, timeline))
    measures = run_measures(streams, references, timeline, offset_s=offset_s, ended_s=ended_s)
    return {"load_average_before": load_before, **measures}


def _bounds(streams: Sequence[ClientStream], timeline: Timeline) -> list[tuple[float, float, float]]:
    return [
        (stream.due_s, timeline.accepted_s[stream.request], stream.headers_s)
        for stream in streams
        if stream.headers_s is not None and stream.request in timeline.accepted_s
    ]


def measure_copies(setting: Setting, round_number: int) -> list[dict[str, object]]:
    """Weights of a stage pulled by a spare while nothing decodes, each beside a plain socket measured just then.

    One replica of two stages and two spares; a notice for one of its instances, then for the heir, and so on.
    """
    state_dir = setting.state_dir(f"copies-{round_number}")
    ceilings = []
    with running(state_dir, setting.args("live", "-dp", "1"), setting.environment(None)) as daemon:
        for _ in range(COPIES_PER_ROUND):
            status = daemon.status()
            victim = str(status["replicas"][0]["stages"][-1]["gpus"][0]).partition("/")[0]
            epoch = int(status["epoch"])
            num_bytes = 200 << 20
            ceilings.append(measure_ceiling(num_bytes))
            daemon.admin("notice", instance=victim, grace_s=5.0)

            def is_over(victim: str = victim, epoch: int = epoch) -> bool:
                status = daemon.status()
                states = {instance["id"]: instance["state"] for instance in status["instances"]}
                lines = [line for line in status["migrations"] if line["epoch"] > epoch]
                return states[victim] == "gone" and bool(lines) and lines[-1]["outcome"] is not None

            daemon.wait_for(is_over, "migrated", 60.0)
            daemon.admin("add-instance")  # The next spare.
            daemon.wait_for(lambda: _num_ready(daemon.status()) == NUM_INSTANCES, "joined", 60.0)
    runs = [run for run in read_timeline(state_dir).runs if run.trigger == "notice"]
    return [
        {
            "round": round_number,
            "bytes": span.num_bytes,
            "seconds": span.done_s - span.began_s,
            "bytes_per_s": span.num_bytes / (span.done_s - span.began_s),
            "socket_fresh_bytes_per_s": ceiling.fresh_bytes_per_s,
            "socket_reused_bytes_per_s": ceiling.reused_bytes_per_s,
        }
        for run, ceiling in zip(runs, ceilings, strict=True)
        for span in run.steps.values()
        if isinstance(span.step, WEIGHT_STEPS) and span.done_s is not None and span.num_bytes
    ]


def _num_ready(status: Mapping[str, Any]) -> int:
    return sum(instance["state"] == "ready" for instance in status["instances"])


def _rate_of(link: str) -> float | None:
    """`64MB` -> bytes per second."""
    if link == "uncapped":
        return None
    return float(link.removesuffix("MB")) * 1e6


if __name__ == "__main__":
    sys.exit(main())
