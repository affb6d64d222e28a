"""GPU types by name: which ones a profile has times of, and which of them a device's own name means."""

from __future__ import annotations

import difflib
import re

from spotserve.core.spec import Profile
from spotserve.errors import SpecError

OWN = "own"
"""How a person writes the profile's own type, whose name may be long and hold commas."""

WORDS = re.compile(r"[a-z0-9]+")


def type_called(profile: Profile, name: str) -> str:
    """The type of the profile that a name means, empty for the profile's own.

    An empty name and `own` are the profile's own type. A name is that of a type, or has all its words, as the device
    name `NVIDIA A100-SXM4-80GB` has those of the type `a100-80gb`; of several types the one with most words counts.

    Raises:
        SpecError: the profile has no times of such a GPU, or two types fit the name equally well.
    """
    types = ("", *(device.type for device in profile.devices))
    if name in ("", OWN, profile.device):
        return ""
    if name in types:
        return name
    said = _words(name)
    fits = [one for one in types if (words := _words(one or profile.device)) and words <= said]
    longest = max((len(_words(one or profile.device)) for one in fits), default=0)
    best = [one for one in fits if len(_words(one or profile.device)) == longest]
    if len(best) == 1:
        return best[0]
    shown = [one or profile.device for one in types]
    if best:
        raise SpecError(
            f"GPU type {name!r} fits {' and '.join(one or profile.device for one in best)} equally well",
            hint=f"name one of: {'; '.join(shown)}",
        )
    near = difflib.get_close_matches(name, shown, n=1)
    raise SpecError(
        f"GPU type {name!r} has no times in profile {profile.name!r}",
        hint=f"did you mean {near[0]}?" if near else f"known: {'; '.join(shown)}; --gpu-profile adds another one",
    )


def _words(name: str) -> frozenset[str]:
    return frozenset(WORDS.findall(name.lower()))
