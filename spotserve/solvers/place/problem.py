"""The placement problem: which GPU takes which (replica, stage, rank) position of the new replicas.

What GPUs hold and positions need is said in pieces: weights in runs of layers x runs of the tensor dimension, KV in the
same per old replica. Overlaps of a GPU with a position and contents of a whole instance are then matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spotserve.core.ids import GpuId, InstanceId, instance_of

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

MAX_EXACT = 2**52
"""Sums of bytes below this are exact in the doubles that matrix products use."""


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """Pieces, who holds them and which position needs them.

    Rows of `*_held` are GPUs: those that may be placed, then those that only send. Rows of `*_needed` are the positions
    of one replica, stage by stage, rank by rank. A KV piece is that of the GPU's own old replica.
    """

    weight_bytes: Integers
    weight_held: Flags
    weight_needed: Flags
    kv_token_bytes: Integers
    kv_held: Flags
    kv_needed: Flags
    old_replica: Integers
    """Of each GPU, the number of the old replica whose KV it holds; -1 if none."""
    kv_tokens: Integers
    """Of each old replica, the tokens of its requests that are in place."""
    heir: Integers
    """Of each old replica, the number of the new one that inherits its requests; -1 if none. No two share an heir."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacementProblem:
    """GPUs, the degrees of the new replicas, what is held and needed; byte counts are integers.

    `gpus` may be placed, `senders` (doomed GPUs) only hold; `home[g]` is the present position of a GPU, None if it has
    none; `fits[g][t]` whether old and new contents fit side by side at the t-th position of a replica (a wish, not a
    bound: in_place needs no room).
    """

    gpus: tuple[GpuId, ...]
    senders: tuple[GpuId, ...]
    data: int
    pipeline: int
    tensor: int
    contents: Contents
    home: tuple[int | None, ...]
    fits: Flags

    @property
    def seats(self) -> int:
        """Positions of one replica."""
        return self.pipeline * self.tensor

    @property
    def num_positions(self) -> int:
        """Positions of all new replicas."""
        return self.data * self.seats


@dataclass(frozen=True, slots=True)
class Placement:
    """`gpus[q]` takes position q."""

    gpus: tuple[GpuId, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Overlaps:
    """Bytes that each GPU has of each position: of weights by seat, of KV by seat where its replica's heir sits."""

    weights: Integers
    kv: Integers
    heir: Integers
    """Of each GPU, the new replica that inherits the KV it holds; -1 if none."""
    home: Integers
    """Of each GPU, its present position; -1 if it has none."""
    fits: Flags

    @property
    def most(self) -> int:
        """More than any placement reuses."""
        return (int(self.weights.max(initial=0)) + int(self.kv.max(initial=0))) * (len(self.weights) + 1) + 1

    def reuse(self, rows: Integers, positions: Integers) -> Integers:
        """Bytes that the GPUs `rows` have of `positions`."""
        replica, seat = np.divmod(positions, self.weights.shape[1])
        inherits = self.heir[rows][:, None] == replica[None, :]
        reused: Integers = self.weights[np.ix_(rows, seat)] + inherits * self.kv[np.ix_(rows, seat)]
        return reused

    def at_home(self, rows: Integers, positions: Integers) -> Flags:
        """Which of these pairs are a GPU at its present position."""
        same: Flags = self.home[rows][:, None] == positions[None, :]
        return same

    def room(self, rows: Integers, positions: Integers) -> Flags:
        """Which of these pairs fit beside what is there."""
        fits: Flags = self.fits[np.ix_(rows, positions % self.weights.shape[1])]
        return fits


def overlaps(problem: PlacementProblem) -> Overlaps:
    """What every GPU already has of every position.

    It factorises into weights by seat and KV by (own replica, seat): no matrix of GPUs x positions is built.
    """
    contents, placed = problem.contents, slice(0, len(problem.gpus))
    weights = product(contents.weight_held[placed], contents.weight_needed, contents.weight_bytes)
    per_token = product(contents.kv_held[placed], contents.kv_needed, contents.kv_token_bytes)
    old = contents.old_replica[placed]
    tokens, heir = np.zeros(len(old), np.int64), np.full(len(old), -1, np.int64)
    known = old >= 0
    tokens[known], heir[known] = contents.kv_tokens[old[known]], contents.heir[old[known]]
    home = np.array([-1 if position is None else position for position in problem.home], np.int64)
    return Overlaps(weights, per_token * tokens[:, None], heir, home, problem.fits)


def product(held: Flags, needed: Flags | Integers, num_bytes: Integers) -> Integers:
    """Bytes of the pieces that are in a row of `held` and in a row of `needed`, as often as there, for all pairs."""
    assert int(num_bytes.sum()) < MAX_EXACT, f"{int(num_bytes.sum())} bytes are not exact in doubles"
    return (held.astype(np.float64) @ (needed * num_bytes).astype(np.float64).T).astype(np.int64)


def instances_in_order(gpus: tuple[GpuId, ...]) -> tuple[tuple[InstanceId, ...], Integers]:
    """The instances of some GPUs in order of appearance, and the number of each GPU's one."""
    number: dict[InstanceId, int] = {}
    where = [number.setdefault(instance_of(gpu), len(number)) for gpu in gpus]
    return tuple(number), np.array(where, np.int64)
