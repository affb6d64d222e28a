"""What a scenario does to a virtual world while it runs, and how often each class of faults really happened."""

from __future__ import annotations

import random
from collections import Counter

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import InstanceId, RequestId, instance_of
from spotserve.core.plan import Plan, PlanningProblem, Step
from spotserve.core.state import step_gpus
from spotserve.sim.faults import Faults, Solving
from spotserve.sim.swarm.drawing import STEP_KINDS, Disturbance, StepCrash, SwarmScenario
from spotserve.sim.world import RECONNECT_S, VirtualWorld

SOLVE_TIMEOUT_S = 30.0
TRANSFERS = frozenset({"copy_weights", "load_weights", "copy_kv", "copy_kv_delta"})

FAULT_CLASSES = (
    *("notice_missing", "notice_short", "notice_long", "notice_late", "notice_doubled", "notice_withdrawn"),
    "notice_for_target",
    *(f"crash_at_{kind}" for kind in STEP_KINDS),
    *("link_slow", "link_cut", "link_parted", "mesh_cut", "transfer_slow", "transfer_cut", "straggler"),
    *("message_duplicate", "message_late", "message_reordered", "message_foreign"),
    *("solver_slow", "solver_failing", "solver_absent", "solver_wrong"),
    *("coordinator_crash_before_write", "coordinator_crash_after_write", "coordinator_crash_midway"),
    *("out_of_memory_on_reserve", "step_failure", "release_failure", "kv_evicted", "kv_dropped"),
    *("capacity_flapping", "capacity_given_back", "load_change", "stop_drained", "stop_with_open_requests"),
    *("client_cancels", "client_reads_late", "request_timeout"),
)
"""What a swarm counts; a class that never happened was not tested."""


