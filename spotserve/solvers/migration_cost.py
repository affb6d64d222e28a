"""What a candidate costs clients until the next event: slower answers all the time, and the outage to get there.

score = requests in flight x expected time to the next event + what stops and recomputes wait, in request-seconds; the
requests in flight are load x l_req (Little's law). The candidate that configure puts first is only left for one that is
better by the hysteresis, so that neighbours do not take turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from spotserve.core.cost import Worth, prefill_ms
from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.plan import Plan
from spotserve.core.snapshot import RequestProgress

QUIET_S = 120.0
"""Expected time to the next event: spot traces of a dozen instances have one every minute or two."""

HYSTERESIS = 0.05
"""Share of its score that a candidate must save over the first one."""


@dataclass(frozen=True, slots=True)
class MigrationCost:
    """Request-seconds: of serving until the next event, and of the outage."""

    serving: float
    outage: float

    @property
    def score(self) -> float:
        """Both together; less is better."""
        return self.serving + self.outage

    @property
    def may_be_beaten(self) -> bool:
        """Whether a candidate without any outage could win by the hysteresis."""
        return self.outage > HYSTERESIS * self.score

    def beats(self, first: MigrationCost) -> bool:
        """Whether it is better than `first` by the hysteresis."""
        return self.score < (1 - HYSTERESIS) * first.score


def migration_cost(plan: Plan, worth: Worth, *, best: Worth, lost: Collection[ReplicaId] = ()) -> MigrationCost:
    """The cost of a candidate's plan; `best` is the one that configure alone would take.

    What the requests of `lost` replicas wait is no choice's fault and not counted; neither is the iteration that a stop
    waits for, as its tokens come as always.

    Under an unknown load the requests that are there count as in flight, longer by the ratio of the throughputs.
    """
    load_rps, live = plan.snapshot.load_rps, plan.snapshot.live_requests
    if load_rps > 0:
        in_flight = load_rps * worth.latency_ms / 1000.0
    else:
        slower = best.throughput_rps / max(1e-6, worth.throughput_rps)
        in_flight = sum(map(len, live.values())) * slower
    before = {one.id for one in plan.snapshot.world.replicas} - {one.id for one in plan.target.replicas}
    draining_s = max((step.estimated_s for step in plan.steps if step.kind == "quiesce"), default=0.0)
    stall_s = max(0.0, plan.estimates.stall_s - draining_s)
    stopped = sum(len(live.get(name, ())) for name in before.difference(lost)) + load_rps * stall_s / 2
    return MigrationCost(in_flight * QUIET_S, stopped * stall_s + _recomputing(plan, lost))


def _recomputing(plan: Plan, lost: Collection[ReplicaId]) -> float:
    """Request-seconds until the requests that are computed again have their KV, one after the other on each replica."""
    progress: dict[RequestId, RequestProgress] = {one.request: one for one in plan.snapshot.requests}
    ahead_s: dict[str | None, float] = defaultdict(float)
    replicas = {replica.id: replica for replica in plan.target.replicas}
    total = 0.0
    for action in plan.requests:
        request = progress[action.request]
        replica = None if action.to_replica is None else replicas.get(action.to_replica)
        if action.action != "recompute" or request.replica in lost or replica is None:
            continue
        tokens = sum(request.prompt_tokens + choice.tokens for choice in request.choices) or request.prompt_tokens
        again_ms = prefill_ms(plan.spec, pipeline=replica.pipeline, tensor=replica.tensor, tokens=tokens)
        ahead_s[action.to_replica] += again_ms / 1000.0
        total += ahead_s[action.to_replica]
    return total
