"""The controller in the virtual world: every fault case, cheap, with the real planner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from spotserve.core import events as ev
from spotserve.core.controller import Controller, Entry
from spotserve.core.ids import InstanceId
from spotserve.core.loop import run
from spotserve.core.service import service_state
from spotserve.sim.world import VirtualWorld, check_streams
from spotserve.solvers.planner import make_plan
from tests.specs import small_spec

GPU_MEMORY_BYTES = 6 * 1024 * 1024


class MemoryJournal:
    """Keeps entries in memory."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    async def append(self, entries: Sequence[Entry]) -> None:
        """Remember them."""
        self.entries.extend(entries)


class Stage:
    """A virtual world with its controller, ready to play a scenario."""

    def __init__(
        self,
        *,
        seed: int = 1,
        num_instances: int = 4,
        policy: str = "live",
        shares: tuple[float, float] = (0.0, 0.0),
        gpu_memory_bytes: int = GPU_MEMORY_BYTES,
        limits: dict[str, int] | None = None,
    ) -> None:
        self.spec = small_spec(**(limits or {})).model_copy(update={"policy": policy})
        duplicate_share, failure_share = shares
        self.world = VirtualWorld(
            self.spec,
            make_plan,
            seed=seed,
            gpu_memory_bytes=gpu_memory_bytes,
            duplicate_share=duplicate_share,
            failure_share=failure_share,
        )
        self.controller = Controller()
        self.journal = MemoryJournal()
        self.world.at(0.0, lambda at_s: ev.JournalBegun(at_s=at_s, spec=self.spec, num_instances=num_instances))

    def play(self, until_s: float) -> None:
        """Run the loop to `until_s` of virtual time."""
        self.world.until_s = until_s
        asyncio.run(run(self.world, self.controller, self.journal))

    @property
    def service(self) -> str:
        """The headline state now."""
        return service_state(self.controller.state)

    def notice(self, at_s: float, name: str, grace_s: float = 30.0) -> None:
        """Schedule a preemption notice."""
        self.world.at(at_s, lambda now_s: ev.NoticeReceived(at_s=now_s, instance=InstanceId(name), grace_s=grace_s))

    def kill(self, at_s: float, name: str) -> None:
        """Schedule a kill without notice."""
        self.world.at(at_s, lambda now_s: ev.KillRequested(at_s=now_s, instance=InstanceId(name)))

    def add(self, at_s: float) -> None:
        """Schedule one more instance."""
        self.world.at(at_s, lambda now_s: ev.InstanceWanted(at_s=now_s))

    def requests(self, count: int, *, from_s: float = 3.0, every_s: float = 0.05, max_tokens: int = 60) -> None:
        """Schedule a run of requests."""
        for index in range(count):
            self.world.request(from_s + index * every_s, name=f"q{index}", max_tokens=max_tokens)


def test_first_placement_serves() -> None:
    """Tests that four instances join, a plan places replicas, and requests run to their end."""
    stage = Stage()
    stage.requests(5)
    stage.play(20.0)
    assert stage.service == "serving"
    check_streams(stage.world)
    assert stage.controller.state.counters.finished == 5
    assert stage.controller.state.migrations == ()


def test_notice_moves_without_recompute() -> None:
    """Tests that a sufficient notice costs no recomputed token and every stream is whole."""
    stage = Stage()
    stage.requests(8, max_tokens=200)
    stage.notice(4.0, "i0")
    stage.play(60.0)
    check_streams(stage.world)
    (line,) = stage.controller.state.migrations
    assert (line.trigger, line.outcome, line.recomputed_tokens) == ("notice", "completed", 0)
    assert line.kv_bytes > 0
    assert stage.service == "serving"


def test_kill_without_notice_recomputes() -> None:
    """Tests that a kill without notice loses nothing: what was lost is recomputed."""
    stage = Stage()
    stage.requests(8, max_tokens=200)
    stage.kill(4.0, "i1")
    stage.play(60.0)
    check_streams(stage.world)
    assert stage.service == "serving"
    assert stage.controller.state.migrations[-1].trigger == "lost"
    assert sum(line.recomputed_tokens for line in stage.controller.state.migrations) > 0


