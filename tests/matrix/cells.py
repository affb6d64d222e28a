"""Which cells the matrix has: every family in both dtypes, in one process and as a service.

The choice is a function of the seed and the families alone. Engine cells take every (P, M) up to eight ranks. A
service costs seconds per daemon and disturbance, so a family has one daemon per dtype, at degrees in rotation: each
degree meets several families, each family meets every disturbance, half of them in either dtype, and KV moves in both.
The families of `EVERYTHING` are served at every degree; the first of them is disturbed in every way at each, and is
served with prepacked weights as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from spotserve.core.spec import LinearKind

MAX_WORKERS = 8
DTYPES = ("float32", "bfloat16")

Degrees = tuple[int, int, int]

SERVICE_DEGREES: tuple[Degrees, ...] = (
    (1, 2, 1),
    (1, 1, 3),
    (2, 1, 2),
    (1, 2, 2),
    (1, 3, 1),
    (1, 1, 1),
    (2, 2, 1),
    (1, 2, 3),
    (1, 1, 5),
    (2, 2, 2),
)
"""(D, P, M) that daemons are pinned to."""

HALVES = (
    ("notice", "kill", "eviction"),
    ("notice-during-prefill", "short-notice", "coordinator-restart"),
)
"""Disturbances; KV moves in each half."""

EVERY_DISTURBANCE = tuple(name for half in HALVES for name in half)

EVERYTHING = ("llama", "mixtral", "gpt2")
"""The plain family, one with experts, and one with learned positions, biases and names that differ on disk."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One thing to run and to keep the result of; `degrees` are (D, P, M), and None for the engine's all."""

    family: str
    dtype: str
    part: str
    degrees: Degrees | None = None
    linear: LinearKind = "plain"
    disturbances: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """What it is called in options, files and the log."""
        suffix = "" if self.degrees is None else "-d{}p{}m{}".format(*self.degrees)
        kind = "" if self.linear == "plain" else f"-{self.linear}"
        return f"{self.family}-{self.dtype}-{self.part}{suffix}{kind}"

    @property
    def num_workers(self) -> int:
        """Processes that serve."""
        data, pipeline, tensor = self.degrees or (1, 1, 1)
        return data * pipeline * tensor


def engine_degrees() -> list[tuple[int, int]]:
    """Every (P, M) of at most `MAX_WORKERS` ranks."""
    ranks = range(1, MAX_WORKERS + 1)
    return [(pipeline, tensor) for pipeline in ranks for tensor in ranks if pipeline * tensor <= MAX_WORKERS]


def all_cells(families: Sequence[str], *, seed: int) -> list[Cell]:
    """The whole matrix, engine cells first: what they tell needs no daemon to be understood."""
    engine = [Cell(family, dtype, "engine") for dtype in DTYPES for family in families]
    return [*engine, *service_cells(families, seed=seed)]


def service_cells(families: Sequence[str], *, seed: int) -> Iterator[Cell]:
    """Deal degrees and disturbances out to the families, in an order that the seed shuffles."""
    order = list(SERVICE_DEGREES)
    random.Random(seed).shuffle(order)
    num_dealt = 0
    for number, family in enumerate(families):
        if family in EVERYTHING:
            is_first = family == EVERYTHING[0]
            for index, degrees in enumerate(SERVICE_DEGREES):
                # Halves change places at half the pace of the dtypes, so that each dtype meets both.
                played = EVERY_DISTURBANCE if is_first else HALVES[index // 2 % 2]
                yield Cell(family, DTYPES[(index + number) % 2], "service", degrees, "plain", played)
            if is_first:
                # Where copies of the weights have room, KV pools are so large that nobody is evicted.
                others = tuple(name for name in EVERY_DISTURBANCE if name != "eviction")
                for dtype, degrees in zip(DTYPES, SERVICE_DEGREES, strict=False):
                    yield Cell(family, dtype, "service", degrees, "prepacked", others)
            continue
        for index, dtype in enumerate(DTYPES):
            degrees = order[num_dealt % len(order)]
            num_dealt += 1
            # Once round, the dtypes have changed places, so that each degree meets both.
            yield Cell(family, dtype, "service", degrees, "plain", HALVES[(index + number) % 2])
        num_dealt += num_dealt % len(order) == 0
