"""How long a new instance takes to serve when its weights come from a peer, and when nobody has them any more.

    python -m benchmarks.loading [--rounds 3] [--links uncapped,125MB] [--out benchmarks/results/loading]

One real daemon per round and link rate, of one instance at first, each instance holding the whole model. Three ways, in
another order each round:

- `peer`: an instance is added while another serves; then the older one is killed.
- `disk, warm`: every instance is killed, the files are read once so that the page cache has them, one is added.
- `disk, cold`: every instance is killed, the files are dropped from the page cache, one is added.

Times are the journal's. The workers are emulated GPUs of one machine: a link is a loopback socket, held to a rate or
not.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.daemon import Daemon, running
from benchmarks.preemption import Setting
from benchmarks.random_llama import ModelShape, random_llama
from benchmarks.results_file import circumstances, say, write_results
from benchmarks.timeline import LOAD_STEPS, WEIGHT_STEPS, PlanRunSpan, timeline_of
from spotserve.core.controller import Entry
from spotserve.core.plan import Activate
from spotserve.store.journal import EntryJournal, Journal

WAYS = ("peer", "disk, warm", "disk, cold")
GPU_MEMORY = "700MiB"
ARGS = ("--instances", "1", "-dp", "2", "-pp", "1", "-tp", "1", "--gpu-memory", GPU_MEMORY, "--max-num-seqs", "4")
PATIENCE_S = 180.0
SHOWN = (
    ("joined_s", "add-instance to the worker's registration"),
    ("weights_s", "its first weight step to the last one done"),
    ("serving_s", "registration to serving"),
    ("total_s", "add-instance to serving"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", default="uncapped,125MB", help="bytes per second of a worker's link, or `uncapped`")
    parser.add_argument("--layers", type=int, default=10, help="of the model: about 25 MB each, beside 196 MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "spotserve-benchmarks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    options.work_dir.mkdir(parents=True, exist_ok=True)
    shape = ModelShape(seed=options.seed, num_layers=options.layers)
    setting = Setting(options.work_dir, random_llama(shape, options.work_dir), options.seed)
    results: dict[str, Any] = {
        "format_version": "0.1",
        "circumstances": circumstances("benchmarks.loading"),
        "model": {**asdict(shape), "bytes": sum(path.stat().st_size for path in weight_files(setting))},
        "daemon_args": ARGS,
        "rounds": options.rounds,
        "fills": [],
    }
    for round_number in range(options.rounds):
        for link in options.links.split(","):
            say(f"round {round_number}, link {link}")
            for fill in measure(setting, link, rotated(round_number), f"loading-{link}-{round_number}"):
                results["fills"].append({"round": round_number, "link": link, **fill})
    results["circumstances"]["load_average_after"] = os.getloadavg()
    write_results(options.out, results, render)
    say(f"written: {options.out}.md, {options.out}.json")
    return 0


def rotated(round_number: int) -> tuple[str, ...]:
    """The ways, each round beginning with another one."""
    first = round_number % len(WAYS)
    return (*WAYS[first:], *WAYS[:first])


def measure(setting: Setting, link: str, ways: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """Fill one new instance in every way."""
    rate = None if link == "uncapped" else float(link.removesuffix("MB")) * 1e6
    state_dir = setting.state_dir(name)
    told: list[dict[str, Any]] = []
    with running(state_dir, [str(setting.checkpoint), *ARGS], setting.environment(rate)) as daemon:
        for way in ways:
            told.append(
                {"way": way, "cached_share": prepared(daemon, setting, way), "load_average": os.getloadavg()[0]}
            )
            before = living(daemon)
            told[-1]["instance"] = str(daemon.admin("add-instance")["instance"])
            serving = {*before, told[-1]["instance"]}
            daemon.wait_for(lambda want=serving: served_by(daemon) == want, f"served by {serving}", PATIENCE_S)  # type: ignore[misc]
            if way == "peer":
                kill(daemon, before)
    entries = list(EntryJournal(Journal.read_only(state_dir / "journal.db")).read())
    for fill in told:
        yield {**fill, **times_of(entries, fill["instance"])}


def prepared(daemon: Daemon, setting: Setting, way: str) -> float:
    """Bring about what a way begins with; returns the share of the files that the page cache has."""
    if way != "peer":
        kill(daemon, living(daemon))
    for path in weight_files(setting):
        with path.open("rb", buffering=0) as file:
            if way == "disk, cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while way == "disk, warm" and file.read(1 << 20):
                pass
    return statistics.fmean(cached_share(path) for path in weight_files(setting))


def kill(daemon: Daemon, instances: Sequence[str]) -> None:
    """Take instances away without notice, and wait until the service has settled."""
    for name in instances:
        daemon.admin("kill", instance=name)
    left = set(living(daemon))
    daemon.wait_for(lambda: served_by(daemon) == left and daemon.status()["state"] in STATES, "settled", PATIENCE_S)


STATES = ("serving", "degraded")


def living(daemon: Daemon) -> list[str]:
    """Instances that are not gone."""
    return [one["id"] for one in daemon.status()["instances"] if one["state"] != "gone"]


def served_by(daemon: Daemon) -> set[str]:
    """Instances that a replica runs on."""
    replicas = daemon.status()["replicas"]
    return {gpu.partition("/")[0] for replica in replicas for stage in replica["stages"] for gpu in stage["gpus"]}


def weight_files(setting: Setting) -> list[Path]:
    """The checkpoint's safetensors."""
    return sorted(setting.checkpoint.glob("*.safetensors"))


