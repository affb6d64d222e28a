"""Who may join: workers of instances that are wanted, unless they belong to another journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotserve.app import _greeter
from spotserve.core.controller import Controller
from spotserve.core.ids import InstanceId
from spotserve.core.options import RunOptions
from spotserve.core.state import ClusterState, Instance
from spotserve.core.wire import Refused, Welcome
from spotserve.runtime.model_manifest import ModelManifest
from tests.runtime.test_switchboard import register_of
from tests.specs import small_spec

I0 = InstanceId("i0")


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
    greet = _greeter(
        RunOptions(state_dir="/state"),
        small_spec(),
        Path("/model"),
        ModelManifest(model_digest="sha256:0", files=()),
        term=2,
        journal="ours",
        controller=Controller(ClusterState(instances={I0: Instance(id=I0, state=state)})),
    )
    answer = greet(register_of("one").model_copy(update={"journal": journal}))
    if reason is None:
        assert isinstance(answer, Welcome)
        assert "ours" == answer.journal
    else:
        assert Refused(term=2, reason=reason) == answer
