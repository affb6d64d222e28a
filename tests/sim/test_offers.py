"""What a trace offers and who has it."""

from __future__ import annotations

from spotserve.core.ids import InstanceId
from spotserve.sim.offers import Machine, Offers

A, B = Machine(InstanceId("a"), ready_at_s=5.0), Machine(InstanceId("b"), "ondemand")
FIRST, SECOND = InstanceId("i0"), InstanceId("i1")


def test_a_machine_that_is_given_back_is_on_offer_again() -> None:
    """Tests that the next one who asks gets it, to be started anew, and that nobody has it twice."""
    offers = Offers()
    assert offers.offer(A) is None
    assert offers.take(FIRST) == A
    offers.give_back(FIRST)
    again = offers.take(SECOND)
    assert again is not None
    assert (again.name, again.ready_at_s) == ("a", None)
    assert offers.take(InstanceId("i2")) is None


def test_what_is_declined_stays_on_offer() -> None:
    """Tests that an offer nobody launches is there for who asks later."""
    offers = Offers()
    offers.offer(B)
    offers.decline(FIRST)
    taken = offers.take(SECOND)
    assert taken is not None
    assert (taken.name, taken.market) == ("b", "ondemand")


def test_who_waits_gets_the_next_machine() -> None:
    """Tests that an instance asked for while nothing is there gets what is offered next, unless it is given up."""
    offers = Offers()
    assert offers.take(FIRST) is None
    assert offers.take(SECOND) is None
    offers.decline(FIRST)
    assert offers.offer(A) == SECOND
    assert offers.leave(A.name) == SECOND


def test_what_the_cloud_takes_is_offered_to_nobody() -> None:
    """Tests that a machine that leaves is told to who has it, and is not offered again when it is given back."""
    offers = Offers()
    offers.has(A, FIRST)
    assert offers.leave(A.name) == FIRST
    offers.give_back(FIRST)
    offers.offer(B)
    offers.decline(SECOND)
    assert offers.leave(B.name) is None
    assert offers.take(SECOND) is None
