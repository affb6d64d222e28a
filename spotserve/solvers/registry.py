"""The solvers by kind and name, as `--solver kind=name` and `ServingSpec.solvers` choose them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from spotserve.core.options import NOT_IN_PLANS, STOPPED, WHILE_SERVING
from spotserve.errors import SpecError
from spotserve.solvers.arrange import ARRANGERS
from spotserve.solvers.configure import BY_PAPER, CHOOSERS, FICKLE
from spotserve.solvers.fleet import FLEETS
from spotserve.solvers.ladder import SELECTORS
from spotserve.solvers.migrate.sources import SOURCE_SOLVERS
from spotserve.solvers.place import PLACERS

SOLVERS: dict[str, tuple[str, ...]] = {
    "configure": (*CHOOSERS, *FICKLE, *BY_PAPER),
    "place": tuple(PLACERS),
    "migrate": SOURCE_SOLVERS,
    "arrange": tuple(ARRANGERS),
    "ladder": tuple(SELECTORS),
    "move": (WHILE_SERVING, STOPPED),
}
LIBRARY_SOLVERS: dict[str, tuple[str, ...]] = {"fleet": tuple(FLEETS)}
"""Solvers that no plan uses, for those who call them: what to buy, where no cloud of this daemon sells."""

DEFAULTS = {
    "configure": "cpsat",
    "place": "makespan",
    "migrate": "layered",
    "arrange": "scan",
    "ladder": "priced",
    "move": WHILE_SERVING,
}
PAPER_DEFAULTS = {
    "configure": "paper",
    "place": "paper",
    "migrate": "paper",
    "arrange": "paper",
    "ladder": "longest_first",
    "move": STOPPED,
}
POLICIES = ("live", "paper", "reroute", "reparallelize")


def chosen_solvers(overrides: Mapping[str, str], *, policy: str = "live") -> dict[str, str]:
    """The solver of each kind: the policy's, or what `overrides` names. Raises SpecError for an unknown one."""
    chosen = dict(PAPER_DEFAULTS if policy == "paper" else DEFAULTS)
    for kind, name in sorted(overrides.items()):
        if kind in LIBRARY_SOLVERS:
            raise SpecError(f"solver kind {kind!r} {NOT_IN_PLANS[kind]}", hint=f"call spotserve.solvers.{kind}")
        require_known("solver kind", kind, tuple(SOLVERS))
        require_known(f"{kind} solver", name, SOLVERS[kind])
        chosen[kind] = name
    return chosen


def require_known(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raise SpecError naming the nearest known name unless `name` is one."""
    if name in known:
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise SpecError(f"{what} {name!r} is not known", hint=hint)
