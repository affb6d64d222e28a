"""Static batches are handed out whole; a choice starts with its KV or from the ledger."""

from __future__ import annotations

import pytest

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.admission import admit, start_of, tokens_again
from spotserve.core.ids import GpuId, ReplicaId, RequestId
from spotserve.core.snapshot import Replica, Stage
from spotserve.core.state import ClusterState, Instance, ReplicaEntry, Request
from spotserve.core.wire import ChoicePosition
from tests.planning_worlds import tiny_spec


def cluster(*, batching: str, waiting: int, owned: dict[str, int], static_batches: int = 2) -> ClusterState:
    """Replicas of one GPU each that own so many requests, and requests that wait."""
    spec = tiny_spec()
    limits = spec.limits.model_copy(update={"batching": batching, "static_batches": static_batches})
    replicas, requests, instances = {}, {}, {}
    for number, (name, count) in enumerate(owned.items()):
        gpu = GpuId(f"i{number}/0")
        replica = Replica(
            id=ReplicaId(name),
            generation=1,
            max_running=4,
            kv_blocks=16,
            stages=(Stage(layers=(0, 8), gpus=(gpu,)),),
        )
        replicas[replica.id] = ReplicaEntry(replica=replica, state="serving")
        instances[f"i{number}"] = Instance.model_validate({"id": f"i{number}", "state": "ready", "num_gpus": 1})
        for index in range(count):
            one = request(f"{name}-{index}", len(requests)).model_copy(
                update={"replica": replica.id, "generation": 1, "state": "decoding"}
            )
            requests[one.id] = one
    for index in range(waiting):
        one = request(f"w{index}", 100 + index)
        requests[one.id] = one
    return ClusterState.model_validate(
        {
            "spec": spec.model_copy(update={"limits": limits}),
            "replicas": replicas,
            "requests": requests,
            "instances": instances,
            "epoch": 1,
        }
    )


def request(name: str, arrival: int) -> Request:
    """A request that waits."""
    return Request(id=RequestId(name), arrival_index=arrival, prompt_tokens=9, num_choices=1, max_tokens=9)


def handed_out(state: ClusterState) -> dict[str, list[str]]:
    """Which requests each replica is given."""
    commands = admit(state, state, ev.TimerFired(at_s=0.0, timer="any"))
    return {
        command.replica: [one.request for one in command.admissions]
        for command in commands
        if isinstance(command, cmd.AdmitRequests)
    }


def test_an_idle_replica_gets_a_power_of_two() -> None:
    """Tests that of three who wait an idle replica gets two at once, and the third follows as its next batch."""
    given = handed_out(cluster(batching="static", waiting=3, owned={"r1": 0}))
    assert given == {"r1": ["w0", "w1", "w2"]}
    given = handed_out(cluster(batching="static", waiting=7, owned={"r1": 0, "r2": 0}))
    assert given["r1"][:4] == ["w0", "w1", "w2", "w3"]
    assert given["r2"][:2] == ["w4", "w5"]


def test_one_full_batch_waits_beside_the_one_that_runs() -> None:
    """Tests that replicas with a batch take more, the one with fewest first, until each has two batches' worth."""
    given = handed_out(cluster(batching="static", waiting=20, owned={"r1": 4, "r2": 2}))
    assert {name: len(names) for name, names in given.items()} == {"r1": 4, "r2": 6}
    assert given["r2"][:2] == ["w0", "w1"]


@pytest.mark.parametrize(
    ("batches", "given"), [(0, {"r3": 4}), (1, {"r2": 2, "r3": 4}), (2, {"r1": 4, "r2": 6, "r3": 8})]
)
def test_how_many_batches_a_replica_may_hold(batches: int, given: dict[str, int]) -> None:
    """Tests that replicas are filled up to so many batches' worth, and with none of them only one that is idle."""
    state = cluster(batching="static", waiting=30, owned={"r1": 4, "r2": 2, "r3": 0}, static_batches=batches)
    assert {name: len(names) for name, names in handed_out(state).items()} == given


def test_continuous_batching_fills_places() -> None:
    """Tests that without static batches nobody is given more than B."""
    given = handed_out(cluster(batching="continuous", waiting=20, owned={"r1": 4, "r2": 2}))
    assert {name: len(names) for name, names in given.items()} == {"r2": 2}


def test_a_choice_starts_where_its_kv_ends() -> None:
    """Tests that a choice in the manifest keeps its KV, and another starts from the ledger, all but one token again."""
    position = ChoicePosition(request=RequestId("q"), choice=1, kv_generation=7, tokens=3, kv_tokens=11)
    admission = cmd.Admission(request=RequestId("q"), kv_generation=9, choices=(position,))
    assert start_of(admission, 1) == (7, 11)
    assert start_of(admission, 0) == (9, None)
    assert tokens_again(9, 0) == 9
    assert tokens_again(9, 3) == 11
