"""Configure: which (D, P, M, B) the GPUs that stay should run.

The candidates are few (thousands at 4096 GPUs), so they are tabulated with the cost model; the choice is then
epsilon-lexicographic: among those within 5 % of the best, fewest disturbed GPUs, then more throughput. SpotServe
(ASPLOS'24, Algorithm 1) takes the plain minimum, which thrashes between neighbours. CP-SAT chooses over the table;
`enumerate` filters it in Python and must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from spotserve.core.cost import (
    Degrees,
    ShardSizes,
    Workload,
    least_kv_blocks,
    most_kv_blocks,
    replica_shards,
    request_ms,
    running_bound,
    throughput_rps,
)
from spotserve.core.plan import SolverReport
from spotserve.core.slices import max_tensor_degree
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ServingSpec, weight_copies

TOLERANCE_PERMILLE = 50
RESHAPE_GAIN_PERMILLE = 1250
"""Under a known load a change of (P, M) must win at least this much over the shape that runs, or the shape stays
(hysteresis); under an unknown load what runs is kept."""

UNSERVED_US = 10**15
MAX_DETERMINISTIC_TIME = 10.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feasible configuration and what it is judged by; all integers."""

    data: int
    pipeline: int
    tensor: int
    max_running: int
    gpus: int
    unserved: int
    latency_us: int
    throughput_urps: int
    disturbed: int
    reshaped: int
    headroom: int

    @property
    def shape(self) -> tuple[int, int]:
        """(P, M)."""
        return self.pipeline, self.tensor


