"""The window of a plan's stop: the arrange solver's answer for a draft."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from spotserve.core.snapshot import Replica
from spotserve.solvers.actions import (
    finishing_s,
    passed,
    port_bytes,
    port_bytes_per_token,
    seconds_per_token,
    tokens_left,
)
from spotserve.solvers.arrange import BY_FORMULA, ArrangeProblem, Decoder, Port, Stream, arrange
from spotserve.solvers.draft import Draft
from spotserve.solvers.estimate import margin_s
from spotserve.solvers.result import Result
from spotserve.solvers.steps import Window
from spotserve.solvers.view import kv_tokens, requests_of

MICROSECONDS = 1_000_000

CUT_OVER_TRIPS = 4
"""Round trips between a stop and the last byte: the stop, the delta, the commit."""


def stop_window(draft: Draft, solver: str) -> tuple[Window, Result[Window] | None]:
    """When the stop may begin and by when it must have, and how the solver found that; None without a deadline.

    `scan` stops once copies are done and finishing requests gone, but never where a stop would be too late; those of
    the paper decode for as long as they can. Without a target there is nothing to hurry for: the last moment.
    """
    left = draft.view.remaining_s
    finishing = finishing_s(draft.problem, draft.affected, draft.actions)
    if left is None:
        return Window(round(finishing, 6), None), None
    if all(replica in draft.view.lost for replica in draft.affected):
        return Window(0.0, 0.0), None
    result = arrange(stop_problem(draft, left_s=left), solver)
    window = Window(0.0, 0.0)
    if result.answer is not None:
        first_s, last_s = result.answer.first_us / MICROSECONDS, result.answer.last_us / MICROSECONDS
        is_last = solver in BY_FORMULA or not draft.target
        begin_s = last_s if is_last else round(min(max(first_s, finishing), last_s), 6)
        # In place, KV is given up if the commit has not come by then, a little after the stop has begun.
        late_s = margin_s(left) / 2 if draft.mode == "in_place" and draft.kv else 0.0
        window = Window(begin_s, round(last_s + late_s, 6))
    return window, Result(window, result.status, result.objective, result.bound, result.certificate, result.statistics)


def stop_problem(draft: Draft, *, left_s: float) -> ArrangeProblem:
    """What must cross after a stop, port by port, if `left_s` is left of the grace period.

    Only ports that something doomed is read through must be done by then; with all that crosses them.
    """
    problem, profile = draft.problem, draft.problem.spec.profile
    stopping = [replica for replica in draft.affected if replica not in draft.view.lost]
    tokens_s = [seconds_per_token(problem, replica) for replica in stopping]
    moving = {action.request for action in draft.actions if action.action == "move"}
    per_token = {route.from_replica: port_bytes_per_token(problem, kv) for route, kv in draft.kv.items()}
    weights = port_bytes(draft.transfers) if draft.mode == "in_place" else {}
    reads = [transfer for kv in draft.kv.values() for transfer in kv]
    hurried = {port for transfer in reads if transfer.source in draft.view.doomed for port in passed(transfer)}
    if draft.mode == "in_place":
        hurried |= {port for t in draft.transfers if t.source in draft.view.doomed for port in passed(t)}
    ports = tuple(
        Port(
            name,
            weights.get(name, 0),
            tuple(per_token.get(replica.id, {}).get(name, 0) for replica in stopping),
        )
        for name in sorted(hurried)
    )
    if draft.layer_by_layer is not None and hurried and weights:
        kv = tuple(max((port.token_bytes[index] for port in ports), default=0) for index in range(len(stopping)))
        ports = (*ports, Port("layers one after another", layered_bytes(draft), kv))
    reserve_s = margin_s(left_s) + CUT_OVER_TRIPS * profile.round_trip_s + max(tokens_s)
    return ArrangeProblem(
        # A grace period that is over does not make a stop that moves nothing impossible.
        remaining_us=max(0, round((left_s - reserve_s) * MICROSECONDS)),
        step_us=max(1, round(min(tokens_s) * MICROSECONDS)),
        bytes_per_s=max(1, int(profile.link_bytes_per_s)),
        decoders=tuple(
            Decoder(max(1, round(token_s * MICROSECONDS)), _streams(draft, replica, moving))
            for replica, token_s in zip(stopping, tokens_s, strict=True)
        ),
        ports=ports,
    )


def layered_bytes(draft: Draft) -> int:
    """What passes the fullest port of each layer, all layers together: none begins before the last one has arrived."""
    loads: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for transfer in draft.transfers:
        for part in transfer.parts:
            for port in passed(transfer):
                loads[part.layer][port] += part.bytes
    return sum(max(ports.values()) for ports in loads.values())


def _streams(draft: Draft, replica: Replica, moving: Collection[str]) -> tuple[Stream, ...]:
    """The moving requests of a replica: live, a block for each choice; in_place, all KV and what it grows by."""
    block = draft.problem.spec.limits.kv_block_tokens
    streams = []
    for request in requests_of(draft.problem, replica.id):
        if request.request not in moving:
            continue
        choices = max(1, len(request.choices))
        left = tokens_left(request)
        in_place = draft.mode == "in_place"
        streams.append(
            Stream(
                tokens_left=None if left == float("inf") else int(left),
                kv_tokens=choices * block + (kv_tokens(request) if in_place else 0),
                growth=choices if in_place else 0,
            )
        )
    return tuple(streams)
