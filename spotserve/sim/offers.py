"""What a trace offers: machines that come and go, and which instance of the controller has which of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from spotserve.core.ids import InstanceId
from spotserve.core.snapshot import Market


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of a trace."""

    name: InstanceId
    market: Market = "spot"
    gpu_type: str = ""
    ready_at_s: float | None = None
    """When it is up if it is taken as soon as it is offered; None: it is started when it is taken."""


class Offers:
    """Machines are offered, taken, given back and, until the cloud takes them, offered again."""

    def __init__(self) -> None:
        self._held: dict[InstanceId, Machine] = {}
        self._free: list[Machine] = []
        self._offered: deque[Machine] = deque()
        self._unmet: deque[InstanceId] = deque()
        self._leaving: set[InstanceId] = set()

    def has(self, machine: Machine, instance: InstanceId) -> None:
        """An instance has its machine from the beginning."""
        self._held[instance] = machine

    def offer(self, machine: Machine) -> InstanceId | None:
        """A machine is there to be had: for the instance that has waited longest for one, else whoever takes it."""
        if not self._unmet:
            self._offered.append(machine)
            return None
        instance = self._unmet.popleft()
        self._held[instance] = machine
        return instance

    def take(self, instance: InstanceId) -> Machine | None:
        """The machine of an instance that is launched; None if it has to wait for one."""
        if instance in self._held:
            return self._held[instance]
        if self._offered:
            machine = self._offered.popleft()
        elif self._free:
            machine = self._free.pop(0)
        else:
            self._unmet.append(instance)
            return None
        self._held[instance] = machine
        return machine

    def decline(self, instance: InstanceId) -> None:
        """An instance that has no machine is not wanted any more; what was offered for it stays on offer."""
        if instance in self._unmet:
            self._unmet.remove(instance)
        elif self._offered:
            self._free.append(replace(self._offered.popleft(), ready_at_s=None))

    def give_back(self, instance: InstanceId) -> None:
        """Its machine is on offer again, unless the cloud is about to take it."""
        machine = self._held.pop(instance)
        if machine.name not in self._leaving:
            self._free.append(replace(machine, ready_at_s=None))

    def leave(self, name: InstanceId) -> InstanceId | None:
        """The cloud takes a machine: nobody gets it any more; the instance that has it, if any."""
        self._leaving.add(name)
        self._free = [machine for machine in self._free if machine.name != name]
        return next((instance for instance, machine in self._held.items() if machine.name == name), None)
