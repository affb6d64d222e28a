"""A rate that somebody tells is planned for at once; a measured one only when it is far from what was planned."""

from __future__ import annotations

from spotserve.core import events as ev
from spotserve.core.observe import observe
from tests.core.test_admission import cluster


def triggered(planned_rps: float, load_rps: float, *, told: bool) -> bool:
    """Whether a rate makes a serving cluster plan."""
    state = cluster(batching="continuous", waiting=0, owned={"r1": 1})
    state = state.model_copy(update={"planned_load_rps": planned_rps})
    event = ev.LoadSampled(at_s=10.0, load_rps=load_rps, told=told)
    return observe(state, event).trigger == "load"


def test_a_told_rate_is_taken_at_its_word() -> None:
    """Tests that a third more is planned for when told and not when measured, and that the same rate never is."""
    assert triggered(0.6, 0.8, told=True)
    assert not triggered(0.6, 0.8, told=False)
    assert not triggered(0.6, 0.6, told=True)


def test_an_event_of_before_says_nothing_of_it() -> None:
    """Tests that journals of before are read as measured rates, and that these are written as they were."""
    event = ev.LoadSampled.model_validate({"kind": "load_sampled", "at_s": 1.0, "load_rps": 2.0})
    assert not event.told
    assert "told" not in event.model_dump()
