"""What every solver answers: the answer, how good it is, and what proves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from spotserve.core.plan import SolverReport

Answer = TypeVar("Answer")
Status = Literal["optimal", "feasible", "infeasible", "unknown"]
Certificate = Mapping[str, str | int | float]
Statistics = Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Result(Generic[Answer]):
    """An answer (None: there is none), its objective and the bound that no answer passes.

    `certificate` says in plain values why the bound holds; `statistics` what the search took, in units that are the
    same on every machine (branches, deterministic time, rounds), never in seconds.
    """

    answer: Answer | None
    status: Status
    objective: float = 0
    bound: float = 0
    certificate: Certificate = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """|objective - bound| as a share of the objective; 0 when both are 0."""
        return round(abs(self.objective - self.bound) / max(1e-9, abs(self.objective)), 6) if self.objective else 0.0

    def report(self, name: str) -> SolverReport:
        """The plan file's entry of the solver called `name`."""
        return SolverReport(
            name=name,
            status=self.status,
            objective=self.objective,
            bound=self.bound,
            gap=self.gap,
            certificate=dict(self.certificate) or None,
            statistics=dict(self.statistics) or None,
        )
