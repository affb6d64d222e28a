"""Transfers in virtual time: every port carries one at a time, the first that finds both its ends free goes next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spotserve.core.ids import GpuId, InstanceId, instance_of
from spotserve.sim.agenda import Agenda


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes per second of an instance's network port each way, between GPUs of an instance, and from storage."""

    network_bytes_per_s: float
    local_bytes_per_s: float
    storage_bytes_per_s: float
    round_trip_s: float


@dataclass(slots=True)
class Transfer:
    """One transfer: the ports it occupies from its start to its end."""

    ports: tuple[str, ...]
    duration_s: float
    done: Callable[[], None]
    epoch: int
    running: bool = False
    dropped: bool = False


class Links:
    """Full-duplex network ports of instances, links between the GPUs of one, and its way to storage."""

    def __init__(self, agenda: Agenda, rates: LinkRates) -> None:
        self._agenda = agenda
        self._rates = rates
        self._busy: set[str] = set()
        self._waiting: dict[str, dict[int, Transfer]] = {}
        self._all: dict[int, Transfer] = {}
        self._count = 0

    def copy(self, source: GpuId, destination: GpuId, size_bytes: int, *, epoch: int, done: Callable[[], None]) -> None:
        """Bytes from one GPU to another; inside an instance they pass no network port."""
        here, there = instance_of(source), instance_of(destination)
        if source == destination:
            self._submit((), 0.0, epoch, done)
        elif here == there:
            rate = self._rates.local_bytes_per_s
            self._submit((f"from {source}", f"to {destination}"), size_bytes / rate, epoch, done)
        else:
            rate = self._rates.network_bytes_per_s
            self._submit((f"out {here}", f"in {there}"), size_bytes / rate, epoch, done)

    def load(self, gpu: GpuId, size_bytes: int, *, epoch: int, done: Callable[[], None]) -> None:
        """Bytes from storage to a GPU; an instance has one way there."""
        self._submit((f"storage {instance_of(gpu)}",), size_bytes / self._rates.storage_bytes_per_s, epoch, done)

    def drop(self, *, epoch: int | None = None, instance: InstanceId | None = None) -> None:
        """Transfers of an aborted plan, or of an instance that is no more, end without being done."""
        for number, transfer in tuple(self._all.items()):
            if transfer.epoch == epoch or (instance is not None and self._touches(transfer, instance)):
                self._end(number, dropped=True)

    @staticmethod
    def _touches(transfer: Transfer, instance: InstanceId) -> bool:
        names = (port.split(" ", 1)[1] for port in transfer.ports)
        return any(name == instance or instance_of(GpuId(name)) == instance for name in names)

    def _submit(self, ports: tuple[str, ...], duration_s: float, epoch: int, done: Callable[[], None]) -> None:
        self._count += 1
        transfer = Transfer(ports, duration_s + self._rates.round_trip_s, done, epoch)
        self._all[self._count] = transfer
        if any(port in self._busy for port in ports):
            for port in ports:
                self._waiting.setdefault(port, {})[self._count] = transfer
        else:
            self._start(self._count)

    def _start(self, number: int) -> None:
        transfer = self._all[number]
        transfer.running = True
        self._busy.update(transfer.ports)
        for port in transfer.ports:
            self._waiting.get(port, {}).pop(number, None)
        self._agenda.after(transfer.duration_s, lambda: self._end(number, dropped=False))

    def _end(self, number: int, *, dropped: bool) -> None:
        transfer = self._all.pop(number, None)
        if transfer is None:
            return
        for port in transfer.ports:
            self._waiting.get(port, {}).pop(number, None)
        if transfer.running:
            self._busy.difference_update(transfer.ports)
            self._start_next(transfer.ports)
        if not dropped:
            transfer.done()

    def _start_next(self, ports: tuple[str, ...]) -> None:
        for port in ports:
            waiting = self._waiting.get(port, {})
            number = next((n for n, one in waiting.items() if not any(p in self._busy for p in one.ports)), None)
            if number is not None:
                self._start(number)
