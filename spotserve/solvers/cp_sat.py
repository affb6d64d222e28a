"""CP-SAT as every model here uses it: the same answer on every run, and no sum that it cannot hold."""

from __future__ import annotations

from ortools.sat.python import cp_model

MAX_SUM = 2**52
"""CP-SAT keeps objectives in doubles: larger integers come back changed, with status OPTIMAL."""


def new_solver(deterministic_time: float) -> cp_model.CpSolver:
    """A solver with one worker, a seed, and a limit that is no time of a clock.

    Level 2 of linearization: the models are sums of 0/1 variables, whose LP proves most of them at once.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = deterministic_time
    # It would leave SIGINT to the system behind a solve: Ctrl-C then kills where Python should clean up.
    solver.parameters.catch_sigint_signal = False
    return solver


def require_exact(largest_sum: int) -> None:
    """Refuse a linear sum that doubles cannot hold exactly. Raises ValueError."""
    if largest_sum >= MAX_SUM:
        raise ValueError(f"a sum of {largest_sum} is not below {MAX_SUM}: choose a coarser unit")
