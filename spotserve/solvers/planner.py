"""The plan builder: from one planning problem to one plan, pure and deterministic.

`make_plan` is configure -> routes -> place -> migrate -> steps. Here is which configuration it is for, and whether what
runs goes on, is replaced live or stopped first; how a layout becomes a plan is in `rungs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from spotserve.core.cost import PipelineShape, Worth, worth_of
from spotserve.core.options import WHILE_SERVING
from spotserve.core.plan import Mode, Plan, PlanningProblem, SolverReport
from spotserve.core.snapshot import Replica
from spotserve.solvers.configure import Candidate, Choice, Table, configure, tabulate
from spotserve.solvers.configure.choice import RESHAPE_GAIN_PERMILLE
from spotserve.solvers.configure.mixed import MixChoice, configure_by_type
from spotserve.solvers.estimate import workload_of
from spotserve.solvers.facts import Facts, gather
from spotserve.solvers.layout import Layout, LayoutBuilder
from spotserve.solvers.migrate.sources import UNPLANNED
from spotserve.solvers.migration_cost import MigrationCost, migration_cost
from spotserve.solvers.registry import POLICIES, require_known
from spotserve.solvers.rungs import Rungs
from spotserve.solvers.widening import Mix, mixes

ATTEMPTS = 8
"""Candidates tried in live mode before in_place is considered, and compared where the first one's outage is long."""

MAX_COMPARED_GPUS = 128
"""GPUs up to which several candidates are planned to the end; beyond, the first one that has a live plan is taken."""

WORSE_PERMILLE = 1500
"""A later candidate may be this much worse than the first and still be preferred for being live."""