def cached_share(path: Path) -> float:
    """The share of a file's pages that are in the page cache (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        size = len(pages)
        flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        place = ctypes.c_char.from_buffer(pages)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(size), flags)
        del place
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flag & 1 for flag in flags) / len(flags)


def times_of(entries: Sequence[Entry], instance: str) -> dict[str, Any]:
    """When the instance was wanted, had joined, had its weights, and served; and where its bytes came from."""
    wanted_s = next(
        entry.event.at_s
        for entry in entries
        for command in entry.commands
        if command.kind == "launch_instance" and command.instance == instance
    )
    joined_s = next(
        entry.event.at_s
        for entry in entries
        if entry.event.kind == "worker_registered" and entry.event.instance == instance
    )
    run = next(
        run
        for run in timeline_of(entries).runs
        if run.is_completed and run.began_s >= joined_s and copied(run, instance)
    )
    spans = copied(run, instance)
    began_s = min(span.began_s for span in spans)
    done_s = max(span.done_s or 0.0 for span in spans)
    active_s = max(s.done_s or 0.0 for s in run.steps.values() if isinstance(s.step, Activate))
    return {
        "from_peers": sum(span.num_bytes for span in spans if isinstance(span.step, WEIGHT_STEPS)),
        "from_storage": sum(span.num_bytes for span in spans if isinstance(span.step, LOAD_STEPS)),
        "joined_s": joined_s - wanted_s,
        "weights_s": done_s - began_s,
        "serving_s": active_s - joined_s,
        "total_s": active_s - wanted_s,
    }


def copied(run: PlanRunSpan, instance: str) -> list[Any]:
    """The steps of a run that bring weights to an instance."""
    return [
        span
        for span in run.steps.values()
        if isinstance(span.step, (*WEIGHT_STEPS, *LOAD_STEPS))
        and getattr(span.step, "destination", getattr(span.step, "workers", ("",))[0]).startswith(f"{instance}/")
    ]


def render(results: Mapping[str, Any]) -> str:
    """The results as markdown."""
    given, fills = results["circumstances"], results["fills"]
    lines = [
        "# A new instance's weights: from a peer, and from disk",
        "",
        f"`{given['command']}`, commit {given['commit'][:12]} ({given['uncommitted_files']} files changed), "
        f"{given['processor']}, {given['cores']} cores, {given['memory_gib']} GiB; load average "
        f"{given['load_average_before'][0]:.1f} before, {given['load_average_after'][0]:.1f} after. Model: "
        f"{results['model']['bytes'] / 1e6:.0f} MB of float32 from seed {results['model']['seed']}. "
        f"{results['rounds']} rounds, the ways in another order each. Medians, and the range.",
        "",
        "| link | way | in page cache | from peers | from storage | "
        + " | ".join(key.removesuffix("_s") for key, _ in SHOWN)
        + " | weights, MB/s |",
        "| --- | --- | --- | --- | --- |" + " --- |" * (len(SHOWN) + 1),
    ]
    for link in dict.fromkeys(fill["link"] for fill in fills):
        for way in WAYS:
            same = [fill for fill in fills if (fill["link"], fill["way"]) == (link, way)]
            rates = [(f["from_peers"] + f["from_storage"]) / f["weights_s"] / 1e6 for f in same]
            cached = (
                "not read" if way == "peer" else f"{100 * statistics.median(f['cached_share'] for f in same):.0f} %"
            )
            cells = [
                cached,
                *(f"{statistics.median(f[key] for f in same) / 1e6:.0f} MB" for key in ("from_peers", "from_storage")),
                *(spread([fill[key] for fill in same], " s") for key, _ in SHOWN),
                spread(rates, "", digits=0),
            ]
            lines.append(f"| {link} | {way} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {key.removesuffix('_s')}: {meaning}." for key, meaning in SHOWN)]
    lines += [
        "- In page cache: pages of the files that were there before the instance was added (mincore). A warm cache "
        "makes disk a copy within memory, which favours it: a machine that has just come has read nothing yet. Cold is "
        "one local disk with one reader; what the host of a virtual disk has in memory cannot be dropped from here.",
        "- Link: loopback TCP between two processes, in which sender and receiver share the cores; with a rate, held "
        "to it by a token bucket (`SPOTSERVE_LINK_BYTES_PER_S`). Storage is not held to any rate.",
        "- From disk nobody serves meanwhile, as nobody is left; from a peer that peer serves on, without requests.",
    ]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], unit: str, *, digits: int = 2) -> str:
    """`0.52 s (0.48 to 0.61)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
