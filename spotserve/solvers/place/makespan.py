"""Makespan: place so that the busiest port is done soonest, not so that most bytes are reused.

Most reused bytes is not the shortest migration: downtime is a maximum over ports, reuse a sum over GPUs, and what a
sibling GPU holds is one copy inside the instance away. Anytime: min-cost flow on the bytes each instance fetches and
bottleneck repair answer at once, the certificate-guided search improves that, and up to `MAX_JOINT_GPUS` the joint
model over mapping and sources takes what is left of the budget.
"""

from __future__ import annotations

import numpy as np

from spotserve.solvers.place.assignment import by_scipy
from spotserve.solvers.place.groups import Parts, fetched_alone, kinds_of
from spotserve.solvers.place.inner import local_weights, seat_gpus
from spotserve.solvers.place.joint import Joint, solve_jointly
from spotserve.solvers.place.judged import Judged, judge
from spotserve.solvers.place.ports import Load, Ports, look_at_ports
from spotserve.solvers.place.problem import Overlaps, Placement, PlacementProblem, overlaps
from spotserve.solvers.place.search import repair, search, weigh
from spotserve.solvers.place.seating import Seating, seat_for_bottleneck, seat_groups
from spotserve.solvers.result import Result

MAX_JOINT_GPUS = 256
MAX_JOINT_PAIRS = 8192
"""GPUs, and instances x parts, up to which the joint model is built."""

DEFAULT_BUDGET = 0.5
"""Deterministic time (about seconds) of the joint model; 0 leaves the polynomial path."""

SEARCHED_BYTES = 2**21
"""Seatings that the search weighs, times what weighing one looks at: it stays some tens of milliseconds at any size."""


def place_for_makespan(problem: PlacementProblem, *, budget: float = DEFAULT_BUDGET) -> Result[Placement]:
    """The placement whose busiest port is done soonest; pairs without room and split groups are avoided before that.

    The bound holds for all placements of the same parts of tensor groups; the gap is to the proven bound.
    """
    ports, shared = look_at_ports(problem), overlaps(problem)
    seating = seat_groups(problem, ports, shared)
    bound = least_bytes(ports, seating)
    starts = [seating.where]
    if (dearest := seat_for_bottleneck(ports, seating)) is not None:
        starts.append(dearest[0])
        bound = max(bound, dearest[1])
    starts += [repair(seating, where, ports.num_gpus) for where in starts]
    start = min((weigh(ports, seating.parts, where) for where in starts), key=lambda one: one.rank)
    found = search(ports, seating, start, bound=bound, evaluations=_evaluations(problem))
    joint: Joint | None = None
    seats, reached = [found.best.where], found.best.bottleneck.num_bytes
    if reached > bound and budget > 0 and _is_small(problem, seating):
        joint = solve_jointly(ports, seating, seats[0], most=reached, budget=budget)
        bound = max(bound, joint.bound)
        seats.append(joint.where)
    judged = [judge(problem, ports, shared, seat_gpus(ports, shared, seating, where)) for where in seats]
    best = min(judged, key=lambda one: one.rank)
    proven = joint is not None and joint.is_proven and best.bottleneck.num_bytes <= judged[-1].bottleneck.num_bytes
    if best.squeezed and (loose := _ignoring_groups(problem, ports, shared)).rank < best.rank:
        best, bound, proven = loose, _least_of_positions(ports, seating), False
    # A bound in coarse units may be a hair above the placement that it bounds.
    bound = min(bound, best.bottleneck.num_bytes)
    statistics = {**best.statistics(), "parts": len(seating.parts.first), "evaluations": found.evaluations}
    if joint is not None:
        statistics["joint_deterministic_time"] = round(joint.deterministic_time, 6)
        statistics["joint_branches"] = joint.branches
    return Result(
        best.placement(problem),
        "optimal" if proven or bound == best.bottleneck.num_bytes else "feasible",
        objective=best.bottleneck.num_bytes,
        bound=bound,
        certificate=best.certificate(ports),
        statistics=statistics,
    )


def least_bytes(ports: Ports, seating: Seating) -> int:
    """No placement of these parts is faster, by three arguments that need no search.

    The dearest part is somewhere; what no instance can avoid to fetch has to pass the ports of those that hold it; and
    where no two parts can share a piece, the whole volume passes as many in-ports as there are.
    """
    if not seating.parts.is_uniform:
        return _least_of_positions(ports, seating)
    fetched = seating.prices.fetched
    bounds = [int(fetched.min(axis=0).max(initial=0)), _least_sent(ports, int(seating.parts.size[0]))]
    if (ports.num_gpus < 2 * seating.parts.size[0]).all():
        bounds.append(-(-int(fetched.min(axis=0).sum()) // len(ports.num_gpus)))
    return max(bounds)


def _least_sent(ports: Ports, size: int) -> int:
    """The busiest out-port if only what has to be sent in any case is.

    All replicas need a piece of weights, on at least so many instances, of which only the holders have it; a piece of
    KV is sent once unless a holder may take part.
    """
    slots, replicas = np.sort(ports.num_gpus // size)[::-1], len(ports.kv_tokens)
    instances = int(np.searchsorted(np.cumsum(slots), replicas)) + 1
    staying = ports.holders[:, : len(ports.num_gpus)].sum(axis=1)
    sent = np.zeros(len(ports.holders), np.int64)
    needed = np.flatnonzero(ports.weight_needed.any(axis=0) & (ports.weight_class >= 0))
    classes = ports.weight_class[needed]
    np.add.at(sent, classes, ports.weight_bytes[needed] * np.maximum(0, instances - staying[classes]))
    replica, piece = np.nonzero((ports.kv_class >= 0) & ports.kv_needed.any(axis=0))
    classes = ports.kv_class[replica, piece]
    np.add.at(sent, classes, ports.kv_token_bytes[piece] * ports.kv_tokens[replica] * (staying[classes] == 0))
    return ports.bottleneck(Load(np.zeros(len(ports.num_gpus), np.int64), sent)).num_bytes


def _least_of_positions(ports: Ports, seating: Seating) -> int:
    """The same for single positions, whatever way groups are cut."""
    positions = np.sort(seating.parts.positions())
    single = Parts(positions, np.ones_like(positions), is_uniform=True)
    weights, kv = fetched_alone(ports, single)
    alone = weights[:, kinds_of(single, ports.seats).kind] + kv
    return int(alone.min(axis=0).max(initial=0))


def _is_small(problem: PlacementProblem, seating: Seating) -> bool:
    pairs = seating.prices.stayed.size
    return len(problem.gpus) <= MAX_JOINT_GPUS and pairs <= MAX_JOINT_PAIRS and seating.parts.is_uniform


def _evaluations(problem: PlacementProblem) -> int:
    """How many seatings the search may weigh: the fewer, the larger the problem."""
    contents = problem.contents
    looked_at = len(contents.weight_bytes) * len(problem.gpus) + len(contents.kv_token_bytes) * problem.num_positions
    return max(8, min(512, SEARCHED_BYTES // max(1, looked_at)))


def _ignoring_groups(problem: PlacementProblem, ports: Ports, shared: Overlaps) -> Judged:
    """The placement with fewest pairs without room, wherever groups end up: room comes before whole groups."""
    everyone, everything = np.arange(len(problem.gpus)), np.arange(problem.num_positions)
    rows = by_scipy(local_weights(shared, everyone, everything))
    return judge(problem, ports, shared, rows)
