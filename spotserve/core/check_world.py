"""The form rules of a plan's spec and snapshot: what every other rule takes for granted, and the bounds that keep a
hostile file from costing more than it weighs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from spotserve.core.finding import Facts, Finding
from spotserve.core.ids import GpuId, instance_of
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Release, Reserve
from spotserve.core.slices import Shard
from spotserve.core.snapshot import ENDED_STATES, Replica
from spotserve.core.spec import ModelSpec, Parameter

MAX_LAYERS = 4096
MAX_PARAMETERS = 4096
MAX_STEPS = 40_000
MAX_TABLE = 2**18
"""Parameters of a model, layer by layer."""

MAX_CELLS = 8_000_000
"""Parameters of all shards in a file, layer by layer: what judging it costs."""

MAX_PAIRS = 16_000_000
"""Pairs of steps that bring content to a GPU or free it there, and steps that read or take there."""

MAX_ID_LENGTH = 128
MIN_RATE, MAX_RATE = 1.0, 1e18
"""Bytes per second of any link or disk; beyond them times are no finite numbers."""


def check_spec(facts: Facts) -> Iterator[Finding]:
    """The parameter table can be cut: known axes, contiguous chunks, segments inside their dimension."""
    model = facts.model
    if model.num_layers > MAX_LAYERS or len(model.parameters) > MAX_PARAMETERS:
        message = f"{model.num_layers} layers and {len(model.parameters)} parameters exceed {MAX_LAYERS}"
        yield _corrupt("spec.model", message)
        return
    profile = facts.plan.spec.profile
    for name in ("link_bytes_per_s", "storage_bytes_per_s"):
        if not MIN_RATE <= getattr(profile, name) <= MAX_RATE:
            message = f"{getattr(profile, name):g} is not between {MIN_RATE:g} and {MAX_RATE:g}"
            yield _corrupt(f"spec.profile.{name}", message)
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
        return
    in_each_layer = sum(parameter.stage == "layer" for parameter in model.parameters)
    extent = model.num_layers * in_each_layer + len(model.parameters) - in_each_layer
    if extent > MAX_TABLE:
        yield _corrupt("spec.model.parameters", f"{extent} parameters of all layers exceed {MAX_TABLE}")
    elif len(facts.table) < extent:
        yield _corrupt("spec.model.parameters", "two parameters have one name")


def _contiguous(chunks: tuple[tuple[int, int], ...], size: int) -> bool:
    position = 0
    for start, stop in chunks:
        if start != position or stop <= start:
            return False
        position = stop
    return position == size


def _well_cut(model: ModelSpec, parameter: Parameter) -> bool:
    sizes = {axis.name: axis.size for axis in model.axes}
    if any(extent < 1 for extent in parameter.shape):
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
        ("snapshot.world.instances", [instance.id for instance in facts.world.instances]),
        ("snapshot.world.instances.gpus", gpus),
        ("snapshot.world.replicas", [replica.id for replica in facts.world.replicas]),
        ("snapshot.world.holdings", [holding.gpu for holding in facts.world.holdings]),
        ("target.replicas", [replica.id for replica in facts.plan.target.replicas]),
        ("snapshot.requests", [request.request for request in facts.plan.snapshot.requests]),
    ):
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            yield _corrupt(what, f"{twice} is there more than once")
        if any(not 0 < len(name) <= MAX_ID_LENGTH for name in names):
            yield _corrupt(what, f"an id is empty or longer than {MAX_ID_LENGTH} characters")
    for number, instance in enumerate(facts.world.instances):
        for gpu in instance.gpus:
            if instance_of(gpu.id) != instance.id:
                yield _corrupt(f"snapshot.world.instances[{number}]", f"{gpu.id} is no GPU of {instance.id}")
    for number, holding in enumerate(facts.world.holdings):
        for shard in holding.shards:
            if not _inside(facts, shard):
                message = f"{holding.gpu} holds a shard outside the model"
                yield _corrupt(f"snapshot.world.holdings[{number}]", message)
        if holding.slices and not facts.in_table(holding.slices):
            message = f"{holding.gpu} holds a slice that the parameter table does not have"
            yield _corrupt(f"snapshot.world.holdings[{number}]", message)
    yield from _costly(facts)
    types = {facts.plan.spec.profile.device, *(device.type for device in facts.plan.spec.profile.devices)}
    for name, gpu_type in facts.world.gpu_types.items():
        if gpu_type not in types:
            message = f"{name} is of type {gpu_type!r}, of which the profile has no times"
            yield _corrupt("spec.profile.devices", message)
    seated: set[GpuId] = set()
    for number, replica in enumerate(facts.world.replicas):
        if not well_formed(facts, replica):
            yield _corrupt(f"snapshot.world.replicas[{number}]", f"{replica.id} is not a replica of this model")
        if any(gpu in seated for gpu in replica.gpus) or len(set(replica.gpus)) < len(replica.gpus):
            yield _corrupt(f"snapshot.world.replicas[{number}]", f"a GPU of {replica.id} sits in two positions")
        seated.update(replica.gpus)


def _costly(facts: Facts) -> Iterator[Finding]:
    """Shards of a size that no cluster has would take hours to judge."""
    shards = [shard.layers for holding in facts.world.holdings for shard in holding.shards]
    for replica in (*facts.world.replicas, *facts.plan.target.replicas):
        shards += [stage.layers for stage in replica.stages for _ in stage.gpus]
    cells = sum(max(0, last - first) for first, last in shards) * len(facts.model.parameters)
    if cells > MAX_CELLS:
        yield _corrupt("snapshot.world", f"{cells} parameters of shards exceed {MAX_CELLS}")
    pairs = _pairs(facts)
    if pairs > MAX_PAIRS:
        yield _corrupt("steps", f"{pairs} pairs of steps on one GPU exceed {MAX_PAIRS}")


def _pairs(facts: Facts) -> int:
    """How often two steps on one GPU have to be compared: what comes or goes there, and what reads or takes there."""
    copies = [copy for _, copy in facts.of(CopyWeights, CopyKv, CopyKvDelta)]
    takes = [step.workers[0] for _, step in facts.of(Reserve, LoadWeights)]
    frees = [step.workers[0] for _, step in facts.of(Release)]
    changes = Counter([*(copy.destination for copy in copies), *takes, *frees])
    uses = Counter([*(copy.source for copy in copies), *(copy.destination for copy in copies), *takes])
    return sum(count * uses[gpu] for gpu, count in changes.items())


def check_membership(facts: Facts) -> Iterator[Finding]:
    """All that a snapshot and an event name is in the snapshot."""
    gpus = {gpu.id for instance in facts.world.instances for gpu in instance.gpus}
    replicas = {replica.id for replica in facts.world.replicas}
    instances = {instance.id for instance in facts.world.instances}
    for number, replica in enumerate(facts.world.replicas):
        for gpu in replica.gpus:
            if gpu not in gpus:
                message = f"{replica.id} sits on {gpu}, which no instance of the snapshot has"
                yield _corrupt(f"snapshot.world.replicas[{number}]", message)
    for number, holding in enumerate(facts.world.holdings):
        if holding.gpu not in gpus:
            message = f"{holding.gpu} holds weights, but no instance of the snapshot has it"
            yield _corrupt(f"snapshot.world.holdings[{number}].gpu", message)
    for number, request in enumerate(facts.plan.snapshot.requests):
        if request.replica is not None and request.replica not in replicas and request.state not in ENDED_STATES:
            message = f"request {request.request} runs on {request.replica}, which is no replica of the snapshot"
            yield _corrupt(f"snapshot.requests[{number}].replica", message)
    for number, name in enumerate(facts.plan.trigger.instances):
        if name not in instances:
            yield _corrupt(f"event.instances[{number}]", f"{name} is no instance of the snapshot")


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
