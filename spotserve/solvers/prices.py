"""What a plan costs in money: the fleet before and after, what a million tokens then cost, and what a stop wastes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spotserve.core.cost import Pool, pool_throughput_rps
from spotserve.core.ids import GpuId
from spotserve.core.plan import Cost
from spotserve.core.snapshot import Replica
from spotserve.solvers.draft import Draft
from spotserve.solvers.estimate import workload_of
from spotserve.solvers.facts import Facts

SECONDS_PER_HOUR = 3600.0


def cost_of(facts: Facts, draft: Draft, *, stall_s: float) -> Cost | None:
    """The money of a plan; None where the profile has no price of some GPU that is paid for.

    Before are the GPUs that lived when the event came, the joining ones not yet among them; after are those that stay,
    in use or not.
    """
    world = facts.problem.snapshot.world
    joined = facts.problem.trigger.instances if facts.problem.trigger.kind == "joined" else ()
    before = [
        gpu.id
        for instance in world.instances
        if instance.state in ("ready", "doomed") and instance.id not in joined
        for gpu in instance.gpus
    ]
    after = facts.view.staying
    # A replica may stop on GPUs that joined and were noticed since: they are on neither side.
    stopped = [gpu for replica in draft.affected for gpu in replica.gpus if facts.view.alive(gpu)]
    paid = {facts.types[gpu] for gpu in (*before, *after, *stopped)} or {""}
    prices = {name: price for name in paid if (price := facts.spec.profile.price_of(name)) is not None}
    if len(prices) < len(paid):
        return None

    def usd_per_h(gpus: Iterable[GpuId]) -> float:
        return sum(prices[facts.types[gpu]] for gpu in gpus)

    before_usd, after_usd = usd_per_h(before), usd_per_h(after)
    return Cost(
        before_usd_per_h=round(before_usd, 6),
        after_usd_per_h=round(after_usd, 6),
        before_usd_per_million_tokens=_usd_per_million_tokens(facts, before_usd, world.replicas),
        after_usd_per_million_tokens=_usd_per_million_tokens(facts, after_usd, draft.target),
        stall_usd=round(usd_per_h(stopped) * stall_s / SECONDS_PER_HOUR, 6),
    )


def _usd_per_million_tokens(facts: Facts, usd_per_h: float, replicas: Sequence[Replica]) -> float | None:
    """Dollars per million tokens of output while every replica runs as many of the average request as it may."""
    workload = workload_of(facts.problem)
    pools = [Pool(facts.shape_of(replica), 1, replica.max_running) for replica in replicas]
    tokens_per_s = sum(pool_throughput_rps(facts.spec, pool, workload) for pool in pools) * workload.output_tokens
    return round(usd_per_h / (tokens_per_s * SECONDS_PER_HOUR) * 1e6, 6) if tokens_per_s else None
