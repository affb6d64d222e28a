"""A journal replayed: folded entry by entry, compared with its own fold snapshots and with what would be decided now.

A fold calls only `apply` with the recorded commands, so it leads to the same state for ever. Decisions are compared
where they were taken under the policy version of this program: another version may decide otherwise, and does not have
to explain itself (design section 6, P7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

from pydantic import BaseModel

from spotserve.core.commands import Command
from spotserve.core.controller import Entry, apply
from spotserve.core.decide import decide
from spotserve.core.spec import POLICY_VERSION
from spotserve.core.state import ClusterState
from spotserve.core.strict_json import path_text, shown
from spotserve.errors import SpotServeError, StateDirError

FOLD_FAULTS = (
    *(SpotServeError, AssertionError, AttributeError, ArithmeticError, LookupError, TypeError, ValueError),
    RecursionError,
)
"""What `apply` and `decide` raise of entries that no daemon wrote."""

SHOWN_WIDTH = 160


class Moment(NamedTuple):
    """An entry between the state before it and the state after it."""

    before: ClusterState
    entry: Entry
    after: ClusterState


def moments(state: ClusterState, entries: Iterable[Entry], *, until_s: float | None = None) -> Iterator[Moment]:
    """Fold the entries one by one, those after `until_s` left out.

    Raises StateDirError with the position of an entry that cannot follow.
    """
    for entry in entries:
        if until_s is not None and entry.event.at_s > until_s:
            return
        try:
            after = apply(state, entry.event, entry.commands)
        except FOLD_FAULTS as error:
            raise _cannot_follow(entry, "be folded", error) from error
        yield Moment(state, entry, after)
        state = after


def _cannot_follow(entry: Entry, what: str, error: Exception) -> StateDirError:
    reason = shown(f"{type(error).__name__}: {error}".removesuffix(": "), SHOWN_WIDTH)
    return StateDirError(
        f"entry {entry.sequence} ({entry.event.kind}) cannot {what}: {reason}",
        hint="no daemon of this version writes such an entry; replay --until tells what was before it",
    )


class Mismatch(NamedTuple):
    """Where two values differ, as a JSON path, and what each of them has there."""

    path: str
    recorded: str
    found: str


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that a replay does not find as recorded."""

    kind: str
    """`commands` for a decision, `state` for a fold snapshot."""
    sequence: int
    event: str
    mismatch: Mismatch
    recorded_commands: tuple[str, ...] = ()
    decided_commands: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for a person."""
        where, recorded, found = self.mismatch
        if self.kind == "state":
            return (
                f"entry {self.sequence} ({self.event}): folds to another state than the snapshot after it:"
                f" {where} was {recorded}, is {found}"
            )
        return (
            f"entry {self.sequence} ({self.event}): decided otherwise than recorded: {where} was {recorded}, is {found}"
        )


@dataclass(slots=True)
class Comparison:
    """What a replay has compared so far. Feed it every moment, in order.

    Args:
        snapshots: bodies of the journal's fold snapshots (parsed JSON, hence `Any`), by the entry each one is after.
    """

    snapshots: Mapping[int, Any]
    num_entries: int = 0
    num_compared: int = 0
    """Entries whose decisions were compared."""
    num_differing: int = 0
    """Of those, the ones that were decided otherwise."""
    num_snapshots: int = 0
    """Fold snapshots that were compared."""
    num_snapshots_differing: int = 0
    difference: Difference | None = None
    versions: list[int] = field(default_factory=list)
    """Every policy version that decided, in order."""

    def take(self, moment: Moment) -> None:
        """Compare one entry, and the state after it if a snapshot was taken there."""
        entry = moment.entry
        version = moment.after.policy_version
        self.num_entries += 1
        if version not in self.versions:
            self.versions.append(version)
        if version == POLICY_VERSION:
            self.num_compared += 1
            self.num_differing += self._note(compare_commands(moment.before, entry))
        if entry.sequence in self.snapshots:
            self.num_snapshots += 1
            self.num_snapshots_differing += self._note(compare_state(self.snapshots[entry.sequence], moment))

    @property
    def verdict(self) -> str:
        """What can be said of the decisions: `same`, `differ`, `partly_compared` or `not_compared`."""
        if self.num_differing:
            return "differ"
        if self.num_compared == self.num_entries:
            return "same"
        return "partly_compared" if self.num_compared else "not_compared"

    def _note(self, difference: Difference | None) -> bool:
        """Keep the first difference; whether this is one."""
        self.difference = self.difference or difference
        return difference is not None


def compare_commands(before: ClusterState, entry: Entry) -> Difference | None:
    """Decide again and say where that is not what was recorded. Raises StateDirError if nothing can be decided."""
    try:
        decided = decide(before, entry.event)
    except FOLD_FAULTS as error:
        raise _cannot_follow(entry, "be decided again", error) from error
    if decided == entry.commands:
        return None
    return Difference(
        kind="commands",
        sequence=entry.sequence,
        event=entry.event.kind,
        mismatch=_first_command(entry.commands, decided),
        recorded_commands=tuple(command.kind for command in entry.commands),
        decided_commands=tuple(command.kind for command in decided),
    )


def _first_command(recorded: tuple[Command, ...], decided: tuple[Command, ...]) -> Mismatch:
    """The first command that differs, and where in it."""
    for index, (old, new) in enumerate(zip_longest(recorded, decided)):
        if old is None or new is None or old.kind != new.kind:
            missing = "no command"
            path = f"commands[{index}]"
            return Mismatch(path, missing if old is None else old.kind, missing if new is None else new.kind)
        found = mismatch(old.model_dump(mode="json"), new.model_dump(mode="json"), ("commands", index))
        if found is not None:
            return found
    raise AssertionError("two different values without a difference")


def compare_state(recorded: Any, moment: Moment) -> Difference | None:
    """Say where a fold snapshot (parsed JSON, hence `Any`) is not the state that the entries fold to."""
    found = mismatch(recorded, moment.after, ())
    if found is None:
        return None
    return Difference(kind="state", sequence=moment.entry.sequence, event=moment.entry.event.kind, mismatch=found)


def mismatch(recorded: Any, value: Any, path: tuple[str | int, ...]) -> Mismatch | None:
    """The first place where `value` is not what `recorded` (plain JSON, hence `Any`) says.

    Fields of a model that the record does not have are passed over: they came with a later version. Mappings and
    sequences must have the same keys and lengths.
    """
    if isinstance(value, BaseModel) and isinstance(recorded, Mapping):
        named = {name: getattr(value, name, _Absent) for name in recorded}
        return _first((mismatch(recorded[name], inner, (*path, name)) for name, inner in named.items()))
    if isinstance(value, Mapping) and isinstance(recorded, Mapping):
        names = [*recorded, *(name for name in value if name not in recorded)]
        return _first(mismatch(recorded.get(n, _Absent), value.get(n, _Absent), (*path, n)) for n in names)
    if isinstance(value, tuple | list) and isinstance(recorded, tuple | list):
        pairs = enumerate(zip_longest(recorded, value, fillvalue=_Absent))
        return _first(mismatch(old, new, (*path, index)) for index, (old, new) in pairs)
    if recorded == value and isinstance(recorded, bool) == isinstance(value, bool):
        return None
    return Mismatch(path_text(path), _value_text(recorded), _value_text(value))


def _first(found: Iterable[Mismatch | None]) -> Mismatch | None:
    return next((one for one in found if one is not None), None)


class _Absent:
    """Stands for a value that one side does not have."""


def _value_text(value: Any) -> str:
    """A value in a message: short."""
    if value is _Absent:
        return "absent"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return shown(repr(value), SHOWN_WIDTH)
