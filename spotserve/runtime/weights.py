"""The weight store of one GPU: slices in global coordinates, shared between replica generations.

A slice is held once however many generations reserved it; a new cut that overlaps what is held takes the common part
by a local copy, so only what is really missing is received or loaded. Weights never change once written, so readers
(the engine, transfers to other workers) need no lock while bytes are copied; only the tables are guarded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spotserve.core.slices import Slice, intersect, parameter_of, subtract
from spotserve.core.spec import ModelSpec
from spotserve.errors import InvariantError
from spotserve.runtime.checkpoint import TORCH_DTYPES

Range = tuple[int, int]


@dataclass(slots=True)
class _Piece:
    """One reserved range and the part of it that is written."""

    slice: Slice
    tensor: Tensor | None = None
    references: int = 0
    filled: list[Range] = field(default_factory=list)

    def view(self, start: int, stop: int) -> Tensor:
        assert self.tensor is not None
        return self.tensor.narrow(self.slice.dim, start - self.slice.start, stop - start)


class WeightStore:
    """Holds slices of the parameters of `model` on `device`. Thread-safe."""

    def __init__(self, model: ModelSpec, *, device: str = "cpu") -> None:
        self._model = model
        self._device = device
        self._dtype = TORCH_DTYPES[model.dtype]
        self._lock = threading.RLock()
        self._pieces: dict[str, dict[Slice, _Piece]] = {}

    def reserve(self, slices: Iterable[Slice], *, is_lazy: bool = False) -> None:
        """Hold `slices` (once more): allocate what is new, and copy in what other held slices have of it.

        With `is_lazy` a slice takes its memory when it is first written to or used, or when another slice that has
        part of it goes. Every `reserve` needs its `release`; they count.
        """
        for wanted in slices:
            with self._lock:
                pieces = self._pieces.setdefault(wanted.parameter, {})
                piece = pieces.setdefault(wanted, _Piece(wanted))
                piece.references += 1
                if not is_lazy:
                    self._take_memory(piece)

    def release(self, slices: Iterable[Slice]) -> None:
        """Let go of `slices` once; what nobody holds any more is freed."""
        with self._lock:
            for released in slices:
                pieces = self._pieces.get(released.parameter, {})
                if released not in pieces:
                    raise InvariantError(f"{released} is not held")
                pieces[released].references -= 1
                if not pieces[released].references:
                    self._bequeath(pieces.pop(released))
                if not pieces:
                    del self._pieces[released.parameter]

    def give_up(self, slices: Iterable[Slice], freed: Iterable[Slice]) -> tuple[Slice, ...]:
        """Let go of the ranges `freed` of slices that are held once for the caller; what is left of them.

        The rest of a slice that is cut lives on in what others reserved, else as a slice of its own.
        """
        ranges: dict[tuple[str, int], list[Range]] = {}
        for piece in freed:
            ranges.setdefault((piece.parameter, piece.dim), []).append((piece.start, piece.stop))
        left: list[Slice] = []
        with self._lock:
            for held in slices:
                whole = [(held.start, held.stop)]
                kept = subtract(whole, ranges.get((held.parameter, held.dim), []))
                if kept == whole:
                    left.append(held)
                    continue
                rest = [held.model_copy(update={"start": start, "stop": stop}) for start, stop in kept]
                self.reserve(rest)
                self.release([held])
                left += rest
        return tuple(left)

    def release_doubled(self, slices: Iterable[Slice]) -> tuple[Slice, ...]:
        """Let go of those of `slices` that others hold with all their content; returns the others."""
        left: list[Slice] = []
        with self._lock:
            for held in slices:
                pieces = self._pieces[held.parameter]
                elsewhere = [run for piece in pieces.values() if piece.slice != held for run in _of(piece, held.dim)]
                if pieces[held].references > 1 or not subtract(pieces[held].filled, elsewhere):
                    self.release([held])
                else:
                    left.append(held)
        return tuple(left)

    def missing(self, slices: Iterable[Slice]) -> tuple[Slice, ...]:
        """The ranges of `slices` that are not written yet, after taking over what other slices got meanwhile."""
        with self._lock:
            return tuple(
                Slice(parameter=wanted.parameter, dim=wanted.dim, start=start, stop=stop)
                for wanted in slices
                for start, stop in subtract([(wanted.start, wanted.stop)], self._written(wanted))
            )

    def holdings(self) -> tuple[Slice, ...]:
        """All written ranges, joined, sorted by parameter."""
        with self._lock:
            return tuple(
                Slice(parameter=name, dim=dim, start=start, stop=stop)
                for name in sorted(self._pieces)
                for dim in sorted({piece.slice.dim for piece in self._pieces[name].values()})
                for start, stop in _joined(self._filled(name, dim))
            )

    @property
    def held_bytes(self) -> int:
        """Bytes of memory taken, written or not."""
        with self._lock:
            return sum(
                piece.tensor.numel() * piece.tensor.element_size()
                for pieces in self._pieces.values()
                for piece in pieces.values()
                if piece.tensor is not None
            )

    def taken(self) -> tuple[Slice, ...]:
        """Every slice that has memory."""
        with self._lock:
            pieces = [piece for pieces in self._pieces.values() for piece in pieces.values()]
            return tuple(piece.slice for piece in pieces if piece.tensor is not None)

    def range_shape(self, piece: Slice) -> tuple[int, ...]:
        """The shape of the tensor that `read_range` gives and `write_range` takes."""
        shape = list(parameter_of(self._model, piece.parameter).shape)
        shape[piece.dim] = piece.stop - piece.start
        return tuple(shape)

    def read_range(self, parameter: str, dim: int, start: int, stop: int) -> Tensor:
        """A contiguous tensor of a written range: a view where memory allows, else a copy. Never write to it.

        Raises:
            KeyError: part of the range is not held here (any more).
        """
        sources = self._sources(parameter, dim, start, stop)
        if len(sources) == 1:
            return sources[0].contiguous()
        return torch.cat(sources, dim=dim)

    def write_range(self, parameter: str, dim: int, start: int, stop: int, tensor: Tensor) -> None:
        """Write a range into every held slice that has part of it, and mark it written there.

        What is written already is left alone: it is the same, and somebody may be reading it.
        """
        with self._lock:
            targets = [
                piece
                for piece in self._pieces.get(parameter, {}).values()
                if piece.slice.dim == dim and piece.slice.start < stop and start < piece.slice.stop
            ]
            for piece in targets:
                self._take_memory(piece)
        for piece in targets:
            wanted = intersect([(start, stop)], [(piece.slice.start, piece.slice.stop)])
            for low, high in subtract(wanted, list(piece.filled)):
                piece.view(low, high).copy_(tensor.narrow(dim, low - start, high - low))
                self._mark(piece, (low, high))

    def landing_place(self, piece: Slice) -> Tensor | None:
        """The unwritten memory of a range, to be received into and then told by `mark_written`.

        None where it is not one contiguous run of memory, or no reserved slice has all of it: then receive elsewhere
        and `write_range`. What lands there is nobody's until it is marked, so a transfer may break off at any byte.
        """
        with self._lock:
            for held in self._pieces.get(piece.parameter, {}).values():
                is_inside = held.slice.start <= piece.start and piece.stop <= held.slice.stop
                if held.slice.dim != piece.dim or not is_inside:
                    continue
                self._take_memory(held)
                if intersect([(piece.start, piece.stop)], held.filled):
                    continue
                place = held.view(piece.start, piece.stop)
                return place if place.is_contiguous() else None
        return None

    def mark_written(self, piece: Slice, place: Tensor) -> None:
        """The range has landed in `place`; other held slices with a part of it get theirs."""
        with self._lock:
            for held in self._pieces.get(piece.parameter, {}).values():
                is_inside = held.slice.start <= piece.start and piece.stop <= held.slice.stop
                if held.slice.dim != piece.dim or not is_inside or held.tensor is None:
                    continue
                if held.view(piece.start, piece.stop).data_ptr() == place.data_ptr():
                    self._mark(held, (piece.start, piece.stop))
        self.write_range(piece.parameter, piece.dim, piece.start, piece.stop, place)

    def tensor(self, piece: Slice) -> Tensor:
        """The whole tensor of a reserved and fully written slice, as the engine multiplies with it.

        Raises:
            InvariantError: it is not reserved, or not all written.
        """
        with self._lock:
            held = self._pieces.get(piece.parameter, {}).get(piece)
            tensor = None if held is None else self._take_memory(held)
            if held is None or tensor is None or subtract([(piece.start, piece.stop)], held.filled):
                raise InvariantError(f"{piece} is not fully held")
            return tensor

    def _take_memory(self, piece: _Piece) -> Tensor:
        """The piece's tensor; a new one begins with what other pieces have of it."""
        if piece.tensor is None:
            piece.tensor = torch.empty(self.range_shape(piece.slice), dtype=self._dtype, device=self._device)
            self._fill_locally(piece)
        return piece.tensor

    def _bequeath(self, gone: _Piece) -> None:
        """Whoever counted on a piece that goes takes over its content."""
        for heir in self._pieces[gone.slice.parameter].values():
            run = (heir.slice.start, heir.slice.stop)
            missing = subtract(intersect([run], gone.filled), heir.filled) if heir.slice.dim == gone.slice.dim else []
            if missing:
                self._take_memory(heir)
            for start, stop in subtract(missing, heir.filled):
                heir.view(start, stop).copy_(gone.view(start, stop))
                self._mark(heir, (start, stop))

    def _fill_locally(self, piece: _Piece) -> None:
        for other in self._pieces[piece.slice.parameter].values():
            if other is piece or other.slice.dim != piece.slice.dim:
                continue
            common = intersect([(piece.slice.start, piece.slice.stop)], other.filled)
            for start, stop in subtract(common, piece.filled):
                piece.view(start, stop).copy_(other.view(start, stop))
                self._mark(piece, (start, stop))

    def _mark(self, piece: _Piece, written: Range) -> None:
        with self._lock:
            piece.filled = _joined([*piece.filled, written])

    def _written(self, wanted: Slice) -> list[Range]:
        """What is written of a slice; of one that is not reserved or has no memory yet, what the others have."""
        piece = self._pieces.get(wanted.parameter, {}).get(wanted)
        if piece is None or piece.tensor is None:
            return self._filled(wanted.parameter, wanted.dim)
        self._fill_locally(piece)
        return piece.filled

    def _filled(self, parameter: str, dim: int) -> list[Range]:
        return [written for piece in self._pieces.get(parameter, {}).values() for written in _of(piece, dim)]

    def _sources(self, parameter: str, dim: int, start: int, stop: int) -> list[Tensor]:
        """Views that make up [start, stop) in order, as few as possible."""
        found: list[Tensor] = []
        position = start
        with self._lock:
            while position < stop:
                reach, best = position, None
                for piece in self._pieces.get(parameter, {}).values():
                    for low, high in piece.filled:
                        if piece.slice.dim == dim and low <= position < high and min(high, stop) > reach:
                            reach, best = min(high, stop), piece
                if best is None:
                    raise KeyError(f"{parameter} [{position}, {stop}) along {dim} is not held")
                found.append(best.view(position, reach))
                position = reach
        return found


def _of(piece: _Piece, dim: int) -> list[Range]:
    """What is written of a piece along a dimension."""
    return piece.filled if piece.slice.dim == dim else []


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """Sorted, with touching and overlapping ranges made one."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
