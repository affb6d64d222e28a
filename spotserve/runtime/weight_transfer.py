"""Brings weight slices into a worker's store: from a peer, or from the model folder when no holder is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from spotserve.core.slices import Slice
from spotserve.runtime.checkpoint import TORCH_DTYPES
from spotserve.runtime.holdings import Holdings
from spotserve.runtime.kv_migration import Peer
from spotserve.runtime.transfer import TransferInterruptedError
from spotserve.runtime.weights import WeightStore

_MAX_REQUEST_BYTES = 64 << 20
_MAX_REQUEST_SLICES = 1024


def load_slices(held: Holdings, slices: Sequence[Slice]) -> int:
    """Read from the model folder what of `slices` is not here; returns the bytes read."""
    checkpoint = held.checkpoint()
    num_bytes = 0
    for piece in held.weights.missing(slices):
        tensor = checkpoint.read(piece)
        held.weights.write_range(piece.parameter, piece.dim, piece.start, piece.stop, tensor)
        num_bytes += tensor.nbytes
    return num_bytes


def pull_slices(held: Holdings, peer: Peer, slices: Sequence[Slice]) -> int:
    """Pull from a peer what of `slices` is not here; returns the verified bytes.

    A transfer that breaks off is tried once more, from the last verified slice.

    Raises:
        TransferError: the peer is gone, or does not hold a slice.
    """
    weights, dtype = held.weights, TORCH_DTYPES[held.spec.model.dtype]
    num_bytes = 0
    for batch in _batches(weights, dtype, weights.missing(slices)):
        try:
            num_bytes += _pull(weights, dtype, peer, batch)
        except TransferInterruptedError as error:
            verified = batch[: error.num_buffers_verified]
            num_bytes += sum(_bytes_of(weights, dtype, piece) for piece in verified)
            num_bytes += _pull(weights, dtype, peer, batch[error.num_buffers_verified :])
    return num_bytes


def _pull(weights: WeightStore, dtype: torch.dtype, peer: Peer, batch: Sequence[Slice]) -> int:
    # Straight into the store where its memory allows: a copy would touch every byte, and every new page, twice.
    places = [weights.landing_place(piece) for piece in batch]
    tensors = [
        torch.empty(weights.range_shape(piece), dtype=dtype) if place is None else place
        for piece, place in zip(batch, places, strict=True)
    ]

    def written(index: int) -> None:
        piece, place = batch[index], places[index]
        if place is None:
            weights.write_range(piece.parameter, piece.dim, piece.start, piece.stop, tensors[index])
        else:
            weights.mark_written(piece, place)

    peer.request(
        {"op": "weights", "slices": [[p.parameter, p.dim, p.start, p.stop] for p in batch]}, tensors, on_buffer=written
    )
    return sum(tensor.nbytes for tensor in tensors)


def _batches(weights: WeightStore, dtype: torch.dtype, slices: Sequence[Slice]) -> Iterator[list[Slice]]:
    """Requests of bounded size."""
    batch: list[Slice] = []
    num_bytes = 0
    for piece in slices:
        batch.append(piece)
        num_bytes += _bytes_of(weights, dtype, piece)
        if num_bytes >= _MAX_REQUEST_BYTES or len(batch) >= _MAX_REQUEST_SLICES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _bytes_of(weights: WeightStore, dtype: torch.dtype, piece: Slice) -> int:
    return prod(weights.range_shape(piece)) * dtype.itemsize
