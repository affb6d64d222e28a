"""Allocating and freeing instances (Algorithm 1, lines 6 to 9), and what a fleet costs.

The paper allocates on-demand and spot at the same time and takes whichever comes first; it frees on-demand first and
keeps a candidate pool of two.
"""

from __future__ import annotations

from dataclasses import dataclass

CANDIDATE_POOL = 2
"""Instances kept beyond what the configuration needs (section 3.2)."""

INIT_MINUTES = 2.0
"""Launch and initialisation of an instance, billed and not usable."""


@dataclass(frozen=True, slots=True)
class FleetChange:
    """How many instances to request of each market (both at once, the first to come counts) or to give back."""

    request_spot: int = 0
    request_on_demand: int = 0
    free_spot: int = 0
    free_on_demand: int = 0


def alloc_free(needed: int, *, spot: int, on_demand: int, pool: int = CANDIDATE_POOL) -> FleetChange:
    """What to do when a configuration needs `needed` instances.

    `spot` and `on_demand` are the N_t instances: those newly allocated count, those under notice do not.
    """
    delta = needed - (spot + on_demand)
    if delta > 0:
        return FleetChange(request_spot=delta, request_on_demand=delta)
    surplus = max(0, -delta - pool)
    freed = min(surplus, on_demand)
    return FleetChange(free_on_demand=freed, free_spot=min(surplus - freed, spot))


def billed_minutes(available_minutes: float, *, acquisitions: int, init_minutes: float = INIT_MINUTES) -> float:
    """Instance-minutes that are paid: those available and the start-up of every instance acquired on the way."""
    return available_minutes + acquisitions * init_minutes


def cost_usd(instance_minutes: float, *, usd_per_hour: float) -> float:
    """Price of so many instance-minutes."""
    return instance_minutes / 60 * usd_per_hour
