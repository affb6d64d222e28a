"""Transfers in virtual time: ports carry one at a time, both ways at once, and what is dropped is never done."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spotserve.core.ids import GpuId, InstanceId
from spotserve.sim.agenda import FIRST, LAST, Agenda
from spotserve.sim.links import LinkRates, Links

RATES = LinkRates(network_bytes_per_s=10.0, local_bytes_per_s=100.0, storage_bytes_per_s=5.0, round_trip_s=0.5)


class Yard:
    """Links with a list of what was done when."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.links = Links(self.agenda, RATES)
        self.done: list[tuple[str, float]] = []

    def note(self, name: str) -> Callable[[], None]:
        """Takes note of the end of a transfer."""
        return lambda: self.done.append((name, round(self.agenda.now_s, 6)))

    def copy(self, name: str, source: str, destination: str, size_bytes: int, *, epoch: int = 1) -> None:
        """A copy that takes note of its end."""
        self.links.copy(GpuId(source), GpuId(destination), size_bytes, epoch=epoch, done=self.note(name))

    def load(self, name: str, gpu: str, size_bytes: int) -> None:
        """A load from storage that takes note of its end."""
        self.links.load(GpuId(gpu), size_bytes, epoch=1, done=self.note(name))

    def finish(self) -> list[tuple[str, float]]:
        """Everything to its end."""
        self.agenda.next_event(1e9)
        return self.done


@pytest.fixture
def yard() -> Yard:
    """Idle links."""
    return Yard()


def test_a_port_carries_one_at_a_time(yard: Yard) -> None:
    """Tests that two copies from one instance, or to one, go one after the other, in order of their request."""
    yard.copy("first", "a/0", "b/0", 100)
    yard.copy("second", "a/1", "c/0", 10)
    yard.copy("third", "d/0", "c/1", 10)
    assert [("third", 1.5), ("first", 10.5), ("second", 12.0)] == yard.finish()


def test_a_port_is_full_duplex(yard: Yard) -> None:
    """Tests that an instance sends and receives at the same time."""
    yard.copy("there", "a/0", "b/0", 100)
    yard.copy("back", "b/0", "a/0", 100)
    assert [("there", 10.5), ("back", 10.5)] == yard.finish()


def test_inside_an_instance_no_port_is_used(yard: Yard) -> None:
    """Tests that GPUs of an instance copy at their own rate beside its network port, and one GPU to itself at once."""
    yard.copy("out", "a/0", "b/0", 100)
    yard.copy("inside", "a/0", "a/1", 100)
    yard.copy("itself", "a/0", "a/0", 100)
    assert [("itself", 0.5), ("inside", 1.5), ("out", 10.5)] == yard.finish()


def test_an_instance_has_one_way_to_storage(yard: Yard) -> None:
    """Tests that GPUs of one instance load one after the other, those of two at the same time."""
    for name, gpu in (("first", "a/0"), ("second", "a/1"), ("other", "b/0")):
        yard.load(name, gpu, 50)
    assert [("first", 10.5), ("other", 10.5), ("second", 21.0)] == yard.finish()


def test_a_waiting_transfer_holds_up_nobody_else(yard: Yard) -> None:
    """Tests that one that waits for its destination does not keep its source from sending elsewhere."""
    yard.copy("to b", "a/0", "b/0", 100)
    yard.copy("waits", "c/0", "b/0", 10)
    yard.copy("passes", "c/0", "d/0", 10)
    assert ("passes", 1.5) in yard.finish()
    assert ("waits", 12.0) in yard.done


def test_an_aborted_plan_moves_nothing_more(yard: Yard) -> None:
    """Tests that the transfers of an epoch end without being done and give way to those of another."""
    yard.copy("aborted", "a/0", "b/0", 1000, epoch=1)
    yard.copy("waiting", "a/0", "b/0", 1000, epoch=1)
    yard.copy("other", "a/0", "b/0", 100, epoch=2)
    yard.agenda.at(1.0, lambda: yard.links.drop(epoch=1))
    assert [("other", 11.5)] == yard.finish()


def test_a_lost_instance_takes_its_transfers_with_it(yard: Yard) -> None:
    """Tests that copies from it, to it and loads of it are never done, and others go on."""
    yard.copy("from", "a/0", "b/0", 100)
    yard.copy("to", "c/0", "a/0", 100)
    yard.copy("inside", "a/0", "a/1", 1000)
    yard.load("load", "a/0", 50)
    yard.copy("behind", "c/0", "b/0", 10)
    # An instance whose name begins with the other's.
    yard.copy("alike", "ab/0", "d/0", 100)
    yard.agenda.at(2.0, lambda: yard.links.drop(instance=InstanceId("a")))
    assert [("behind", 3.5), ("alike", 10.5)] == yard.finish()


def test_equal_times_in_order_of_priority_then_of_calls() -> None:
    """Tests that what happens at one moment has one order, whoever asked first among equals."""
    agenda, order = Agenda(), []
    for name, priority in (("last", LAST), ("one", 1), ("first", FIRST), ("two", 1)):
        agenda.at(1.0, lambda name=name: order.append(name), priority=priority)  # type: ignore[misc]
    agenda.at(0.5, lambda: agenda.at(0.1, lambda: order.append("past")))  # type: ignore[func-returns-value]
    assert agenda.next_event(1.0) is None
    assert ["past", "first", "one", "two", "last"] == order
    assert agenda.next_event(0.9) is None
