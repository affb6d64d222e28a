"""The solvers by kind and name, as `--solver kind=name` and `ServingSpec.solvers` choose them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from spotserve.errors import SpecError
from spotserve.solvers.configure import CHOOSERS
from spotserve.solvers.migrate import PREFERENCES
from spotserve.solvers.place import ASSIGNERS

SOLVERS: dict[str, tuple[str, ...]] = {
    "configure": tuple(CHOOSERS),
    "place": tuple(ASSIGNERS),
    "migrate": tuple(PREFERENCES),
}
DEFAULTS = {"configure": "cpsat", "place": "makespan", "migrate": "layered"}
POLICIES = ("live", "reroute", "reparallelize")


def chosen_solvers(overrides: Mapping[str, str]) -> dict[str, str]:
    """The solver of each kind: the default, or what `overrides` names. Raises SpecError for an unknown one."""
    chosen = dict(DEFAULTS)
    for kind, name in sorted(overrides.items()):
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