@dataclass(frozen=True, slots=True)
class Planner:
    """One planning run: the problem, and the layouts that are built for it."""

    facts: Facts
    layouts: LayoutBuilder

    def plan(self) -> Plan:
        """The best plan the ladder reaches."""
        if self.facts.policy == "reroute" and self.facts.problem.snapshot.world.replicas:
            return self._reroute_by_type() if any(self.facts.types.values()) else self._reroute()
        if self.facts.mixed:
            return self._plan_by_type()
        rows = self._candidates()
        first = self._configure(rows)
        rungs = self._rungs(first.report)
        if first.candidate is None or (self.facts.policy == "reroute" and _pins(first) == "relaxed"):
            return rungs.without_target()  # Rerouting has its (P, M) or nothing.
        if self._keeps_everything(first.candidate):
            return rungs.unchanged()
        if self._may_be_live() and (plan := self._best_live(rows, first)) is not None:
            return self._widened(plan, rows) or plan
        layout = self._lay_out(first.candidate, self._left_running(self._kept(first.candidate)), mode="in_place")
        assert layout is not None, "a tabulated candidate fits an empty GPU"
        restart = rungs.in_place(layout)
        if (wider := self._widened(restart, rows)) is not None:
            return wider
        return restart if self._is_worth_its_stop(restart, first.candidate.worth) else rungs.unchanged()

    def _rungs(self, configured: SolverReport) -> Rungs:
        """Plans of layouts for a configuration that was chosen so."""
        return Rungs(self.facts, self.layouts, {"configure": configured})

    def _may_be_live(self) -> bool:
        """Whether new replicas may come up beside the old: the policy wants it, or there is nothing old."""
        beside = self.facts.policy == "live" and self.facts.solvers["move"] == WHILE_SERVING
        return beside or not self.facts.problem.snapshot.world.replicas

    def _is_worth_its_stop(self, restart: Plan, chosen: Worth) -> bool:
        """Whether what runs should stop for a better configuration; the published policies never ask.

        What is hit has no choice, nor has what cannot serve its load or is not of the degrees that a person wants.
        """
        replicas = self.facts.problem.snapshot.world.replicas
        if self.facts.policy != "live" or not replicas or len(self.facts.view.intact) < len(replicas):
            return True
        if self._is_pinned():
            return True
        running = worth_of(self.facts.spec, self.facts.pools_of(replicas), workload_of(self.facts.problem))
        if chosen.serves_load and not running.serves_load:
            return True
        staying = migration_cost(Rungs(self.facts, self.layouts, {}).unchanged(), running, best=chosen)
        return migration_cost(restart, chosen, best=chosen).beats(staying)

    def _is_pinned(self) -> bool:
        """Whether a person chose degrees, which a mix of shapes would not keep."""
        limits = self.facts.spec.limits
        return (limits.data, limits.pipeline, limits.tensor) != (None, None, None)

    def _widened(self, plan: Plan, rows: Table) -> Plan | None:
        """A live plan that leaves what is intact as it is, with other shapes on idle GPUs; None if `plan` is as good.

        Only under a known load, as nothing else says what a mix of shapes is worth.
        """
        facts, workload = self.facts, workload_of(self.facts.problem)
        intact = facts.view.intact
        if not self._may_be_live() or self._is_pinned() or workload.load_rps <= 0 or not intact:
            return None
        if len(facts.view.staying) > MAX_COMPARED_GPUS:
            return None
        planned = worth_of(facts.spec, facts.pools_of(plan.target.replicas), workload)
        # As a change of shape must gain, and as a live plan may be worse than one that stops first.
        live = plan.mode == "live"
        most_ms = planned.latency_ms * (1000 / RESHAPE_GAIN_PERMILLE if live else WORSE_PERMILLE / 1000)
        num_idle = len(facts.idle(intact))
        found = mixes(facts.spec, rows, workload, intact=facts.pools_of(intact), num_idle=num_idle)
        for mix in islice(found, ATTEMPTS):
            # A mix that serves the load where the plan does not is taken however slow it is.
            if (not mix.worth.serves_load, mix.worth.latency_ms) > (not planned.serves_load, most_ms):
                return None
            layout = self.layouts.lay_out(mix.shape, mix.count, intact, mode="live")
            if layout is not None:
                rungs = self._rungs(_beside(mix))
                return rungs.live(layout) if layout.fresh or layout.affected else rungs.unchanged()
        return None

    def _left_running(self, kept: tuple[Replica, ...]) -> tuple[Replica, ...]:
        """Which of the replicas that a target keeps run on beside a plan that stops first.

        The paper stops all of them (section 2.3 of its artifact's mapper) but where it only adds to what runs.
        """
        if self.facts.policy == "reparallelize":
            return ()
        only_adds = len(kept) == len(self.facts.problem.snapshot.world.replicas)
        only_adds = only_adds and self.facts.solvers["migrate"] not in UNPLANNED
        return kept if self.facts.policy != "paper" or only_adds else ()

    # -- replicas of one shape ------------------------------------------------------------------------------

    def _candidates(self) -> Table:
        """Every configuration that fits the GPUs that stay."""
        return tabulate(
            self.facts.spec,
            memory=[self.facts.view.memory[gpu] for gpu in self.facts.view.staying],
            workload=workload_of(self.facts.problem),
            intact=self.facts.view.intact,
            hit=(*self.facts.view.draining, *self.facts.view.lost),
        )

    def _configure(self, rows: Table) -> Choice:
        return configure(
            self.facts.spec,
            rows,
            workload=workload_of(self.facts.problem),
            solver=self.facts.solvers["configure"],
            in_bursts=self.facts.problem.snapshot.in_bursts,
        )

    def _near_best(self, rows: Table, first: Choice) -> Iterator[tuple[Choice, Candidate]]:
        """The best candidate, then the next ones while they are about as good."""
        best = first.candidate
        assert best is not None
        choice, left = first, rows
        for _ in range(ATTEMPTS):
            candidate = choice.candidate
            if candidate is None or not _about_as_good(candidate, best) or _pins(choice) != _pins(first):
                return
            yield choice, candidate
            left = left.without(pipeline=candidate.pipeline, tensor=candidate.tensor, data=candidate.data)
            choice = self._configure(left)

    def _best_live(self, rows: Table, first: Choice) -> Plan | None:
        """The live plan of the first candidate that has one, or of another that costs clients clearly less.

        Others are only planned where the first one's outage is long enough for any of them to win; None if no candidate
        fits beside what is there.
        """
        assert first.candidate is not None, "what is near has something to be near to"
        best: tuple[Plan, MigrationCost] | None = None
        passed_over = 0
        for choice, candidate in self._near_best(rows, first):
            report = _with(choice, passed_over=passed_over) if best else choice.report
            plan = self._live(candidate, self._rungs(report))
            if plan is None:
                continue
            lost = [replica.id for replica in self.facts.view.lost]
            cost = migration_cost(plan, candidate.worth, best=first.candidate.worth, lost=lost)
            if best is None:
                best = leading = plan, cost
                if not cost.may_be_beaten or len(self.facts.view.staying) > MAX_COMPARED_GPUS:
                    return plan
            elif cost.beats(leading[1]) and cost.score < best[1].score:
                best = plan, cost
            passed_over += 1
        return best[0] if best else None

    def _live(self, candidate: Candidate, rungs: Rungs) -> Plan | None:
        """A live plan of a candidate, as far up the ladder as the deadline allows; None if memory is short."""
        if self._keeps_everything(candidate):
            return rungs.unchanged()
        layout = self._lay_out(candidate, self._kept(candidate), mode="live")
        return None if layout is None else rungs.live(layout)

    def _lay_out(self, candidate: Candidate, untouched: tuple[Replica, ...], *, mode: Mode) -> Layout | None:
        return self.layouts.lay_out(candidate.shape, candidate.data - len(untouched), untouched, mode=mode)

    def _kept(self, candidate: Candidate) -> tuple[Replica, ...]:
        """The intact replicas of the chosen shape, at most D."""
        shapes = [candidate.shape] * candidate.data
        return self.facts.kept(shapes, lambda replica: (replica.pipeline, replica.tensor))

    def _keeps_everything(self, candidate: Candidate) -> bool:
        """Whether the chosen layout is exactly what runs."""
        kept = self._kept(candidate)
        return len(kept) == len(self.facts.problem.snapshot.world.replicas) == candidate.data

    # -- replicas of several shapes -------------------------------------------------------------------------

    def _plan_by_type(self) -> Plan:
        """A plan for a fleet of several GPU types, whose replicas may differ in shape."""
        choice = configure_by_type(self.facts)
        rungs = self._rungs(choice.report)
        if not choice.replicas:
            return rungs.without_target()
        untouched = self.facts.kept(choice.shapes, self.facts.shape_of)
        if len(untouched) == len(self.facts.problem.snapshot.world.replicas) == len(choice.shapes):
            return rungs.unchanged()
        if self._may_be_live():
            layout = self._lay_out_by_type(choice, untouched, mode="live")
            if layout is not None:
                return rungs.live(layout)
        layout = self._lay_out_by_type(choice, self._left_running(untouched), mode="in_place")
        assert layout is not None, "a template fits an empty GPU"
        restart = rungs.in_place(layout)
        worth = worth_of(self.facts.spec, choice.pools, workload_of(self.facts.problem))
        return restart if self._is_worth_its_stop(restart, worth) else rungs.unchanged()

    def _lay_out_by_type(self, choice: MixChoice, untouched: tuple[Replica, ...], *, mode: Mode) -> Layout | None:
        """The new replicas of a mix placed beside the untouched ones."""
        shapes = list(choice.shapes)
        for replica in untouched:
            shapes.remove(self.facts.shape_of(replica))
        return self.layouts.lay_out_by_type(shapes, untouched, mode=mode)

    # -- rerouting ------------------------------------------------------------------------------------------

    def _reroute(self) -> Plan:
        """Rerouting: fixed (P, M); a hit replica is dropped, idle GPUs form new ones from storage, KV is lost.

        GPUs of a hit replica are idle once it has stopped, and then load all of their new position: its engine is
        another one (the artifact's baseline, "ready only when fully loaded").
        """
        replicas, untouched = self.facts.problem.snapshot.world.replicas, self.facts.view.intact
        pipeline, tensor = replicas[0].pipeline, replicas[0].tensor
        spawn = len(self.facts.idle(untouched)) // (pipeline * tensor)
        if self.facts.spec.limits.data is not None:
            spawn = max(0, min(spawn, self.facts.spec.limits.data - len(untouched)))
        report = SolverReport(
            name="fixed_shape",
            status="optimal" if untouched or spawn else "infeasible",
            objective=len(untouched) + spawn,
            bound=len(untouched) + spawn,
            certificate={"kind": "fixed_shape", "pipeline": pipeline, "tensor": tensor},
        )
        rungs = self._rungs(report)
        if not spawn and len(untouched) == len(replicas):
            return rungs.unchanged()
        return self._rerouted(rungs, lambda mode: self.layouts.lay_out((pipeline, tensor), spawn, untouched, mode=mode))

    def _rerouted(self, rungs: Rungs, lay_out: Callable[[Mode], Layout | None]) -> Plan:
        """New pipelines come up beside the others, but stop first where they need GPUs of one that was hit."""
        layout = lay_out("live")
        hit = {gpu for replica in self.facts.affected(self.facts.view.intact) for gpu in replica.gpus}
        if layout is None or any(gpu in hit for replica in layout.fresh for gpu in replica.gpus):
            layout = lay_out("in_place")
            assert layout is not None, "a shape that runs fits empty GPUs of its types"
            return rungs.in_place(layout)
        return rungs.from_storage(layout)

    def _reroute_by_type(self) -> Plan:
        """Rerouting in a fleet of several GPU types: idle GPUs form replicas of the shapes that run or were hit."""
        replicas, untouched = self.facts.problem.snapshot.world.replicas, self.facts.view.intact
        spawned = self._spawned_by_type(untouched)
        count = len(untouched) + len(spawned)
        report = SolverReport(
            name="fixed_shape",
            status="optimal" if count else "infeasible",
            objective=count,
            bound=count,
            certificate={"kind": "fixed_shape", "replicas": count},
        )
        rungs = self._rungs(report)
        if not spawned and len(untouched) == len(replicas):
            return rungs.unchanged()
        return self._rerouted(rungs, lambda mode: self.layouts.lay_out_by_type(spawned, untouched, mode=mode))

    def _spawned_by_type(self, untouched: tuple[Replica, ...]) -> list[PipelineShape]:
        """Replicas of the shapes that there are, in the order of the replicas, as many as idle GPUs have room for.

        What a GPU that is gone was of is not known any more: its replica's shape counts only if another one has it.
        """
        most = self.facts.spec.limits.data
        left = Counter(self.facts.types[gpu] for gpu in self.facts.idle(untouched))
        spawned: list[PipelineShape] = []
        known = [
            replica
            for replica in self.facts.problem.snapshot.world.replicas
            if all(gpu in self.facts.types for gpu in replica.gpus)
        ]
        for shape in dict.fromkeys(self.facts.shape_of(replica) for replica in known):
            needed: Counter[str] = Counter()
            for stage in shape.stages:
                needed[stage.device] += shape.tensor
            while all(left[device] >= num for device, num in needed.items()) and (
                most is None or len(untouched) + len(spawned) < most
            ):
                left.subtract(needed)
                spawned.append(shape)
        return spawned


