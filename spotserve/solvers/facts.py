"""What a planning run knows before it decides anything: the problem, looked at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from spotserve.core.cost import PipelineShape, Pool, shape_of
from spotserve.core.ids import GpuId, natural_key
from spotserve.core.plan import PlanningProblem
from spotserve.core.snapshot import Holding, Replica
from spotserve.core.spec import ModelSpec, ServingSpec, weight_copies
from spotserve.solvers.gpu_kinds import types_of
from spotserve.solvers.ranges import Catalog, Ranges
from spotserve.solvers.registry import chosen_solvers
from spotserve.solvers.view import View, kv_tokens, look, requests_of

Shape = TypeVar("Shape", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Facts:
    """The problem, who stays and who goes, what every GPU holds and is, and which solvers were asked for."""

    problem: PlanningProblem
    view: View
    catalog: Catalog
    solvers: Mapping[str, str]
    holdings: Mapping[GpuId, Holding]
    held: Mapping[GpuId, Ranges]
    types: Mapping[GpuId, str]

    @property
    def spec(self) -> ServingSpec:
        """What is served, and within which limits."""
        return self.problem.spec

    @property
    def model(self) -> ModelSpec:
        """The model's parameter table."""
        return self.problem.spec.model

    @property
    def copies(self) -> int:
        """How often weights take memory."""
        return weight_copies(self.problem.spec.linear)

    @property
    def mixed(self) -> bool:
        """Whether a GPU that stays is of another type than the profile's own."""
        return any(self.types[gpu] for gpu in self.view.staying)

    @property
    def policy(self) -> str:
        """The policy that decides."""
        return self.problem.spec.policy

    def shape_of(self, replica: Replica) -> PipelineShape:
        """A replica's stages, each with its layers and GPU type."""
        return shape_of(replica, self.types, self.spec.profile)

    def pools_of(self, replicas: Iterable[Replica]) -> tuple[Pool, ...]:
        """Replicas by shape, as the cost model takes them."""
        same: dict[PipelineShape, list[Replica]] = {}
        for replica in replicas:
            same.setdefault(self.shape_of(replica), []).append(replica)
        return tuple(Pool(shape, len(group), min(one.max_running for one in group)) for shape, group in same.items())

    def idle(self, untouched: tuple[Replica, ...]) -> tuple[GpuId, ...]:
        """The GPUs that stay and that no `untouched` replica uses."""
        used = {gpu for replica in untouched for gpu in replica.gpus}
        return tuple(gpu for gpu in self.view.staying if gpu not in used)

    def kept(self, shapes: Iterable[Shape], key: Callable[[Replica], Shape]) -> tuple[Replica, ...]:
        """The intact replicas that a target of these shapes keeps: of each shape at most as many as are named.

        Those with the most KV are kept first; the answer is in natural order.
        """
        left = Counter(shapes)
        kept = []
        for replica in sorted(self.view.intact, key=lambda r: (-self.progress(r), natural_key(r.id))):
            shape = key(replica)
            if left[shape]:
                left[shape] -= 1
                kept.append(replica)
        return tuple(sorted(kept, key=lambda r: natural_key(r.id)))

    def progress(self, replica: Replica) -> int:
        """Tokens of a replica's requests whose KV is in place."""
        return sum(kv_tokens(request) for request in requests_of(self.problem, replica.id))

    def affected(self, untouched: tuple[Replica, ...]) -> tuple[Replica, ...]:
        """The replicas that run and are not `untouched`, in natural order."""
        kept = {replica.id for replica in untouched}
        replicas = sorted(self.problem.snapshot.world.replicas, key=lambda r: natural_key(r.id))
        return tuple(replica for replica in replicas if replica.id not in kept)


def gather(problem: PlanningProblem) -> Facts:
    """The facts of a problem. Raises SpecError for an unknown solver or GPU type."""
    catalog = Catalog(problem.spec.model)
    holdings = {holding.gpu: holding for holding in problem.snapshot.world.holdings}
    return Facts(
        problem=problem,
        view=look(problem),
        catalog=catalog,
        solvers=chosen_solvers(problem.spec.solvers, policy=problem.spec.policy),
        holdings=holdings,
        held={gpu: catalog.held(holding) for gpu, holding in sorted(holdings.items())},
        types=types_of(problem.snapshot.world, problem.spec.profile),
    )