@dataclass(frozen=True, slots=True)
class Goal:
    """One level of the lexicographic choice: a column, its direction and how far from the best is still good."""

    column: str
    maximise: bool = False
    tolerance_permille: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen candidate (None: nothing fits) and how it was found."""

    candidate: Candidate | None
    report: SolverReport


Chooser = Callable[[Sequence[Candidate], Sequence[Goal]], tuple[Candidate, bool]]
"""Picks by goals; the flag says whether optimality is proven."""


def tabulate(
    spec: ServingSpec,
    *,
    memory: Sequence[int],
    workload: Workload,
    intact: Sequence[Replica],
    hit: Sequence[Replica] = (),
) -> tuple[Candidate, ...]:
    """Every configuration that fits `memory` (bytes of each GPU that stays), in a fixed order.

    `intact` replicas are disturbed by a change; the shapes of those that are `hit` count as running too.
    """
    shapes = {(replica.pipeline, replica.tensor) for replica in (*intact, *hit)}
    largest_first = sorted(memory, reverse=True)
    sizes = ShardSizes(spec.model, block_tokens=spec.limits.kv_block_tokens)
    rows: list[Candidate] = []
    for tensor in range(1, min(max_tensor_degree(spec.model), len(memory)) + 1):
        for pipeline in range(1, min(spec.model.num_layers, len(memory) // tensor) + 1):
            reshaped = bool(shapes) and (pipeline, tensor) not in shapes
            rows += _rows_of_shape(
                spec, sizes, largest_first, workload, intact, pipeline=pipeline, tensor=tensor, reshaped=reshaped
            )
    return tuple(rows)


def _rows_of_shape(
    spec: ServingSpec,
    sizes: ShardSizes,
    largest_first: Sequence[int],
    workload: Workload,
    intact: Sequence[Replica],
    *,
    pipeline: int,
    tensor: int,
    reshaped: bool,
) -> list[Candidate]:
    shards = replica_shards(spec.model, pipeline=pipeline, tensor=tensor)
    copies = weight_copies(spec.linear)
    weights = [copies * sizes.weights(shard) for shard in shards]
    block_bytes = [sizes.block(shard) for shard in shards]
    least = least_kv_blocks(spec.limits)
    needs = max(held + least * block for held, block in zip(weights, block_bytes, strict=True))
    reserve = spec.limits.migration_headroom_bytes
    roomy = needs + reserve
    running_gpus = sum(len(replica.gpus) for replica in intact)
    same_shape = [replica for replica in intact if (replica.pipeline, replica.tensor) == (pipeline, tensor)]
    rows = []
    for data in range(1, len(largest_first) // len(shards) + 1):
        budget = largest_first[data * len(shards) - 1]
        if needs > budget:
            break
        keeps_headroom = roomy <= budget
        blocks = min(
            max(0, budget - held - (reserve if keeps_headroom else 0)) // block
            for held, block in zip(weights, block_bytes, strict=True)
        )
        blocks = max(least, min(blocks, most_kv_blocks(spec.limits)))
        kept_gpus = min(data, len(same_shape)) * len(shards)
        degrees = Degrees(data, pipeline, tensor, running_bound(spec.limits, blocks))
        rows.append(
            _row(
                spec,
                degrees,
                workload,
                batch=_sustained(spec, degrees, blocks, workload),
                disturbed=running_gpus - kept_gpus,
                reshaped=reshaped,
                headroom=keeps_headroom,
            )
        )
    return rows


def _sustained(spec: ServingSpec, degrees: Degrees, kv_blocks: int, workload: Workload) -> int:
    """How many average sequences the KV pool really holds at once."""
    tokens = workload.prompt_tokens + workload.output_tokens
    return max(1, min(degrees.max_running, kv_blocks * spec.limits.kv_block_tokens // max(1, tokens)))


def _row(
    spec: ServingSpec,
    degrees: Degrees,
    workload: Workload,
    *,
    batch: int,
    disturbed: int,
    reshaped: bool,
    headroom: bool,
) -> Candidate:
    sustained = Degrees(degrees.data, degrees.pipeline, degrees.tensor, batch)
    latency = request_ms(spec, sustained, workload)
    return Candidate(
        data=degrees.data,
        pipeline=degrees.pipeline,
        tensor=degrees.tensor,
        max_running=degrees.max_running,
        gpus=degrees.gpus,
        unserved=int(latency is None),
        latency_us=UNSERVED_US if latency is None else round(latency * 1000),
        throughput_urps=round(throughput_rps(spec, sustained, workload) * 1e6),
        disturbed=disturbed,
        reshaped=int(reshaped),
        headroom=int(headroom),
    )


def pinned(spec: ServingSpec, rows: Sequence[Candidate]) -> tuple[tuple[Candidate, ...], str]:
    """The rows that keep the pinned degrees: all of them, else P and M with fewer replicas, else any."""
    limits = spec.limits
    if limits.data is None and limits.pipeline is None and limits.tensor is None:
        return tuple(rows), "none"

    def keeps(value: int, pin: int | None) -> bool:
        return pin is None or value == pin

    shaped = [r for r in rows if keeps(r.pipeline, limits.pipeline) and keeps(r.tensor, limits.tensor)]
    if exact := tuple(r for r in shaped if keeps(r.data, limits.data)):
        return exact, "kept"
    if fewer := tuple(r for r in shaped if limits.data is None or r.data < limits.data):
        return fewer, "data_relaxed"
    return tuple(rows), "relaxed"


def goals_for(rows: Sequence[Candidate], *, load_known: bool) -> tuple[Goal, ...]:
    """The order of wishes. Under an unknown load throughput comes first, else latency of those that serve it."""
    first: tuple[Goal, ...]
    if load_known and any(not row.unserved for row in rows):
        first = (Goal("unserved"), Goal("latency_us", tolerance_permille=TOLERANCE_PERMILLE))
    else:
        first = (Goal("throughput_urps", maximise=True, tolerance_permille=TOLERANCE_PERMILLE),)
    return (
        *first,
        Goal("disturbed"),
        Goal("throughput_urps", maximise=True),
        Goal("gpus"),
        Goal("latency_us"),
        Goal("tensor"),
        Goal("pipeline"),
        Goal("data"),
    )


def kept_shape(rows: Sequence[Candidate], *, load_known: bool) -> tuple[Candidate, ...]:
    """The rows that keep the running (P, M) where that is worth it, else all of them."""
    kept = tuple(row for row in rows if not row.reshaped)
    if not kept or len(kept) == len(rows):
        return tuple(rows)
    if not load_known:
        return kept
    if any(not row.unserved for row in rows):
        best = min(row.latency_us for row in rows)
        worth = min(row.latency_us for row in kept) * 1000 <= best * RESHAPE_GAIN_PERMILLE
    else:
        fastest = max(row.throughput_urps for row in rows)
        worth = max(row.throughput_urps for row in kept) * RESHAPE_GAIN_PERMILLE >= fastest * 1000
    return kept if worth else tuple(rows)


def several_replicas(rows: Sequence[Candidate], *, load_known: bool) -> tuple[Candidate, ...]:
    """The rows of at least two replicas where they serve the load, else all of them.

    With a second replica the loss of one instance stops only the streams of one, and these have where to go at once:
    their KV moves into a pool that is there already. A single larger replica always stops whole.
    """
    several = tuple(row for row in rows if row.data > 1)
    if not several:
        return tuple(rows)
    needed = load_known and any(not row.unserved for row in rows)
    return tuple(rows) if needed and all(row.unserved for row in several) else several


def choose_by_enumeration(rows: Sequence[Candidate], goals: Sequence[Goal]) -> tuple[Candidate, bool]:
    """The choice by filtering the table goal after goal."""
    left = list(rows)
    for goal in goals:
        values = [getattr(row, goal.column) for row in left]
        bound = _bound(max(values) if goal.maximise else min(values), goal)
        left = [
            row
            for row in left
            if (
                getattr(row, goal.column) * 1000 >= bound
                if goal.maximise
                else getattr(row, goal.column) * 1000 <= bound
            )
        ]
    return left[0], True


def _bound(best: int, goal: Goal) -> int:
    """The worst value (x 1000) that still counts as good."""
    return best * (1000 - goal.tolerance_permille if goal.maximise else 1000 + goal.tolerance_permille)


def choose_by_cpsat(rows: Sequence[Candidate], goals: Sequence[Goal]) -> tuple[Candidate, bool]:
    """The choice by CP-SAT: one variable per judged column, tied by the table, solved goal after goal."""
    columns = sorted({goal.column for goal in goals})
    model = cp_model.CpModel()
    index = model.new_int_var(0, len(rows) - 1, "index")
    variables = {
        column: model.new_int_var_from_domain(
            cp_model.Domain.from_values([getattr(row, column) for row in rows]), column
        )
        for column in columns
    }
    model.add_allowed_assignments(
        [index, *variables.values()],
        [[number, *(getattr(row, column) for column in columns)] for number, row in enumerate(rows)],
    )
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = MAX_DETERMINISTIC_TIME
    chosen, proven = rows[0], True
    for goal in goals:
        variable = variables[goal.column]
        if goal.maximise:
            model.maximize(variable)
        else:
            model.minimize(variable)
        status = solver.solve(model)
        assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), f"table model answered {solver.status_name(status)}"
        proven = proven and status == cp_model.OPTIMAL
        chosen = rows[solver.value(index)]
        bound = _bound(solver.value(variable), goal)
        if goal.maximise:
            model.add(variable >= -(-bound // 1000))
        else:
            model.add(variable <= bound // 1000)
    return chosen, proven


CHOOSERS: dict[str, Chooser] = {"cpsat": choose_by_cpsat, "enumerate": choose_by_enumeration}


def configure(spec: ServingSpec, rows: Sequence[Candidate], *, load_rps: float, solver: str) -> Choice:
    """Choose among tabulated candidates: pins come first, then the running shape, then migration headroom."""
    if not rows:
        certificate: dict[str, str | int | float] = {"kind": "no_candidate"}
        return Choice(None, SolverReport(name=solver, status="infeasible", certificate=certificate))
    allowed, pins = pinned(spec, rows)
    near = kept_shape(allowed, load_known=load_rps > 0)
    roomy = tuple(row for row in near if row.headroom) or near
    redundant = several_replicas(roomy, load_known=load_rps > 0) if spec.policy == "live" else roomy
    goals = goals_for(redundant, load_known=load_rps > 0)
    candidate, proven = CHOOSERS[solver](redundant, goals)
    first = next(goal for goal in goals if goal.column in ("latency_us", "throughput_urps"))
    peers = [row for row in redundant if row.unserved == candidate.unserved]
    values = [getattr(row, first.column) for row in peers]
    best = max(values) if first.maximise else min(values)
    objective = getattr(candidate, first.column)
    return Choice(
        candidate,
        SolverReport(
            name=solver,
            status="optimal" if proven else "feasible",
            objective=objective,
            bound=best,
            gap=round(abs(objective - best) / max(1, abs(objective)), 6),
            certificate={
                "kind": "epsilon_lexicographic",
                "measure": first.column,
                "candidates": len(redundant),
                "data": candidate.data,
                "pipeline": candidate.pipeline,
                "tensor": candidate.tensor,
                "max_running": candidate.max_running,
                "serves_load": int(not candidate.unserved),
                "pins": pins,
                "headroom": "kept" if candidate.headroom else "given_up",
            },
        ),
    )