def _beside(mix: Mix) -> SolverReport:
    """The report of a mix: the fastest of those that disturb nobody."""
    certificate: dict[str, str | int | float] = {
        "kind": "beside_what_runs",
        "count": mix.count,
        "pipeline": mix.shape[0],
        "tensor": mix.shape[1],
        "serves_load": int(mix.worth.serves_load),
    }
    return SolverReport(name="widening", status="feasible", objective=mix.worth.latency_ms, certificate=certificate)


def _pins(choice: Choice) -> str | int | float | None:
    """How far a choice keeps the pinned degrees."""
    return (choice.report.certificate or {}).get("pins")


def _with(choice: Choice, *, passed_over: int) -> SolverReport:
    """The report of a choice that was taken over better ones of which the migration costs more."""
    certificate = {**(choice.report.certificate or {}), "passed_over": passed_over}
    return choice.report.model_copy(update={"certificate": certificate})


def _about_as_good(candidate: Candidate, best: Candidate) -> bool:
    """Whether a live plan for `candidate` is worth more than an in_place plan for `best`."""
    if candidate.unserved > best.unserved:
        return False
    if best.latency_us == candidate.latency_us:
        return candidate.throughput_urps * WORSE_PERMILLE >= best.throughput_urps * 1000
    return candidate.latency_us * 1000 <= best.latency_us * WORSE_PERMILLE


def make_plan(problem: PlanningProblem) -> Plan:
    """The plan for a problem. Raises SpecError for an unknown policy or solver."""
    require_known("policy", problem.spec.policy, POLICIES)
    facts = gather(problem)
    return Planner(facts, LayoutBuilder(facts)).plan()
