"""The JSON of `spotserve status` (contracts section 3), a function of the controller's state."""

from __future__ import annotations

from typing import Any

from spotserve.core.service import service_state
from spotserve.core.snapshot import Replica
from spotserve.core.state import ClusterState, Instance

FORMAT_VERSION = "0.1"


def service_status(state: ClusterState) -> dict[str, Any]:
    """Everything a person or a script may ask of a running daemon."""
    replicas = [entry.replica for entry in state.replicas.values() if entry.state in ("serving", "quiesced")]
    states = [request.state for request in state.requests.values()]
    return {
        "format_version": FORMAT_VERSION,
        "state": service_state(state),
        "epoch": state.epoch,
        "parallel": _parallel(replicas),
        "replicas": [
            {
                "id": replica.id,
                "generation": replica.generation,
                "tensor": replica.tensor,
                "stages": [{"gpus": list(stage.gpus), "layers": list(stage.layers)} for stage in replica.stages],
            }
            for replica in replicas
        ],
        "instances": [
            {
                "id": instance.id,
                "state": instance.state,
                "gpus": [gpu.id for gpu in instance.gpus],
                "market": instance.market,
                **_gpu_types(state, instance),
            }
            for instance in state.instances.values()
        ],
        "requests": {
            "running": sum(1 for name in states if name in ("prefilling", "decoding", "suspended")),
            "queued": states.count("queued"),
            **state.counters.model_dump(),
        },
        "migrations": [line.model_dump(mode="json", exclude={"committed_at_s"}) for line in state.migrations],
    }


def _gpu_types(state: ClusterState, instance: Instance) -> dict[str, list[str]]:
    """The type of each GPU, where the profile knows more than one."""
    if state.spec is None or not state.spec.profile.devices:
        return {}
    return {"gpu_types": [gpu.type or state.spec.profile.device for gpu in instance.gpus]}


def _parallel(replicas: list[Replica]) -> dict[str, int] | None:
    """The common degrees, None when replicas differ or there are none."""
    shapes = {(replica.pipeline, replica.tensor) for replica in replicas}
    if len(shapes) != 1:
        return None
    pipeline, tensor = shapes.pop()
    return {"data": len(replicas), "pipeline": pipeline, "tensor": tensor}
