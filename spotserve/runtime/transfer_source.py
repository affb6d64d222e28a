"""What a worker gives to peers that pull: ranges of weights, the list of its KV, and KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.frozen import Frozen
from spotserve.core.ids import ReplicaId, RequestId
from spotserve.errors import InvariantError, TransferError
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.transfer import TransferReply
from spotserve.runtime.weights import WeightStore


class WeightsRequest(Frozen):
    """Ranges of parameters: (parameter, dim, start, stop)."""

    op: str
    slices: tuple[tuple[str, int, int, int], ...]


class KvListRequest(Frozen):
    """The sequences of a replica generation."""

    op: str
    replica: ReplicaId
    generation: int


class KvRequest(Frozen):
    """Blocks of a rectangle: (request, choice, kv_generation, block, tokens of the block)."""

    op: str
    replica: ReplicaId
    generation: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    blocks: tuple[tuple[str, int, int, int, int], ...]


_REQUESTS: Mapping[str, TypeAdapter[WeightsRequest] | TypeAdapter[KvListRequest] | TypeAdapter[KvRequest]] = {
    "weights": TypeAdapter(WeightsRequest),
    "kv_list": TypeAdapter(KvListRequest),
    "kv": TypeAdapter(KvRequest),
}


class TransferSource:
    """Answers transfer requests from what this worker holds now; runs on the connections' threads."""

    def __init__(
        self, *, weights: Callable[[], WeightStore | None], kv: Callable[[ReplicaId, int], KvStore | None]
    ) -> None:
        self._weights = weights
        self._kv = kv

    def answer(self, grant_id: str, request: dict[str, object]) -> TransferReply:
        """The reply to one request.

        Raises:
            TransferError: malformed, or not held here.
        """
        adapter = _REQUESTS.get(str(request.get("op")))
        if adapter is None:
            raise TransferError(f"transfer request {request.get('op')!r} is not known")
        try:
            # JSON arrays are lists; the strict models behind tuples take them in lax mode only.
            value = adapter.validate_python(request)
        except ValidationError as error:
            raise TransferError(f"transfer request {request.get('op')!r} is malformed") from error
        if isinstance(value, WeightsRequest):
            return self._give_weights(value)
        if isinstance(value, KvListRequest):
            return self._list_kv(value)
        return self._give_kv(value)

    def _give_weights(self, request: WeightsRequest) -> TransferReply:
        weights = self._weights()
        if weights is None:
            raise TransferError("this worker holds no weights")
        try:
            return TransferReply(reply={}, buffers=[weights.read_range(*piece) for piece in request.slices])
        except KeyError as error:
            raise TransferError(f"weights {error.args[0]}") from error

    def _list_kv(self, request: KvListRequest) -> TransferReply:
        kv = self._kv_of(request.replica, request.generation)
        return TransferReply(reply={"sequences": [[*key, tokens] for key, tokens in kv.directory().items()]})

    def _give_kv(self, request: KvRequest) -> TransferReply:
        kv = self._kv_of(request.replica, request.generation)
        buffers = [self._block(kv, request, block) for block in request.blocks]
        return TransferReply(
            reply={"present": [buffer is not None for buffer in buffers]},
            buffers=[buffer for buffer in buffers if buffer is not None],
        )

    def _block(self, kv: KvStore, request: KvRequest, block: tuple[str, int, int, int, int]) -> Tensor | None:
        """A block's rectangle, None when the sequence ended, or has not got that far."""
        *key, index, tokens = block
        try:
            exported = kv.export_block(
                SequenceKey(*cast("tuple[RequestId, int, int]", key)),
                index,
                layers=request.layers,
                kv_heads=request.kv_heads,
            )
        except (KeyError, InvariantError):
            return None
        if exported.shape[3] < tokens:
            return None
        return exported[:, :, :, :tokens].contiguous()

    def _kv_of(self, replica: ReplicaId, generation: int) -> KvStore:
        kv = self._kv(replica, generation)
        if kv is None:
            raise TransferError(f"this worker holds no KV of {replica} generation {generation}")
        return kv


class LocalPeer:
    """The worker as a source to itself: the same requests, without a socket."""

    first_byte_s: float | None = None
    """Nothing crosses a link."""

    def __init__(self, source: TransferSource) -> None:
        self._source = source

    def request(
        self,
        request: dict[str, object],
        destinations: Sequence[Tensor] | Callable[[dict[str, object]], Sequence[Tensor]] = (),
        *,
        on_buffer: Callable[[int], None] | None = None,
    ) -> dict[str, object]:
        """Answer and copy."""
        answer = self._source.answer("local", request)
        targets = destinations(answer.reply) if callable(destinations) else destinations
        for index, (target, buffer) in enumerate(zip(targets, answer.buffers, strict=True)):
            assert isinstance(buffer, Tensor)
            target.copy_(buffer.view_as(target))
            if on_buffer is not None:
                on_buffer(index)
        return answer.reply

    def close(self) -> None:
        """Nothing is open."""
