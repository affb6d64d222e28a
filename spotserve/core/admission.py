"""Admission: which replica a waiting request goes to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spotserve.core import commands as cmd
from spotserve.core import events as ev
from spotserve.core.ids import ReplicaId
from spotserve.core.snapshot import Replica
from spotserve.core.state import ClusterState, Request

KV_GENERATIONS_PER_ADMISSION = 1_000_000
"""A leader raises the kv_generation at each eviction; admissions jump further than it ever gets, so that no KV copied
for an earlier admission can be taken for that of a later one."""


def admit(before: ClusterState, state: ClusterState, event: ev.Event) -> Iterator[cmd.Command]:
    """Hand waiting requests to replicas with room: interrupted ones first, then by arrival."""
    if isinstance(event, ev.CoordinatorRestarted):
        for replica in state.serving():
            yield from _readmit(state, replica)
    waiting = [r for r in state.requests.values() if r.replica is None and r.state in ("queued", "suspended")]
    waiting.sort(key=lambda r: (r.state != "suspended", r.arrival_index))
    if not waiting:
        return
    room = {replica.id: _room(state, replica) for replica in state.serving()}
    batches: dict[ReplicaId, list[cmd.Admission]] = {}
    for request in waiting:
        roomiest = _roomiest(state, room, request)
        if roomiest is None:
            break
        room[roomiest.id] -= request.num_choices
        batches.setdefault(roomiest.id, []).append(
            cmd.Admission(request=request.id, kv_generation=request.kv_generation + KV_GENERATIONS_PER_ADMISSION)
        )
    for name, admissions in batches.items():
        generation = state.replicas[name].replica.generation
        yield cmd.AdmitRequests(replica=name, generation=generation, admissions=tuple(admissions))


def _readmit(state: ClusterState, replica: Replica) -> Iterator[cmd.Command]:
    """After a restart: name every request again; the leader ignores those it runs.

    A run that is committed names those that it moved, when their KV has come.
    """
    moved = state.run.sources if state.run is not None and state.run.committed else {}
    admissions = tuple(
        cmd.Admission(request=r.id, kv_generation=r.kv_generation)
        for r in state.requests_of(replica.id, replica.generation)
        if r.id not in moved
    )
    if admissions:
        yield cmd.AdmitRequests(replica=replica.id, generation=replica.generation, admissions=admissions, again=True)


def _room(state: ClusterState, replica: Replica) -> int:
    owned = state.requests_of(replica.id, replica.generation)
    return replica.max_running - sum(request.num_choices for request in owned)


def _roomiest(state: ClusterState, room: dict[ReplicaId, int], request: Request) -> Replica | None:
    """The replica with most room; during a run an untouched one before an affected one, doomed ones last."""
    fitting = [r for r in state.serving() if room[r.id] >= request.num_choices or room[r.id] == r.max_running]
    if not fitting:
        return None
    kept = set() if state.run is None else {r.id for r in state.run.plan.target.replicas}
    return min(
        fitting,
        key=lambda r: (state.run is not None and r.id not in kept, state.doomed(r), -room[r.id], r.id),
    )


def by_arrival(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: request.arrival_index)
