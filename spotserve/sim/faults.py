"""Where a fault can be put into a virtual cluster; by itself nothing goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import InstanceId
from spotserve.core.plan import Plan, PlanningProblem, Step


@dataclass(frozen=True, slots=True)
class Solving:
    """How the planner fares with one problem."""

    delay_s: float = 0.0
    """Beyond what it takes anyway."""
    error: str | None = None
    """It answers with this and no plan."""


class Faults:
    """The points at which a virtual world asks what goes wrong. This one says: nothing."""

    def given(self, command: cmd.Command) -> None:
        """A command is about to be carried out."""

    def lateness_s(self, event: ev.Event) -> float:
        """How much later than it should the controller hears of an event."""
        return 0.0

    def is_doubled(self, event: ev.Event) -> bool:
        """Whether the controller hears of an event a second time."""
        return False

    def step_error(self, step: Step) -> str | None:
        """Why a worker refuses or gives up a step."""
        return None

    def step_slowness(self, step: Step) -> float:
        """How many times longer than it should a step takes."""
        return 1.0

    def iteration_slowness(self, instance: InstanceId) -> float:
        """How many times longer than it should an iteration of a leader takes."""
        return 1.0

    def drops_kv(self) -> bool:
        """Whether a rank loses the KV of a choice that has just got a token."""
        return False

    def evicted(self) -> None:
        """A leader gave KV blocks of one choice to another, or lost them."""

    def taken_bytes(self, step: Step, free_bytes: int) -> int:
        """Memory that somebody else has on the GPU of a reserve, on which `free_bytes` are free."""
        return 0

    def solving(self, problem: PlanningProblem) -> Solving:
        """How the planner fares."""
        return Solving()

    def damaged(self, plan: Plan) -> Plan:
        """The plan as it comes back from the planner process."""
        return plan
