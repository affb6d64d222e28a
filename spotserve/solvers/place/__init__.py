"""Place: which GPU takes which position of the new replicas. The solvers by name, and the problem they share."""

from __future__ import annotations

from collections.abc import Callable

from spotserve.solvers.place.fixed import place_as_published, place_as_the_artifact, place_in_rank_order
from spotserve.solvers.place.makespan import DEFAULT_BUDGET, place_for_makespan
from spotserve.solvers.place.problem import Contents, Placement, PlacementProblem
from spotserve.solvers.place.reuse import place_for_reuse
from spotserve.solvers.result import Result

__all__ = ["DEFAULT_BUDGET", "PLACERS", "Contents", "Placement", "PlacementProblem", "place"]

PLACERS: dict[str, Callable[[PlacementProblem], Result[Placement]]] = {
    "makespan": place_for_makespan,
    "reuse": place_for_reuse,
    "paper": place_as_published,
    "paper-artifact": place_as_the_artifact,
    "rank-order": place_in_rank_order,
}


def place(problem: PlacementProblem, solver: str, *, budget: float = DEFAULT_BUDGET) -> Result[Placement]:
    """A GPU for each position, by the solver of that name. There must be at least as many GPUs as positions.

    `budget` is the deterministic time that `makespan` may take beyond its polynomial path.
    """
    assert len(problem.gpus) >= problem.num_positions, "more positions than GPUs"
    if problem.num_positions == 0:
        return Result(Placement(()), "optimal", certificate={"kind": "nothing_to_copy", "bytes": 0})
    if solver == "makespan":
        return place_for_makespan(problem, budget=budget)
    return PLACERS[solver](problem)
