"""`spotserve simulate`: what a day on spot instances would be like, under our policy and under the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.config import Origin, integer, nearest
from spotserve.core.canonical import canonical_json
from spotserve.core.options import POLICY_NAMES
from spotserve.errors import SpecError, SpotServeError
from spotserve.sim.scenario import ONDEMAND, STATIC, Scenario

MAX_SEEDS = 1000
MAX_SEED = 2**63 - 1
MAX_SWARM = 1_000_000


def register(app: typer.Typer) -> None:
    """Add `simulate` to the command line."""
    app.command()(simulate)


def simulate(
    scenario: Annotated[
        Path | None, typer.Argument(metavar="SCENARIO", help="A scenario, TOML; examples/scenarios has some.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Policy instead of the scenario's; may be repeated.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N", help="Runs of each policy, each with a seed of its own [default: 1].")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="S", help="The first seed [default: the scenario's].")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Write result.json, report.html, pictures, trace and requests."
        ),
    ] = None,
    swarm: Annotated[
        str | None,
        typer.Option(metavar="N", help="Instead: draw N clusters, loads and faults, and judge the promises."),
    ] = None,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Play requests and preemptions against policies in virtual time, and compare them."""
    wanted = wanted_format(output, as_json)
    first_seed = None if seed is None else cast("int", integer(0, MAX_SEED)(seed, Origin("--seed")))
    if swarm is not None:
        others = {"SCENARIO": scenario, "--policy": policy, "--seeds": seeds, "--out": out}
        if given := [name for name, value in others.items() if value]:
            raise SpecError(
                f"--swarm and {given[0]} exclude each other: a swarm draws its scenarios",
                hint="spotserve simulate --swarm 200 --seed 0",
            )
        run_swarm(cast("int", integer(1, MAX_SWARM)(swarm, Origin("--swarm"))), first_seed or 0, wanted=wanted)
        return
    if scenario is None:
        raise SpecError("neither SCENARIO nor --swarm is given", hint="spotserve simulate examples/scenarios/tiny.toml")
    num_seeds = cast("int", integer(1, MAX_SEEDS)(1 if seeds is None else seeds, Origin("--seeds")))
    compare_policies(scenario, policies=policy, num_seeds=num_seeds, first_seed=first_seed, out=out, wanted=wanted)


def run_swarm(num_seeds: int, first_seed: int, *, wanted: str) -> None:
    """Run drawn scenarios one after the other. Exit 1 if any promise was broken."""
    from spotserve.cli.simulation_progress import simulation_progress
    from spotserve.sim.swarm.report import SwarmReport, failure_lines, swarm_text
    from spotserve.sim.swarm.running import run_seed
    from spotserve.solvers.planner import make_plan

    report = SwarmReport(first_seed)
    with simulation_progress(unit="seeds") as show:
        for number in range(num_seeds):
            show(f"seed {first_seed + number}", number, num_seeds)
            report.add(run_seed(first_seed + number, make_plan))
    told = report.as_json()
    typer.echo(canonical_json(told) if wanted == "json" else swarm_text(told), nl=False)
    if wanted == "json":
        for failure in told["failures"]:
            typer.echo("\n".join(failure_lines(failure)), err=True)
    if told["failures"]:
        raise typer.Exit(1)


def compare_policies(
    path: Path,
    *,
    policies: Sequence[str] | None,
    num_seeds: int,
    first_seed: int | None,
    out: Path | None,
    wanted: str,
) -> None:
    """Simulate a scenario under each policy and seed; print, and write, the comparison."""
    from spotserve.cli.scenario_file import scenario_of
    from spotserve.cli.simulation_text import simulation_text

    first = scenario_of(path, seed=first_seed)
    names = tuple(dict.fromkeys(policies)) if policies else first.policies
    require_policies(first, names, origin="--policy" if policies else f"SCENARIO {path} at policies:")
    if out is not None:
        require_folder(out)
    scenarios = [
        replace(first if index == 0 else scenario_of(path, seed=first.seed + index), policies=names)
        for index in range(num_seeds)
    ]
    comparison = simulated(scenarios)
    if out is not None:
        from spotserve.cli.drawing.simulation import simulation_files
        from spotserve.cloud.traces import trace_json
        from spotserve.sim.workloads import workload_json

        played = {"trace.json": trace_json(first.trace), "workload.json": workload_json(first.workload)}
        write_files(out, {"result.json": canonical_json(comparison), **played, **simulation_files(comparison)})
    typer.echo(canonical_json(comparison) if wanted == "json" else simulation_text(comparison), nl=False)
    tell_unanswered(comparison)


