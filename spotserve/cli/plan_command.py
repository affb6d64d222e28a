"""`spotserve plan`: what would happen to this cluster on that event; writes a plan file, changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from spotserve.cli.admin_commands import Format, Json, wanted_format
from spotserve.cli.config import Origin, integer, parse_solvers, seconds
from spotserve.cli.plan_file import model_of, require_fit, spec_of
from spotserve.core.canonical import canonical_json
from spotserve.core.check import check_plan
from spotserve.core.ids import GpuId, InstanceId
from spotserve.core.plan import Plan, PlanningProblem, Trigger
from spotserve.core.plan_text import plan_text
from spotserve.core.snapshot import InstanceView, Snapshot
from spotserve.core.spec import ServingSpec
from spotserve.errors import SpecError, UnknownInstanceError

HAS_CHANGES = 3
CANNOT_BE_MET = 4
MAX_LOAD_RPS = 1e6
DEFAULT_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Happening:
    """What the flags say happens; None or empty where they say nothing."""

    lose: tuple[InstanceId, ...]
    join: int | None
    load_rps: float | None
    grace_s: float | None

    @property
    def said(self) -> bool:
        """Whether any flag names an event."""
        return bool(self.lose) or self.join is not None or self.load_rps is not None


def register(app: typer.Typer) -> None:
    """Add `plan` to the command line."""
    app.command()(plan)


def plan(
    case: Annotated[
        Path | None, typer.Argument(metavar="CASE", help="A folder with spec.toml, snapshot.json and event.json.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(metavar="FILE", help="Serving spec, TOML or JSON.")] = None,
    snapshot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Snapshot, as spotserve snapshot prints it.")
    ] = None,
    lose: Annotated[str | None, typer.Option(metavar="ID[,ID]", help="Instances that are preempted.")] = None,
    join: Annotated[str | None, typer.Option(metavar="N", help="Blank instances that join.")] = None,
    load: Annotated[str | None, typer.Option(metavar="RPS", help="Requests per second from now on.")] = None,
    grace: Annotated[
        str | None, typer.Option(metavar="S", help="Notice before --lose takes effect; 0: none [default: 30].")
    ] = None,
    policy: Annotated[str | None, typer.Option(metavar="NAME", help="Policy instead of the spec's.")] = None,
    solver: Annotated[
        list[str] | None, typer.Option(metavar="KIND=NAME", help="Solver instead of the default.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the plan there.")] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 3 if the plan has changes.")] = False,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Plan for an event without changing anything; exit 4 if what is left cannot serve."""
    wanted = wanted_format(output, as_json)
    happening = happening_of(lose=lose, join=join, load=load, grace=grace)
    serving, seen, trigger = inputs(case, spec, snapshot, needs_event=not happening.said)
    serving = overridden(serving, policy=policy, solvers=solver)
    problem = problem_of(serving, seen, trigger, happening)
    require_fit(problem)
    made = solve(problem)
    text = canonical_json(made)
    if out is not None:
        write(out, text)
    typer.echo(text if wanted == "json" else plan_text(made.model_dump(mode="json")), nl=False)
    if not made.complete:
        typer.echo("the notice cannot be met: what is left cannot serve", err=True)
        raise typer.Exit(CANNOT_BE_MET)
    if exit_code and made.steps:
        raise typer.Exit(HAS_CHANGES)


def happening_of(*, lose: str | None, join: str | None, load: str | None, grace: str | None) -> Happening:
    """The flags' event, each value checked."""
    names = tuple(InstanceId(name.strip()) for name in lose.split(",")) if lose is not None else ()
    if any(not name for name in names):
        raise SpecError(f"--lose {lose} names no instance", hint="write --lose i3 or --lose i3,i5")
    if grace is not None and not names:
        raise SpecError(f"--grace {grace} has no meaning without --lose")
    grace_s = None if grace is None else cast("float", seconds(0)(grace, Origin("--grace")))
    count = None if join is None else cast("int", integer(1, 1024)(join, Origin("--join")))
    return Happening(names, count, None if load is None else load_rps(load), grace_s)


