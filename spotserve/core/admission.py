"""Admission: which replica a waiting request goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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
    is_static = state.spec is not None and state.spec.limits.batching == "static"
    batches = _whole_batches(state, waiting) if is_static else _shared_out(state, waiting)
    for name, requests in batches.items():
        admissions = [
            cmd.Admission(request=request.id, kv_generation=request.kv_generation + KV_GENERATIONS_PER_ADMISSION)
            for request in requests
        ]
        generation = state.replicas[name].replica.generation
        yield cmd.AdmitRequests(replica=name, generation=generation, admissions=tuple(admissions))


def _shared_out(state: ClusterState, waiting: list[Request]) -> dict[ReplicaId, list[Request]]:
    """Each request to the replica with most room; the first that fits nowhere holds up the rest, so none starves."""
    room = _rooms(state)
    replicas = list(zip(_preferences(state), state.serving(), strict=True))
    batches: dict[ReplicaId, list[Request]] = {}
    for request in waiting:
        roomiest = _roomiest(replicas, room, request)
        if roomiest is None:
            break
        room[roomiest.id] -= request.num_choices
        batches.setdefault(roomiest.id, []).append(request)
    return batches


def _whole_batches(state: ClusterState, waiting: list[Request]) -> dict[ReplicaId, list[Request]]:
    """Static batches as the paper's artifact hands them out: a power of two, at most B, to each replica that runs none.

    When none is idle the one with the fewest gets more, until each holds as many batches' worth as it may.
    """
    most_batches = 0 if state.spec is None else state.spec.limits.static_batches
    left = list(waiting)
    room = _rooms(state)
    owned = {replica.id: replica.max_running - room[replica.id] for replica in state.serving()}
    batches: dict[ReplicaId, list[Request]] = {}
    preferred = sorted(zip(_preferences(state), state.serving(), strict=True), key=lambda one: (one[0], one[1].id))
    for _, replica in preferred:
        if not owned[replica.id] and left:
            count = 1 << (min(len(left), replica.max_running).bit_length() - 1)
            batches[replica.id], left = left[:count], left[count:]
            owned[replica.id] = count
    most = {replica.id: most_batches * replica.max_running for replica in state.serving()}
    while left and (open_ids := [name for name in owned if owned[name] < most[name]]):
        name = min(open_ids, key=lambda one: (owned[one], one))
        batches.setdefault(name, []).append(left.pop(0))
        owned[name] += 1
    return batches


def _readmit(state: ClusterState, replica: Replica) -> Iterator[cmd.Command]:
    """After a restart: name every request again; the leader ignores those it runs.

    A run that is committed names those that it moved, when their KV has come.
    """
    admissions = tuple(
        cmd.Admission(request=r.id, kv_generation=r.kv_generation)
        for r in state.requests_of(replica.id, replica.generation)
        if not has_moved(state, r)
    )
    if admissions:
        yield cmd.AdmitRequests(replica=replica.id, generation=replica.generation, admissions=admissions, again=True)


def has_moved(state: ClusterState, request: Request) -> bool:
    """Whether the request is where the committed run under way moved its KV: it was not admitted anew since."""
    run = state.run
    if run is None or not run.committed:
        return False
    # Not by the names of its KV: where a choice had ended before an earlier move, they are those of an older admission.
    return run.moved.get(request.id) == request.kv_generation


def _rooms(state: ClusterState) -> dict[ReplicaId, int]:
    """How many more choices each serving replica may run."""
    owned: Counter[tuple[ReplicaId | None, int]] = Counter()
    for request in state.requests.values():
        owned[request.replica, request.generation] += request.num_choices
    return {one.id: one.max_running - owned[one.id, one.generation] for one in state.serving()}


def _roomiest(
    replicas: list[tuple[tuple[bool, bool], Replica]], room: dict[ReplicaId, int], request: Request
) -> Replica | None:
    """The replica with most room among those that are preferred."""
    fitting = [
        (preference, -room[r.id], r.id, r)
        for preference, r in replicas
        if room[r.id] >= request.num_choices or room[r.id] == r.max_running
    ]
    return min(fitting, key=lambda one: one[:3])[3] if fitting else None


def _preferences(state: ClusterState) -> list[tuple[bool, bool]]:
    """Of each serving replica: during a run an untouched one before an affected one, doomed ones last."""
    if state.run is None:
        return [(False, state.doomed(replica)) for replica in state.serving()]
    kept = {one.id for one in state.run.plan.target.replicas}
    return [(replica.id not in kept, state.doomed(replica)) for replica in state.serving()]


class Start(NamedTuple):
    """What a leader begins a choice with: the name of its KV, and how many tokens of it are there (None: none)."""

    kv_generation: int
    kv_tokens: int | None


def start_of(admission: cmd.Admission, choice: int) -> Start:
    """Where a choice begins: with the KV that the manifest names, else from the ledger under a new name."""
    for position in admission.choices:
        if position.choice == choice:
            return Start(position.kv_generation, position.kv_tokens)
    return Start(admission.kv_generation, None)


def tokens_again(prompt_tokens: int, num_tokens: int) -> int:
    """Tokens that are prefilled a second time for a choice without KV: all but the last, which is the next input."""
    return prompt_tokens + max(0, num_tokens - 1)


def by_arrival(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: request.arrival_index)