def test_all_gone_then_capacity_back() -> None:
    """Tests that with nothing left the service is degraded, keeps every request, and finishes them later."""
    stage = Stage()
    stage.requests(8, max_tokens=200)
    for name in ("i0", "i1", "i2", "i3"):
        stage.kill(4.0, name)
    stage.play(10.0)
    assert stage.service == "degraded"
    for at_s in (11.0, 11.1, 11.2):
        stage.add(at_s)
    stage.play(60.0)
    check_streams(stage.world)
    assert stage.service == "serving"


def test_two_notices_at_once_make_one_plan() -> None:
    """Tests that two notices in the same tick end in one completed migration that leaves both instances."""
    stage = Stage()
    stage.requests(8, max_tokens=300)
    stage.notice(4.0, "i0")
    stage.notice(4.0, "i1")
    stage.play(30.0)
    completed = [line for line in stage.controller.state.migrations if line.outcome == "completed"]
    assert len(completed) == 1
    used = {gpu for replica in stage.controller.state.serving() for gpu in replica.gpus}
    assert not {"i0/0", "i1/0"} & used


def test_notice_during_a_run_aborts_and_plans_again() -> None:
    """Tests that a second notice before the commit aborts the run; the next one leaves both instances."""
    stage = Stage()
    stage.requests(8, max_tokens=300)
    stage.notice(4.0, "i0")
    stage.notice(4.12, "i1")
    stage.play(30.0)
    check_streams(stage.world)
    assert stage.controller.state.migrations[-1].outcome == "completed"


def test_short_notice_steps_down_the_ladder() -> None:
    """Tests that a notice too short to move anything still loses nothing."""
    stage = Stage()
    stage.requests(8, max_tokens=200)
    stage.notice(4.0, "i0", grace_s=0.02)
    stage.play(60.0)
    check_streams(stage.world)
    assert stage.service == "serving"


def test_degraded_during_the_notice_drains() -> None:
    """Tests that a notice that leaves too little drains until the deadline and is degraded after it."""
    stage = Stage(num_instances=2)
    stage.requests(4, max_tokens=4000)
    stage.notice(5.0, "i0", grace_s=5.0)
    stage.play(9.5)
    assert stage.service == "draining"
    stage.play(12.0)
    assert stage.service == "degraded"


def test_deadline_kills_the_instance_and_a_second_notice_only_shortens() -> None:
    """Tests that the instance is gone at the earliest of its deadlines."""
    stage = Stage()
    stage.notice(4.0, "i3", grace_s=10.0)
    stage.notice(5.0, "i3", grace_s=2.0)
    stage.notice(5.5, "i3", grace_s=30.0)
    stage.play(6.9)
    assert stage.controller.state.instances[InstanceId("i3")].state == "doomed"
    stage.play(7.2)
    assert stage.controller.state.instances[InstanceId("i3")].state == "gone"


def test_stop_finishes_what_is_running() -> None:
    """Tests that a stop drains: accepted requests end, then the service stops."""
    stage = Stage()
    stage.requests(4, max_tokens=50)
    stage.world.at(3.5, lambda at_s: ev.StopRequested(at_s=at_s, drain_s=30.0))
    stage.play(60.0)
    check_streams(stage.world)
    assert stage.service == "stopped"


def test_stop_with_nothing_running_stops_at_once() -> None:
    """Tests that a stop of an idle service takes one step from serving to stopped."""
    stage = Stage()
    stage.world.at(3.5, lambda at_s: ev.StopRequested(at_s=at_s, drain_s=30.0))
    stage.play(4.0)
    assert stage.service == "stopped"


def test_notice_while_the_first_placement_ends() -> None:
    """Tests that a notice at any moment of the start-up leads to a state of the table and is answered."""
    for tick in range(40):
        stage = Stage()
        stage.requests(2, from_s=4.0, max_tokens=40)
        stage.notice(1.4 + 0.02 * tick, "i0", grace_s=20.0)
        stage.play(60.0)
        check_streams(stage.world)
        assert stage.service == "serving", tick


def test_notice_before_the_instance_has_joined() -> None:
    """Tests that an instance noticed before it dialled in is doomed when it does, and nothing is placed on it."""
    stage = Stage()
    stage.add(3.0)
    stage.notice(3.001, "i4", grace_s=20.0)
    stage.play(10.0)
    assert stage.controller.state.instances[InstanceId("i4")].state == "doomed"
    assert "i4/0" not in {gpu for replica in stage.controller.state.serving() for gpu in replica.gpus}
