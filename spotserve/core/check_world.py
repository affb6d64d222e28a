"""The form rules of a plan's spec and snapshot: what every other rule takes for granted, and the bounds that keep a
hostile file from costing more than it weighs."""

from __future__ import annotations

from collections.abc import Iterator

from spotserve.core.finding import Facts, Finding
from spotserve.core.slices import Shard
from spotserve.core.snapshot import Replica
from spotserve.core.spec import ModelSpec, Parameter

MAX_LAYERS = 4096
MAX_PARAMETERS = 4096
MAX_STEPS = 20_000


def check_spec(facts: Facts) -> Iterator[Finding]:
    """The parameter table can be cut: known axes, contiguous chunks, segments inside their dimension."""
    model = facts.model
    if model.num_layers > MAX_LAYERS or len(model.parameters) > MAX_PARAMETERS:
        message = f"{model.num_layers} layers and {len(model.parameters)} parameters exceed {MAX_LAYERS}"
        yield _corrupt("spec.model", message)
        return
    if len(facts.plan.steps) > MAX_STEPS:
        yield _corrupt("steps", f"{len(facts.plan.steps)} steps exceed {MAX_STEPS}")
    names = [axis.name for axis in model.axes]
    if len(set(names)) < len(names) or not {"q_heads", "kv_heads"} <= set(names):
        yield _corrupt("spec.model.axes", f"axes {names} are not each named once with q_heads and kv_heads")
        return
    for number, axis in enumerate(model.axes):
        if axis.cover_of is not None:
            covered = next((other for other in model.axes if other.name == axis.cover_of), None)
            if covered is None or covered.cover_of is not None or axis.size * axis.group != covered.size:
                yield _corrupt(f"spec.model.axes[{number}]", f"{axis.name} does not cover {axis.cover_of}")
        elif not _contiguous(axis.chunks, axis.size):
            yield _corrupt(f"spec.model.axes[{number}]", f"chunks of {axis.name} do not cover [0, {axis.size})")
    for number, parameter in enumerate(model.parameters):
        if not _well_cut(model, parameter):
            yield _corrupt(f"spec.model.parameters[{number}]", f"{parameter.name} cannot be cut as the table says")
    if len({parameter.name for parameter in model.parameters}) < len(model.parameters):
        yield _corrupt("spec.model.parameters", "a parameter is listed twice")


def _contiguous(chunks: tuple[tuple[int, int], ...], size: int) -> bool:
    position = 0
    for start, stop in chunks:
        if start != position or stop <= start:
            return False
        position = stop
    return position == size


def _well_cut(model: ModelSpec, parameter: Parameter) -> bool:
    sizes = {axis.name: axis.size for axis in model.axes}
    if not parameter.shape or any(extent < 1 for extent in parameter.shape):
        return False
    if not 0 <= parameter.dim < len(parameter.shape):
        return False
    end = 0
    for segment in parameter.segments:
        if segment.axis not in sizes or segment.offset < end:
            return False
        end = segment.offset + segment.unit * sizes[segment.axis]
    return end <= parameter.shape[parameter.dim]


def check_snapshot(facts: Facts) -> Iterator[Finding]:
    """Ids are unique, holdings and replicas lie inside the model."""
    gpus = [gpu.id for instance in facts.world.instances for gpu in instance.gpus]
    for what, names in (
        ("instances", [instance.id for instance in facts.world.instances]),
        ("gpus", gpus),
        ("replicas", [replica.id for replica in facts.world.replicas]),
        ("holdings", [holding.gpu for holding in facts.world.holdings]),
        ("target.replicas", [replica.id for replica in facts.plan.target.replicas]),
        ("requests", [request.request for request in facts.plan.snapshot.requests]),
    ):
        if len(set(names)) < len(names):
            yield _corrupt(f"snapshot.{what}", f"{what} are not each named once")
    for number, holding in enumerate(facts.world.holdings):
        for shard in holding.shards:
            if not _inside(facts, shard):
                message = f"{holding.gpu} holds a shard outside the model"
                yield _corrupt(f"snapshot.world.holdings[{number}]", message)
    for number, replica in enumerate(facts.world.replicas):
        if not well_formed(facts, replica):
            yield _corrupt(f"snapshot.world.replicas[{number}]", f"{replica.id} is not a replica of this model")


def most_ranks(model: ModelSpec) -> int:
    """The largest tensor degree: no axis that is dealt out has fewer chunks."""
    return min((len(axis.chunks) for axis in model.axes if axis.cover_of is None), default=1)


def _inside(facts: Facts, shard: Shard) -> bool:
    return (
        0 <= shard.layers[0] <= shard.layers[1] <= facts.model.num_layers
        and 1 <= shard.tensor <= most_ranks(facts.model)
        and 0 <= shard.rank < shard.tensor
    )


def well_formed(facts: Facts, replica: Replica) -> bool:
    """Stages in layer order inside the model, one tensor degree that the model allows."""
    runs = [stage.layers for stage in replica.stages]
    degrees = {len(stage.gpus) for stage in replica.stages}
    return (
        runs == sorted(runs)
        and all(0 <= start < stop <= facts.model.num_layers for start, stop in runs)
        and len(degrees) == 1
        and 1 <= degrees.copy().pop() <= most_ranks(facts.model)
    )


def _corrupt(path: str, message: str) -> Finding:
    return Finding(code="corrupt", path=path, message=message)
