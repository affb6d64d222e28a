"""The headline state: a function of the whole controller state, first match wins (design section 2)."""

from __future__ import annotations

from spotserve.core.state import ClusterState


def service_state(state: ClusterState) -> str:
    """The SERVICE state that `spotserve status` shows."""
    if state.stopped:
        return "stopped"
    if state.stop_by_s is not None:
        return "stopping"
    if not state.served:
        return "degraded" if state.infeasible else "provisioning"
    serving = state.serving()
    if _migrating(state, bool(serving)):
        return "migrating"
    if not serving:
        return "degraded"
    if (state.run is not None and not state.run.committed) or state.any_doomed(serving):
        return "draining"
    if state.awaiting:
        return "resuming"
    return "serving"


def _migrating(state: ClusterState, serves: bool) -> bool:
    """A run is under way and committed, or a replica it affects is quiesced or lost, or none serves."""
    if state.run is None:
        return state.planning is not None and not serves and not state.infeasible
    affected = any(entry.state in ("quiesced", "lost") for entry in state.replicas.values())
    return state.run.committed or affected or not serves