def load_rps(text: str) -> float:
    """A load that is a number, finite and not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_LOAD_RPS:
        raise SpecError(f"--load {text} is not between 0 and {MAX_LOAD_RPS:g} requests per second")
    return value


def inputs(
    case: Path | None, spec: Path | None, snapshot: Path | None, *, needs_event: bool
) -> tuple[ServingSpec, Snapshot, Trigger | None]:
    """Spec, snapshot and, where no flag tells it, the event of a case."""
    if case is not None and (spec is not None or snapshot is not None):
        raise SpecError("CASE and --spec or --snapshot exclude each other")
    if case is None:
        if spec is None or snapshot is None:
            raise SpecError("neither a CASE nor both --spec and --snapshot are given", hint="spotserve plan plans/NAME")
        return spec_of(spec, what="--spec"), model_of(Snapshot, snapshot, what="--snapshot"), None
    if not case.is_dir():
        raise SpecError(f"CASE {case} is not a folder", hint="it holds spec.toml, snapshot.json and event.json")
    serving = spec_of(case / "spec.toml", what="CASE")
    seen = model_of(Snapshot, case / "snapshot.json", what="CASE")
    return serving, seen, model_of(Trigger, case / "event.json", what="CASE") if needs_event else None


def overridden(spec: ServingSpec, *, policy: str | None, solvers: list[str] | None) -> ServingSpec:
    """The spec with another policy or other solvers; an unknown name is refused when the plan is made."""
    update: dict[str, Any] = {}
    if policy is not None:
        update["policy"] = policy
    if solvers:
        chosen = parse_solvers(solvers, Origin("--solver"))
        update["solvers"] = {**spec.solvers, **chosen}
    return spec.model_copy(update=update)


def problem_of(spec: ServingSpec, snapshot: Snapshot, trigger: Trigger | None, happening: Happening) -> PlanningProblem:
    """The planning problem: the world as it is, and what happens to it."""
    if happening.load_rps is not None:
        snapshot = snapshot.model_copy(update={"load_rps": happening.load_rps})
    joined: tuple[InstanceId, ...] = ()
    if happening.join is not None:
        snapshot, joined = with_joined(snapshot, happening.join)
    if happening.lose:
        trigger = losing(snapshot, happening)
        if trigger.kind == "lost":
            snapshot = without_doomed(snapshot, happening.lose)
    elif joined:
        trigger = Trigger(kind="joined", instances=joined)
    elif trigger is None:
        trigger = Trigger(kind="load" if snapshot.world.replicas else "start")
    epoch_to = snapshot.next_epoch if snapshot.next_epoch is not None else snapshot.world.epoch + 1
    return PlanningProblem(spec=spec, snapshot=snapshot, trigger=trigger, epoch_to=epoch_to)


def losing(snapshot: Snapshot, happening: Happening) -> Trigger:
    """The trigger of `--lose`: a notice, or with no grace a loss."""
    living = [one.id for one in snapshot.world.instances if one.state in ("ready", "doomed")]
    unknown = [name for name in happening.lose if name not in living]
    if unknown:
        raise UnknownInstanceError(f"instance {unknown[0]} is not there", hint=f"living: {' '.join(living) or 'none'}")
    grace_s = DEFAULT_GRACE_S if happening.grace_s is None else happening.grace_s
    names = tuple(dict.fromkeys(happening.lose))
    if grace_s == 0:
        return Trigger(kind="lost", instances=names)
    return Trigger(kind="notice", instances=names, remaining_s=grace_s)


def without_doomed(snapshot: Snapshot, names: tuple[InstanceId, ...]) -> Snapshot:
    """The snapshot in which those of `names` that are under notice already are gone: no grace is left to them."""
    instances = tuple(
        one.model_copy(update={"state": "gone"}) if one.id in names and one.state == "doomed" else one
        for one in snapshot.world.instances
    )
    return snapshot.model_copy(update={"world": snapshot.world.model_copy(update={"instances": instances})})


def with_joined(snapshot: Snapshot, count: int) -> tuple[Snapshot, tuple[InstanceId, ...]]:
    """The snapshot with `count` more instances like the last one, under ids never used in it."""
    world = snapshot.world
    if not world.instances:
        raise SpecError("--join needs an instance in the snapshot to take the GPUs from")
    pattern = world.instances[-1]
    numbers = [int(one.id[1:]) for one in world.instances if one.id[1:].isdecimal()]
    first = max(numbers, default=-1) + 1
    names = tuple(InstanceId(f"i{first + index}") for index in range(count))
    blank = tuple(
        InstanceView(
            id=name,
            state="ready",
            market=pattern.market,
            gpus=tuple(
                gpu.model_copy(update={"id": GpuId(f"{name}/{index}")}) for index, gpu in enumerate(pattern.gpus)
            ),
        )
        for name in names
    )
    world = world.model_copy(update={"instances": (*world.instances, *blank)})
    return snapshot.model_copy(update={"world": world}), names


def solve(problem: PlanningProblem) -> Plan:
    """The plan, judged by the checker: one with a finding is written down but not applyable."""
    from spotserve.solvers.planner import make_plan  # OR-Tools takes a second to import: only who plans pays.

    made = make_plan(problem)
    findings = check_plan(made)
    for finding in findings:
        typer.echo(f"finding: {finding.line()}", err=True)
    return made.model_copy(update={"applyable": False}) if findings else made


def write(path: Path, text: str) -> None:
    """Write a plan file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--out {path} cannot be written: {error.strerror}") from error
