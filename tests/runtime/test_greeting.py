"""Who may join: workers of instances that are wanted, unless they belong to another journal or are of no known type."""

from __future__ import annotations

import pytest

from spotserve.app.greeting import greeter
from spotserve.core.controller import Controller
from spotserve.core.ids import InstanceId
from spotserve.core.state import ClusterState, Instance
from spotserve.core.wire import Refused, Welcome
from tests.runtime.test_switchboard import register_of
from tests.specs import small_spec

I0 = InstanceId("i0")
WELCOME = Welcome(term=2, spec=small_spec(), model_path="/model", journal="ours", orphan_timeout_s=20.0)


def test_a_type_without_times_is_refused() -> None:
    """Tests that a worker of a GPU type that no plan could reckon with is told so, with the types there are."""
    greet = greeter(WELCOME, Controller(ClusterState(instances={I0: Instance(id=I0)})))
    answer = greet(register_of("one").model_copy(update={"gpu_type": "NVIDIA A10"}))
    assert isinstance(answer, Refused)
    assert answer.reason.startswith("GPU type 'NVIDIA A10' has no times in profile 'test'; known: cpu; --gpu-profile")
    assert WELCOME == greet(register_of("one").model_copy(update={"gpu_type": "cpu"}))


@pytest.mark.parametrize(
    ("journal", "state", "reason"),
    [
        (None, "requested", None),
        ("ours", "ready", None),
        ("theirs", "requested", "worker i0/0 belongs to another journal"),
        ("ours", "gone", "instance i0 is not wanted"),
    ],
)
def test_who_is_welcome(journal: str | None, state: str, reason: str | None) -> None:
    """Tests that new workers and our own are welcomed, and told the journal; an earlier daemon's are refused."""
    greet = greeter(WELCOME, Controller(ClusterState(instances={I0: Instance(id=I0, state=state)})))
    answer = greet(register_of("one").model_copy(update={"journal": journal}))
    assert (WELCOME if reason is None else Refused(term=2, reason=reason)) == answer