class SwarmFaults(Faults):
    """The faults of one scenario."""

    def __init__(self, scenario: SwarmScenario) -> None:
        self.scenario = scenario
        self.counts: Counter[str] = Counter()
        self.is_healed = False
        self._dice = random.Random(~scenario.seed)
        self._world: VirtualWorld | None = None
        self._seen_steps: Counter[str] = Counter()
        self._pending = list(scenario.step_crashes)
        self._slow: dict[InstanceId, float] = {}
        self._for_target: list[Disturbance] = []
        self._late: list[float] = []

    @property
    def world(self) -> VirtualWorld:
        """The world that they are put into."""
        assert self._world is not None
        return self._world

    def begin(self, world: VirtualWorld) -> None:
        """Schedule what happens at a time."""
        self._world = world
        for index, arrival in enumerate(self.scenario.arrivals):
            name = RequestId(f"q{index}")
            world.request(
                arrival.at_s,
                name=name,
                prompt_tokens=arrival.prompt_tokens,
                max_tokens=arrival.max_tokens,
                lengths=arrival.lengths,
                timeout_s=arrival.timeout_s,
                reads_late=arrival.reads_late,
            )
            self.counts["client_reads_late"] += arrival.reads_late
            if arrival.cancel_at_s is not None:
                world.after(arrival.cancel_at_s, lambda name=name: self._cancel(name))  # type: ignore[misc]
        if self.scenario.stop is not None:
            drain_s = self.scenario.stop.drain_s
            world.after(self.scenario.stop.at_s, lambda: world.stop(drain_s))
        for one in self.scenario.disturbances:
            world.after(one.at_s, lambda one=one: self._disturb(one))  # type: ignore[misc]

    def heal(self) -> None:
        """Nothing goes wrong any more: links are open, zombies die, and what was lost is replaced."""
        self.is_healed = True
        self._slow.clear()
        world = self.world
        for instance in sorted(world.alive & world.told_lost):
            world.crash(instance)
        for link in world.links.values():
            link.slowness = 1.0
            link.open_at_s = min(link.open_at_s, world.at_s)

    def _cancel(self, name: RequestId) -> ev.Event | None:
        request = self.world.requests.get(name)
        if request is None or request.ended is not None:
            return None
        self.counts["client_cancels"] += 1
        return ev.CancelRequested(at_s=self.world.at_s, request=name)

    # At a time

    def _disturb(self, one: Disturbance) -> ev.Event | None:
        if self.is_healed:
            return None
        act = getattr(self, f"_{one.kind}")
        event: ev.Event | None = act(one)
        return event

    def _victim(self, place: int) -> InstanceId | None:
        living = sorted(self.world.alive - self.world.told_lost)
        return living[place % len(living)] if living else None

    def _die(self, instance: InstanceId, told_s: float) -> None:
        """It dies now, and the failure detector tells later."""
        world = self.world
        if instance not in world.alive:
            return
        world.crash(instance)
        world.after(told_s, lambda: self._told(instance), survives=False)

    def _told(self, instance: InstanceId) -> ev.Event | None:
        return None if instance in self.world.told_lost else self.world.lose(instance, "silent")

    def _no_notice(self, one: Disturbance) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is not None:
            self.counts["notice_missing"] += 1
            self._die(victim, one.told_s)
        return None

    def _notice(self, victim: InstanceId, grace_s: float, *, dies_s: float | None) -> ev.Event:
        if dies_s is not None:
            self.world.after(dies_s, lambda: self._taken(victim))
        return ev.NoticeReceived(at_s=self.world.at_s, instance=victim, grace_s=grace_s)

    def _taken(self, victim: InstanceId) -> ev.Event | None:
        self._die(victim, 0.02)
        return None

    def _short_notice(self, one: Disturbance) -> ev.Event | None:
        return self._counted_notice(one, "notice_short", dies_s=one.seconds)

    def _long_notice(self, one: Disturbance) -> ev.Event | None:
        return self._counted_notice(one, "notice_long", dies_s=one.seconds)

    def _late_notice(self, one: Disturbance) -> ev.Event | None:
        """It was long under way: the instance dies before what the controller takes for its deadline."""
        return self._counted_notice(one, "notice_late", dies_s=one.seconds * 0.4)

    def _counted_notice(self, one: Disturbance, name: str, *, dies_s: float | None) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is None:
            return None
        self.counts[name] += 1
        return self._notice(victim, one.seconds, dies_s=dies_s)

    def _doubled_notice(self, one: Disturbance) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is None:
            return None
        self.counts["notice_doubled"] += 1
        grace_s = max(0.0, one.seconds + one.told_s - 0.5)
        self.world.after(0.05 + one.told_s, lambda: self._notice(victim, grace_s, dies_s=grace_s))
        return self._notice(victim, one.seconds, dies_s=None)

    def _withdrawn_notice(self, one: Disturbance) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is None:
            return None
        self.counts["notice_withdrawn"] += 1
        self.world.after(one.seconds * 0.5, lambda: ev.NoticeWithdrawn(at_s=self.world.at_s, instance=victim))
        return self._notice(victim, one.seconds, dies_s=None)

    def _notice_for_target(self, one: Disturbance) -> ev.Event | None:
        self._for_target.append(one)
        return None

    def _link_slow(self, one: Disturbance) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is not None:
            self.counts["link_slow"] += 1
            link = self.world.link(victim)
            link.slowness = 5.0 + 10 * one.told_s
            self.world.after(one.seconds, lambda: setattr(link, "slowness", 1.0))
        return None

    def _link_cut(self, one: Disturbance) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is not None:
            self.counts["link_cut"] += 1
            self.world.link(victim).open_at_s = self.world.at_s + min(one.seconds, RECONNECT_S - 0.1)
        return None

    def _link_parted(self, one: Disturbance) -> ev.Event | None:
        """Out of reach for so long that it counts as lost, while its process lives on: a zombie."""
        victim = self._victim(one.place)
        if victim is None:
            return None
        world = self.world
        self.counts["link_parted"] += 1
        world.link(victim).open_at_s = world.at_s + one.seconds
        world.after(RECONNECT_S, lambda: self._told(victim), survives=False)
        world.after(one.seconds + 3.0, lambda: self._taken(victim))
        return None

    def _mesh_cut(self, one: Disturbance) -> ev.Event | None:
        serving = [v for v in self.world.replicas.values() if v.state == "serving"]
        if serving and self.world.break_mesh(serving[one.place % len(serving)].owner):
            self.counts["mesh_cut"] += 1
        return None

    def _straggler(self, one: Disturbance) -> ev.Event | None:
        victim = self._victim(one.place)
        if victim is not None:
            self.counts["straggler"] += 1
            self._slow[victim] = 10.0
            self.world.after(one.seconds, lambda: self._catch_up(victim))
        return None

    def _catch_up(self, victim: InstanceId) -> None:
        self._slow.pop(victim, None)

    def _flapping(self, one: Disturbance) -> ev.Event | None:
        """Capacity that comes and goes: an instance more, and one less a little later, again and again."""
        world = self.world
        for number in range(3):
            world.after(number * one.seconds, lambda: self._come(one))
            world.after((number + 0.6) * one.seconds, lambda: self._go(one))
        return None

    def _capacity(self, one: Disturbance) -> ev.Event | None:
        """The cloud has one more."""
        return ev.InstanceWanted(at_s=self.world.at_s)

    def _come(self, one: Disturbance) -> ev.Event | None:
        if self.is_healed:
            return None
        self.counts["capacity_flapping"] += 1
        return ev.InstanceWanted(at_s=self.world.at_s, market="ondemand" if one.place % 4 == 0 else "spot")

    def _go(self, one: Disturbance) -> ev.Event | None:
        living = sorted(self.world.alive - self.world.told_lost)
        if self.is_healed or not living:
            return None
        return ev.KillRequested(at_s=self.world.at_s, instance=living[-1 - one.place % min(2, len(living))])

    def _load(self, one: Disturbance) -> ev.Event | None:
        self.counts["load_change"] += 1
        return ev.LoadSampled(at_s=self.world.at_s, load_rps=one.seconds)

    def _foreign_message(self, one: Disturbance) -> ev.Event | None:
        """Of an epoch, a replica, an instance or a request that there is not, or not any more."""
        self.counts["message_foreign"] += 1
        at_s, epoch = self.world.at_s, one.place % 4
        step = next((s.id for s in self.world.plans[epoch].steps), None) if epoch in self.world.plans else None
        old = sorted(self.world.replicas)[0] if self.world.replicas else None
        messages: list[ev.Event] = [
            ev.NoticeReceived(at_s=at_s, instance=InstanceId("i999"), grace_s=one.seconds),
            ev.InstanceLost(at_s=at_s, instance=InstanceId("i999"), reason="foreign"),
            ev.LedgerDurable(at_s=at_s, epoch=epoch),
            ev.CancelRequested(at_s=at_s, request=RequestId("nobody")),
        ]
        if step is not None and epoch in self.world.aborted:
            messages.append(ev.StepFailed(at_s=at_s, epoch=epoch, step=step, error="foreign"))
            messages.append(ev.StepDone(at_s=at_s, epoch=epoch, step=step))
        if old is not None:
            messages.append(ev.ReplicaBroke(at_s=at_s, replica=old[0], generation=old[1] + 999, detail="foreign"))
        return messages[one.place % len(messages)]

    # Where the world asks

    def given(self, command: cmd.Command) -> None:
        """Crashes at steps, and notices for those that a run moves to."""
        if self.is_healed:
            return
        if isinstance(command, cmd.BeginRun):
            self._strike_target(command.plan)
        elif isinstance(command, cmd.ExecuteStep):
            self._crash_at(command.step.kind, command.step)
        elif isinstance(command, cmd.CommitRun):
            plan = self.world.plans[command.epoch]
            for step in plan.steps:
                if step.kind in ("commit", "recompute"):
                    self._crash_at(step.kind, next((s for s in plan.steps if s.kind == "activate"), step))

    def _strike_target(self, plan: Plan) -> None:
        fresh = [replica for replica in plan.target.replicas if replica.generation == plan.epoch.to]
        if not fresh or not self._for_target:
            return
        one = self._for_target.pop()
        gpus = [gpu for replica in fresh for gpu in replica.gpus]
        victim = instance_of(gpus[one.place % len(gpus)])
        self.counts["notice_for_target"] += 1
        self.world.after(one.told_s * 0.2, lambda: self._notice(victim, one.seconds, dies_s=one.seconds))

    def _crash_at(self, kind: str, step: Step) -> None:
        self._seen_steps[kind] += 1
        gpus = step_gpus(step)
        for crash in [c for c in self._pending if c.kind == kind and c.number <= self._seen_steps[kind]]:
            if not gpus:
                continue
            self._pending.remove(crash)
            victim = instance_of(gpus[-1 if crash.last else 0])
            if victim in self.world.alive:
                self.counts[f"crash_at_{kind}"] += 1
                self.world.after(self._delay_s(crash, step), lambda c=crash, v=victim: self._crash(v, c))  # type: ignore[misc]

    def _delay_s(self, crash: StepCrash, step: Step) -> float:
        """Before it reaches the worker, while that is at it, or just after the answer."""
        rates = self.world.rates
        lasts_s = rates.step_s + getattr(step, "bytes", 0) / rates.link_bytes_per_s
        return {"before": 0.0, "during": 0.5 * lasts_s + 0.5 * rates.step_s, "after": 2 * lasts_s}[crash.when]

    def _crash(self, victim: InstanceId, crash: StepCrash) -> ev.Event | None:
        if not self.is_healed:
            self._die(victim, crash.told_s)
        return None

    def _strikes(self, name: str, share: float) -> bool:
        if self.is_healed or not share or self._dice.random() >= share:
            return False
        self.counts[name] += 1
        return True

    def lateness_s(self, event: ev.Event) -> float:
        """Late messages; one that another overtook is reordered."""
        now_s = self.world.at_s
        due = [at_s for at_s in self._late if at_s > now_s]
        self.counts["message_reordered"] += len(due)
        self._late.clear()
        if not self._strikes("message_late", self.scenario.shares.message_late):
            return 0.0
        late_s = self._dice.choice([0.05, 0.5, 3.0]) * self._dice.random()
        self._late.append(now_s + late_s)
        return late_s

    def is_doubled(self, event: ev.Event) -> bool:
        """Doubled messages."""
        return self._strikes("message_duplicate", self.scenario.shares.message_duplicate)

    def step_error(self, step: Step) -> str | None:
        """A transfer that breaks off, a worker that gives up or frees nothing."""
        shares = self.scenario.shares
        if step.kind in TRANSFERS and self._strikes("transfer_cut", shares.transfer_cut):
            return "transfer broke off"
        if step.kind == "release":
            return "cannot free it now" if self._strikes("release_failure", shares.release_failure) else None
        return "drawn by the seed" if self._strikes("step_failure", shares.step_failure) else None

    def step_slowness(self, step: Step) -> float:
        """Slow transfers between workers."""
        if step.kind in TRANSFERS and self._strikes("transfer_slow", self.scenario.shares.transfer_slow):
            return self._dice.choice([3.0, 20.0, 100.0])
        return 1.0

    def iteration_slowness(self, instance: InstanceId) -> float:
        """Stragglers."""
        return self._slow.get(instance, 1.0)

    def drops_kv(self) -> bool:
        """A rank without the KV that its leader counts on."""
        return self._strikes("kv_dropped", self.scenario.shares.kv_dropped)

    def evicted(self) -> None:
        """A leader that ran out of KV blocks, or whose rank lost some."""
        self.counts["kv_evicted"] += 1

    def taken_bytes(self, step: Step, free_bytes: int) -> int:
        """Another process on the GPU, which takes all that is free: what a reserve needs is not there."""
        share = self.scenario.shares.out_of_memory
        if free_bytes <= 0 or not getattr(step, "bytes", 0) or not self._strikes("out_of_memory_on_reserve", share):
            return 0
        return free_bytes

    def solving(self, problem: PlanningProblem) -> Solving:
        """A planner that is slow, fails, or does not answer at all."""
        shares = self.scenario.shares
        if self._strikes("solver_absent", shares.solver_absent):
            return Solving(SOLVE_TIMEOUT_S, f"planner did not answer within {SOLVE_TIMEOUT_S:g} s")
        if self._strikes("solver_failing", shares.solver_failing):
            return Solving(0.0, "planner process ended without an answer")
        if self._strikes("solver_slow", shares.solver_slow):
            return Solving(self._dice.choice([0.5, 2.0, 8.0]) * self._dice.random())
        return Solving()

    def damaged(self, plan: Plan) -> Plan:
        """A planner whose answer is wrong: a step is missing."""
        if len(plan.steps) < 2 or not self._strikes("solver_wrong", self.scenario.shares.solver_wrong):
            return plan
        gone = next(index for index, step in enumerate(plan.steps) if step.kind in ("reserve", "activate", "commit"))
        return plan.model_copy(update={"steps": plan.steps[:gone] + plan.steps[gone + 1 :]})