def require_policies(scenario: Scenario, names: Sequence[str], *, origin: str) -> None:
    """Raise SpecError for a policy that there is not, or that the scenario says too little for."""
    known = (*POLICY_NAMES, ONDEMAND)
    for name in names:
        if name.removesuffix(STATIC) not in known:
            raise SpecError(
                f"{origin} {name} is not one of {', '.join(known)}, with or without {STATIC}",
                hint=nearest(name, [*known, *(f"{one}{STATIC}" for one in known)]),
            )
        if name.removesuffix(STATIC) == ONDEMAND and scenario.ondemand_instances is None:
            raise SpecError(
                f"{origin} {ONDEMAND} needs a number of instances, and the scenario has no ondemand_instances",
                hint="add a line like ondemand_instances = 4 before the first table of the scenario",
            )
        if name.removesuffix(STATIC) == "paper" and any(event.gpu_type for event in scenario.trace.events):
            raise SpecError(
                f"{origin} {name} plans for one GPU type only, and trace {scenario.trace.name} has several",
                hint="live, reroute and reparallelize know several types",
            )


def require_folder(out: Path) -> None:
    """Raise SpecError before anything is simulated if results could not be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise SpecError(f"--out {out} cannot be written to")


def simulated(scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """The comparison of a scenario's policies over the seeds that it was read with, as plain JSON."""
    # OR-Tools takes a second to import: nothing of it before the files are known to be good.
    from spotserve.cli.simulation_progress import simulation_progress
    from spotserve.sim.comparison import compared
    from spotserve.sim.simulation import simulate as simulate_policy
    from spotserve.solvers.planner import make_plan

    runs = []
    with simulation_progress() as show:
        for number, scenario in enumerate(scenarios):
            for name in scenario.policies:
                of_seed = f", seed {scenario.seed} ({number + 1} of {len(scenarios)})" if len(scenarios) > 1 else ""
                progress = _progress(show, f"{name}{of_seed}", scenario.duration_s)
                runs.append(simulate_policy(scenario, name, make_plan, progress=progress))
    comparison: dict[str, Any] = compared(scenarios[0], runs).model_dump(mode="json")
    return comparison


def _progress(show: Callable[[str, float, float], None], title: str, duration_s: float) -> Callable[[float], None]:
    return lambda at_s: show(title, at_s, duration_s)


def tell_unanswered(comparison: dict[str, Any]) -> None:
    """A line of talk for open requests; raises SpotServeError for lost ones, which no policy may have."""
    served = {run["policy"] for run in comparison["runs"] for moment in run["timeline"] if moment["gpus"]}
    for line in comparison["policies"]:
        if line["policy"] not in served:
            typer.echo(f"{line['policy']}: never served: at no moment did the model fit what was there", err=True)
        elif line["open"]:
            typer.echo(f"{line['policy']}: up to {line['open']} requests were still open at the end", err=True)
    lost = [line["policy"] for line in comparison["policies"] if line["lost"]]
    if lost:
        raise SpotServeError(
            f"accepted requests were lost under {', '.join(lost)}", hint="this is a fault of spotserve"
        )


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write files under other names first, so that an interrupted run leaves nothing half-written."""
    written: list[tuple[Path, Path]] = []
    try:
        for name, text in texts.items():
            temporary = folder / f".{name}.part"
            written.append((temporary, folder / name))
            temporary.write_text(text, encoding="utf-8")
        for temporary, final in written:
            temporary.replace(final)
    except OSError as error:
        raise SpecError(f"--out {folder} cannot be written: {error.strerror}") from error
    finally:
        for temporary, _ in written:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
