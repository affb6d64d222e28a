"""Configure for a fleet of several GPU types: replicas may differ in tensor degree, stages and layers per stage.

The order of what is looked at is that of equal replicas: pins, the running shapes (hysteresis), migration headroom, a
second replica; then `mix` chooses among the templates that no other dominates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.core.cost import PipelineShape, Pool, Workload, pools_request_ms
from spotserve.core.plan import SolverReport
from spotserve.core.spec import ServingSpec
from spotserve.errors import SpecError
from spotserve.solvers.configure.candidates import MICRO
from spotserve.solvers.configure.choice import RESHAPE_GAIN_PERMILLE
from spotserve.solvers.configure.mix import SHARES, Mix, MixProblem, names_of, operating_points, pools_of, solve_mix
from spotserve.solvers.configure.templates import GpuKind, Template, TemplateMaker, undominated_templates
from spotserve.solvers.estimate import workload_of
from spotserve.solvers.facts import Facts
from spotserve.solvers.gpu_kinds import kinds_of
from spotserve.solvers.result import Result


@dataclass(frozen=True, slots=True)
class MixChoice:
    """How many replicas of which template (none: nothing fits), and how that was found."""

    replicas: tuple[tuple[Template, int], ...]
    report: SolverReport

    @property
    def shapes(self) -> tuple[PipelineShape, ...]:
        """The shape of each replica."""
        return tuple(template.shape for template, count in self.replicas for _ in range(count))

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The mix as pools of equal replicas."""
        return pools_of([template for template, _ in self.replicas], [count for _, count in self.replicas])


@dataclass(frozen=True, slots=True)
class _Solved:
    """A mix among some templates, and the latency it really gives, all pools' queues included."""

    templates: tuple[Template, ...]
    result: Result[Mix]
    latency_us: int

    @property
    def throughput_urps(self) -> int:
        """Requests per 10^6 seconds of the whole mix."""
        assert self.result.answer is not None
        return sum(t.throughput_urps * n for t, n in zip(self.templates, self.result.answer.counts, strict=True))

    @property
    def serves(self) -> bool:
        """Whether the load is served (an unknown one always is)."""
        return self.result.answer is not None and self.result.answer.serves_load


