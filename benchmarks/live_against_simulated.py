"""Sets one scenario as a real daemon lives through it beside the same scenario simulated with what was measured here.

    python -m benchmarks.live_against_simulated [--runs 5] [--paces 0.03,0] [--out FILE]

The model is profiled by `spotserve profile`. Then, with requests that no compared run has, durations are measured: one
request at a time for what surrounds an iteration and a request, the scenario under way for what a plan's steps take.
After that nothing is adjusted: the scenario is simulated once and lived through `--runs` times, each pace for itself.
`--render FILE` writes the markdown of a results file again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.daemon import SPOTSERVE
from benchmarks.live_against_simulated_live import (
    LiveRun,
    Measured,
    around_requests,
    client_latencies,
    live_run,
    of_the_world,
)
from benchmarks.live_against_simulated_report import TOLERANCE, render
from benchmarks.live_against_simulated_scene import (
    MODEL,
    Course,
    Scene,
    course_of,
    difference,
    draw_requests,
    draw_single_requests,
)
from benchmarks.live_against_simulated_virtual import hardware_of, simulated_latencies, simulated_run
from benchmarks.random_llama import random_llama
from benchmarks.results_file import circumstances, say, write_results
from benchmarks.workload import Arrival
from spotserve.sim.hardware import Hardware

SCENE = Scene()


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of an invocation share."""

    folder: Path
    checkpoint: Path

    def environment(self, pace_s: float) -> dict[str, str]:
        """Variables of a daemon whose replicas begin an iteration every `pace_s` at most; 0 for as fast as they can."""
        cache = {"SPOTSERVE_PROFILE_CACHE": str(self.folder / "profiles")}
        return {**cache, "SPOTSERVE_ITERATION_S": str(pace_s)} if pace_s else cache

    def run(self, name: str, arrivals: Sequence[Arrival], *, pace_s: float) -> LiveRun:
        """One live run in a fresh state dir."""
        say(name)
        state_dir = self.folder / "state" / name
        shutil.rmtree(state_dir, ignore_errors=True)
        state_dir.parent.mkdir(parents=True, exist_ok=True)
        return live_run(SCENE, self.checkpoint, state_dir, arrivals, self.environment(pace_s))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_against_simulated")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--paces", default="0.03,0", help="least seconds of an iteration; 0: as fast as it is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "spotserve-benchmarks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "live_against_simulated")
    parser.add_argument("--render", type=Path, help="only write the markdown of a results file again")
    options = parser.parse_args(arguments)
    if options.render is not None:
        write_results(options.render.with_suffix(""), json.loads(options.render.read_text(encoding="utf-8")), render)
        return 0
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    options.work_dir.mkdir(parents=True, exist_ok=True)
    paces_s = [float(pace) for pace in options.paces.split(",")]
    results = measure(options.work_dir, seed=options.seed, runs=options.runs, paces_s=paces_s)
    write_results(options.out, results, render)
    say(f"written: {options.out}.md, {options.out}.json")
    return 0


def measure(work_dir: Path, *, seed: int, runs: int, paces_s: Sequence[float]) -> dict[str, Any]:
    """All phases, in the order of the module's docstring."""
    before = circumstances("benchmarks.live_against_simulated")
    setting = Setting(work_dir, random_llama(MODEL, work_dir))
    say("profile")
    profile_model(setting)
    single = setting.run("single", draw_single_requests(SCENE, seed), pace_s=0.0)
    surrounding = around_requests(single)
    arrivals = draw_requests(SCENE, seed)
    results: dict[str, Any] = {
        "format_version": "0.1",
        "circumstances": before,
        "model": asdict(MODEL),
        "trace": SCENE.trace,
        "daemon_args": SCENE.args,
        "requests": len(arrivals),
        "tolerance": TOLERANCE,
        "profile": single.spec.profile.model_dump(mode="json"),
        "paces": [],
    }
    for pace_s in paces_s:
        other = setting.run(f"measured-{pace_s:g}", draw_requests(SCENE, seed + 1000), pace_s=pace_s)
        measured = {**of_the_world(other), **surrounding}
        lived = [setting.run(f"lived-{pace_s:g}-{number}", arrivals, pace_s=pace_s) for number in range(runs)]
        results["paces"].append(compared(lived, measured, arrivals, pace_s=pace_s))
        (work_dir / "unfinished.json").write_text(json.dumps(results), encoding="utf-8")
    results["circumstances"]["load_average_after"] = os.getloadavg()
    return results


def profile_model(setting: Setting) -> None:
    """Measure the model as a person would; the daemons find the result in their cache."""
    environment = {**os.environ, **setting.environment(0.0)}
    command = [SPOTSERVE, "profile", str(setting.checkpoint), "--again"]
    subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def compared(
    lived: Sequence[LiveRun], measured: dict[str, Measured], arrivals: Sequence[Arrival], *, pace_s: float
) -> dict[str, Any]:
    """The live runs of one pace beside their simulation."""
    hardware: Hardware = hardware_of(SCENE, measured, pace_s=pace_s)
    began_at_s = median(run.began_at_s for run in lived)
    simulated = simulated_run(SCENE, lived[0].spec, hardware, arrivals, served_at_s=began_at_s)
    course = course_of(simulated.entries)
    return {
        "pace_s": pace_s,
        "measured": {name: asdict(one) for name, one in measured.items()},
        "simulated": {"course": told(course), **simulated_latencies(simulated.result)},
        "live": [
            {
                "course": told(course_of(run.entries)),
                "differs": difference(course_of(run.entries), course),
                "load_average_before": run.load_before,
                **client_latencies(run),
            }
            for run in lived
        ],
    }


def told(course: Course) -> dict[str, list[str]]:
    """A course as it stands in the results."""
    return {"states": list(course.states), "plans": [str(plan) for plan in course.plans]}


if __name__ == "__main__":
    sys.exit(main())
