"""Who lives while a trace is read: the one judge of what can happen."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from spotserve.core.ids import InstanceId
from spotserve.core.strict_json import shown
from spotserve.errors import SpecError

OUR_ID = re.compile(r"i\d+")


@dataclass(slots=True)
class Fleet:
    """Who lives while a trace is read; the one judge of what can happen."""

    where: str
    living: dict[str, InstanceId] = field(default_factory=dict)
    """Name in the trace -> our id, in order of arrival."""
    deadlines_s: dict[str, float] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    next_index: int = 0
    now_s: float = 0.0

    def advance(self, at_s: float, line: int) -> None:
        """Time goes on to `at_s`: noticed instances whose deadline passed are gone."""
        if at_s < self.now_s:
            self.refuse(line, f"at {at_s:g} s is before the event above it at {self.now_s:g} s", "sort the events")
        self.now_s = at_s
        for name in [name for name, deadline_s in self.deadlines_s.items() if deadline_s <= at_s]:
            self.remove(name)

    def add(self, names: Sequence[str], line: int) -> tuple[InstanceId, ...]:
        """New instances under these names."""
        return tuple(self._add(name, line) for name in names)

    def add_count(self, count: int, line: int) -> tuple[InstanceId, ...]:
        """So many new instances, named by our ids."""
        return tuple(self._add(f"i{self.next_index}", line) for _ in range(count))

    def _add(self, name: str, line: int) -> InstanceId:
        if name in self.living:
            self.refuse(line, f"adds {name!r}, which is living")
        if name in self.gone:
            self.refuse(line, f"adds {name!r} again, and a removed id never returns")
        ours = InstanceId(f"i{self.next_index}")
        if OUR_ID.fullmatch(name) and name != ours:
            self.refuse(line, f"adds {name!r}, and the next id is {ours}", "leave ids away: give a count")
        self.next_index += 1
        self.living[name] = ours
        return ours

    def named(self, names: Sequence[str], line: int) -> tuple[str, ...]:
        """These names, all of them living and none twice."""
        for index, name in enumerate(names):
            if name not in self.living:
                self.refuse(line, f"takes {name!r}, which is not there", f"living: {', '.join(self.living) or 'none'}")
            if name in names[:index]:
                self.refuse(line, f"takes {name!r} twice")
        return tuple(names)

    def oldest(self, count: int, line: int) -> tuple[str, ...]:
        """The `count` that live longest and are not doomed yet."""
        free = [name for name in self.living if name not in self.deadlines_s]
        if len(free) < count:
            self.refuse(line, f"takes {count} instances of {len(free)}")
        return tuple(free[:count])

    def doom(self, names: Sequence[str], grace_s: float) -> tuple[InstanceId, ...]:
        """A notice: the deadline of each can only come nearer."""
        for name in names:
            self.deadlines_s[name] = min(self.now_s + grace_s, self.deadlines_s.get(name, math.inf))
        return tuple(self.living[name] for name in names)

    def remove(self, name: str) -> InstanceId:
        """It is gone."""
        self.deadlines_s.pop(name, None)
        self.gone.add(name)
        return self.living.pop(name)

    def refuse(self, line: int, what: str, hint: str | None = None) -> NoReturn:
        """The event on this line cannot happen."""
        # What a trace calls its instances may be anything.
        raise SpecError(f"{self.where}:{line}: {shown(what)}", hint=None if hint is None else shown(hint))
