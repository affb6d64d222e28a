"""Which requests of affected replicas finish where they are, move with their KV, or are computed again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from spotserve.core.cost import prefill_ms, sequence_blocks
from spotserve.core.ids import ReplicaId, instance_of, natural_key
from spotserve.core.plan import PlanningProblem, RequestAction, Route
from spotserve.core.slices import kv_token_bytes
from spotserve.core.snapshot import Replica, RequestProgress
from spotserve.core.spec import ServingSpec
from spotserve.solvers.gpu_kinds import replica_decode_ms
from spotserve.solvers.ladder import Item, LadderProblem, Resource, Weights
from spotserve.solvers.migrate.kv import KvTransfer
from spotserve.solvers.migrate.sources import Transfer
from spotserve.solvers.view import View, kv_tokens, requests_of

ATTENTION_SHARE = 12
"""Attention's part of a prefill of n tokens is n / (12 hidden): 2 n^2 h of 24 n h^2 operations a layer, causal."""


def decide_requests(
    problem: PlanningProblem,
    affected: tuple[Replica, ...],
    routes: tuple[Route, ...],
    *,
    moving: Collection[str],
    staying: Collection[ReplicaId],
    stay_s: float,
) -> tuple[RequestAction, ...]:
    """Move what is in `moving`; of the rest on replicas `staying` so long, what ends within `stay_s` finishes there."""
    heir = {route.from_replica: route.to_replica for route in routes}
    chosen = []
    for replica in affected:
        token_s = seconds_per_token(problem, replica)
        for request in requests_of(problem, replica.id):
            action = "recompute"
            if request.request in moving:
                action = "move"
            elif replica.id in staying and replica.id in heir and tokens_left(request) * token_s <= stay_s:
                action = "finish"
            named = {"request": request.request, "action": action, "to_replica": heir.get(replica.id)}
            chosen.append(RequestAction.model_validate(named))
    return tuple(sorted(chosen, key=lambda action: action.request))


def finishing_s(problem: PlanningProblem, affected: tuple[Replica, ...], actions: tuple[RequestAction, ...]) -> float:
    """How long the slowest of the requests that finish where they are needs; 0 if there is none."""
    finishing = {action.request for action in actions if action.action == "finish"}
    return max(
        (
            tokens_left(request) * seconds_per_token(problem, replica)
            for replica in affected
            for request in requests_of(problem, replica.id)
            if request.request in finishing
        ),
        default=0.0,
    )


def ladder_problem(
    problem: PlanningProblem,
    view: View,
    affected: tuple[Replica, ...],
    target: tuple[Replica, ...],
    *,
    kv: Mapping[Route, tuple[KvTransfer, ...]],
    transfers: Sequence[Transfer],
    budget_s: float | None,
    stay_s: float | None,
) -> LadderProblem:
    """Which requests could move, and what they need of the targets' B and KV pools and of ports within `budget_s`.

    Weights are due, as a commit needs all of them; without a budget the ports do not bind. With one, whoever ends
    within `stay_s` is left out: it finishes where it is and leaves the ports to others.
    """
    names: dict[str, int] = {}
    resources: list[Resource] = []
    for replica in target:
        sequences, blocks = _room(problem, replica)
        for name, capacity in ((f"sequences {replica.id}", sequences), (f"blocks {replica.id}", blocks)):
            names[name] = len(resources)
            resources.append(Resource(name, max(0, capacity)))
    ports = [] if budget_s is None else _ports(kv, transfers)
    for name in ports:
        names[name] = len(resources)
        capacity = int((budget_s or 0.0) * problem.spec.profile.link_bytes_per_s)
        resources.append(Resource(name, capacity, 0))
    lost = {replica.id for replica in view.lost}
    replicas = {replica.id: replica for replica in (*affected, *target)}
    items = []
    for route, rectangles in sorted(kv.items(), key=lambda item: natural_key(item[0].from_replica)):
        if route.from_replica in lost:
            continue
        through = port_bytes_per_token(problem, rectangles) if ports else {}
        token_us = _prefill_token_us(problem.spec, replicas[route.to_replica])
        token_s = seconds_per_token(problem, replicas[route.from_replica])
        for request in requests_of(problem, route.from_replica):
            if budget_s is not None and stay_s is not None and tokens_left(request) * token_s <= stay_s:
                continue
            tokens = kv_tokens(request) + max(1, len(request.choices)) * problem.spec.limits.kv_block_tokens
            uses = {
                names[f"sequences {route.to_replica}"]: max(1, len(request.choices)),
                names[f"blocks {route.to_replica}"]: _blocks(problem, request),
                **{names[port]: tokens * num_bytes for port, num_bytes in through.items()},
            }
            items.append(
                Item(
                    request.request,
                    recompute_us(request, token_us=token_us, hidden_size=problem.spec.model.hidden_size),
                    tuple(sorted(uses.items())),
                    kv_tokens(request),
                )
            )
    due = tuple(
        Weights(transfer.bytes, tuple(names[port] for port in passed(transfer)))
        for transfer in transfers
        if ports and passed(transfer)
    )
    return LadderProblem(tuple(items), tuple(resources), due)