class MixConfigurer:
    """One choice for a mixed fleet; templates that run are always among those offered."""

    def __init__(
        self, spec: ServingSpec, kinds: Sequence[GpuKind], workload: Workload, running: Sequence[PipelineShape]
    ) -> None:
        self.spec, self.kinds, self.workload = spec, tuple(kinds), workload
        self.running = tuple(running)

    def choose(self) -> MixChoice:
        """The mix to run."""
        maker = TemplateMaker(self.spec, self.kinds, self.workload)
        reserves = (False, True) if self.spec.limits.migration_headroom_bytes else (False,)
        made = {template.shape: template for headroom in reserves for template in maker.all(headroom=headroom)}
        for shape in dict.fromkeys(self.running):
            if shape not in made and (template := self._judged(maker, shape)) is not None:
                made[shape] = template
        for templates, least, most, pins in self._pinned(tuple(made.values())):
            if (solved := self._best(templates, least, most)) is not None:
                return self._choice(self._preferred(solved, templates, least, most), pins)
        return MixChoice((), SolverReport(name="cpsat", status="infeasible", certificate={"kind": "no_candidate"}))

    def _judged(self, maker: TemplateMaker, shape: PipelineShape) -> Template | None:
        """The template of a shape that runs, if the GPUs that stay can hold it."""
        types = [kind.type for kind in self.kinds]
        if any(stage.device not in types for stage in shape.stages):
            return None
        chosen = [types.index(stage.device) for stage in shape.stages]
        return maker.judge(chosen, [stage.layers for stage in shape.stages], tensor=shape.tensor)

    def _pinned(self, templates: tuple[Template, ...]) -> list[tuple[tuple[Template, ...], int, int | None, str]]:
        """What the pins leave, one after the other: all kept, fewer replicas, any template."""
        limits = self.spec.limits
        if limits.data is None and limits.pipeline is None and limits.tensor is None:
            return [(templates, 1, None, "none")]
        shaped = tuple(
            t
            for t in templates
            if limits.pipeline in (None, t.shape.pipeline) and limits.tensor in (None, t.shape.tensor)
        )
        variants: list[tuple[tuple[Template, ...], int, int | None, str]] = [
            (shaped, limits.data or 1, limits.data, "kept")
        ]
        if limits.data is not None and limits.data > 1:
            variants.append((shaped, 1, limits.data - 1, "data_relaxed"))
        return [*variants, (templates, 1, None, "relaxed")]

    def _preferred(self, best: _Solved, templates: tuple[Template, ...], least: int, most: int | None) -> _Solved:
        """The running shapes where the best gains too little, then headroom, then a second replica."""
        offered = templates
        same = tuple(t for t in templates if t.shape in self.running)
        kept = self._best(same, least, most) if same else None
        if kept is not None and not self._worth(kept, best):
            best, offered = kept, same
        roomy = tuple(template for template in offered if template.headroom)
        if len(roomy) < len(offered) and (held := self._best(roomy, least, most)) is not None:
            best, offered = held, roomy
        if self.spec.policy == "live" and least < 2 and (most is None or most >= 2):
            several = self._best(offered, 2, most)
            if several is not None and several.serves >= best.serves:
                best = several
        return best

    def _worth(self, kept: _Solved, best: _Solved) -> bool:
        """Whether `best` gains enough over what keeps the running shapes."""
        if self.workload.load_rps <= 0:
            return False
        if best.serves != kept.serves:
            return best.serves
        return kept.latency_us * 1000 > best.latency_us * RESHAPE_GAIN_PERMILLE

    def _best(self, templates: tuple[Template, ...], least: int, most: int | None) -> _Solved | None:
        """The best mix of `templates`; None if there is none."""
        useful = undominated_templates(templates)
        offered = (*useful, *(t for t in templates if t.shape in self.running and t not in useful))
        load_urps = round(self.workload.load_rps * MICRO)
        problem = MixProblem(
            templates=offered,
            available=tuple(kind.count for kind in self.kinds),
            load_urps=load_urps,
            points=tuple(operating_points(self.spec, t, self.workload) for t in offered) if load_urps else (),
            running=tuple(self.running.count(template.shape) for template in offered),
            least=least,
            most=most,
        )
        result = solve_mix(problem)
        if result.answer is None:
            return None
        latency_ms = pools_request_ms(self.spec, pools_of(offered, result.answer.counts), self.workload)
        return _Solved(offered, result, round(latency_ms * 1000))

    def _choice(self, solved: _Solved, pins: str) -> MixChoice:
        mix = solved.result.answer
        assert mix is not None, "only solved mixes are chosen"
        replicas = tuple((t, count) for t, count in zip(solved.templates, mix.counts, strict=True) if count)
        known = self.workload.load_rps > 0
        by_latency = known and mix.serves_load
        scale = SHARES if by_latency else 1
        report = solved.result.report("cpsat").model_copy(
            update={
                "objective": solved.result.objective / scale,
                "bound": solved.result.bound / scale,
                "certificate": {
                    "kind": "template_columns",
                    "measure": "latency_us" if by_latency else "throughput_urps",
                    "mix": " ".join(f"{n}*{name}" for name, n in names_of(solved.templates, mix.counts).items()),
                    "replicas": sum(mix.counts),
                    "gpus": sum(t.gpus * count for t, count in replicas),
                    "latency_us": solved.latency_us,
                    "throughput_urps": solved.throughput_urps,
                    "cost_micro": sum(t.cost_micro * count for t, count in replicas),
                    "serves_load": int(mix.serves_load),
                    "pins": pins,
                    "headroom": "kept" if all(t.headroom for t, _ in replicas) else "given_up",
                },
            }
        )
        return MixChoice(replicas, report)


def configure_by_type(facts: Facts) -> MixChoice:
    """The mix for the GPUs that stay. Raises SpecError where the solver asked for knows one GPU type only."""
    solver = facts.solvers["configure"]
    if solver != "cpsat":
        names = ", ".join(sorted({facts.types[gpu] or facts.spec.profile.device for gpu in facts.view.staying}))
        raise SpecError(
            f"configure={solver} knows fleets of the profile's own GPU type only, these are {names}",
            hint="--solver configure=cpsat",
        )
    kinds = kinds_of(facts.view.staying, facts.view.memory, facts.types)
    running = [facts.shape_of(replica) for replica in facts.view.intact]
    return configure_mix(facts.spec, kinds, workload_of(facts.problem), running)


def configure_mix(
    spec: ServingSpec, kinds: Sequence[GpuKind], workload: Workload, running: Sequence[PipelineShape]
) -> MixChoice:
    """Choose replicas for a mixed fleet; `running` are the shapes of the replicas that run undisturbed."""
    return MixConfigurer(spec, kinds, workload, running).choose()