def recompute_us(request: RequestProgress, *, token_us: float, hidden_size: int) -> int:
    """Microseconds of prefill that a request's KV is worth; superlinear in its length.

    Attention, which a profile's layers are not measured with, comes on top of `token_us`.
    """
    lengths = [choice.kv_tokens for choice in request.choices]
    return sum(round(token_us * tokens * (1 + tokens / (ATTENTION_SHARE * hidden_size))) for tokens in lengths)


def _prefill_token_us(spec: ServingSpec, replica: Replica) -> float:
    """Microseconds per prefilled token: many requests are computed again together, in forwards as large as measured."""
    most = max(point.tokens for point in spec.profile.latencies)
    return 1000.0 * prefill_ms(spec, pipeline=replica.pipeline, tensor=replica.tensor, tokens=most) / most


def port_bytes_per_token(problem: PlanningProblem, rectangles: Sequence[KvTransfer]) -> dict[str, int]:
    """Bytes that a KV token of some rectangles puts through each port."""
    ports: dict[str, int] = defaultdict(int)
    for transfer in rectangles:
        layers, heads = transfer.rectangle
        for port in passed(transfer):
            ports[port] += kv_token_bytes(problem.spec.model, layers=layers, heads=heads)
    return dict(ports)


def passed(transfer: Transfer | KvTransfer) -> tuple[str, ...]:
    """The ports that a transfer passes: none inside an instance or from storage."""
    if transfer.source is None or instance_of(transfer.source) == instance_of(transfer.destination):
        return ()
    return f"out {instance_of(transfer.source)}", f"in {instance_of(transfer.destination)}"


def port_bytes(transfers: Sequence[Transfer]) -> dict[str, int]:
    """Bytes that weights put through each port."""
    ports: dict[str, int] = defaultdict(int)
    for transfer in transfers:
        for port in passed(transfer):
            ports[port] += transfer.bytes
    return dict(ports)


def _ports(kv: Mapping[Route, tuple[KvTransfer, ...]], transfers: Sequence[Transfer]) -> list[str]:
    """The ports that anything passes, in natural order."""
    crossed = {port for transfer in transfers for port in passed(transfer)}
    crossed.update(port for rectangles in kv.values() for transfer in rectangles for port in passed(transfer))
    return sorted(crossed, key=natural_key)


def _room(problem: PlanningProblem, replica: Replica) -> tuple[int, int]:
    """Sequences and blocks that a target replica can still take."""
    own = requests_of(problem, replica.id)
    return (
        replica.max_running - sum(max(1, len(request.choices)) for request in own),
        replica.kv_blocks - sum(_blocks(problem, request) for request in own),
    )


def _blocks(problem: PlanningProblem, request: RequestProgress) -> int:
    """KV cache blocks a request occupies, with one to grow into per choice."""
    limits = problem.spec.limits
    tokens = [choice.kv_tokens for choice in request.choices] or [0]
    return sum(min(sequence_blocks(limits), count // limits.kv_block_tokens + 1) for count in tokens)


def tokens_left(request: RequestProgress) -> float:
    """How many tokens a decoding request may still generate; for ever if it does not decode yet."""
    if request.state != "decoding" or not request.choices:
        return math.inf
    return max(request.max_tokens - choice.tokens for choice in request.choices)


def seconds_per_token(problem: PlanningProblem, replica: Replica) -> float:
    """Seconds per token of a replica with all its requests."""
    running = max(1, len(requests_of(problem, replica.id)))
    return replica_decode_ms(problem, replica, running=running) / 1000.0
