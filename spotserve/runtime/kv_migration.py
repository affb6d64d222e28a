"""Moves KV between two replica generations while the old one decodes: a follower of filled blocks, then the delta.

A full block never changes, so a destination keeps asking the source which blocks of its rectangle (layers x kv heads)
are full and pulls the new ones. After the quiesce the manifest says how far each choice got, and only the last blocks
are left to bring. What came in belongs to nobody until its replica adopts it: a serving engine that needs the room may
drop it, the adoption notices, and the choice is prefilled again. Nothing here ever waits for the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.plan import KvRoute
from spotserve.core.spec import KV_BLOCK_TOKENS
from spotserve.core.wire import ChoicePosition
from spotserve.errors import TransferError
from spotserve.log import get_logger
from spotserve.runtime.kv_store import KvStore, OutOfBlocks
from spotserve.runtime.transfer import TransferInterruptedError

FOLLOW_POLL_S = 0.02
_MAX_REQUEST_BYTES = 8 << 20
_MAX_REQUEST_BLOCKS = 256

log = get_logger("kv_migration")


class Peer(Protocol):
    """A source to ask; `TransferClient` is one, the worker itself another."""

    first_byte_s: float | None
    """Monotonic time at which the first transfer chunk was here."""

    def request(
        self,
        request: dict[str, object],
        destinations: Sequence[Tensor] | Callable[[dict[str, object]], Sequence[Tensor]] = (),
        *,
        on_buffer: Callable[[int], None] | None = None,
    ) -> dict[str, object]:
        """Ask, fill the destinations, return the reply."""

    def close(self) -> None:
        """Wake a blocked request and end."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Layers x kv heads, in global coordinates."""

    layers: tuple[int, int]
    kv_heads: tuple[int, int]

    def cells(self) -> set[tuple[int, int]]:
        """Every (layer, kv head) in it."""
        return {(layer, head) for layer in range(*self.layers) for head in range(*self.kv_heads)}


class IncomingKv:
    """The sequences of one KV store that were copied in and not adopted yet.

    Every write is under the lock that freeing takes, so no block is written after it was given to another sequence.
    """

    def __init__(self, kv: KvStore) -> None:
        self.kv = kv
        self._lock = threading.Lock()
        # In order of arrival; for each rectangle the tokens, from the first on, that are in place.
        self._keys: dict[SequenceKey, dict[Rectangle, int]] = {}
        self._adopted: set[SequenceKey] = set()

    def write(self, key: SequenceKey, rectangle: Rectangle, block_index: int, tensor: Tensor) -> bool:
        """Write the next block of a sequence's rectangle; False when there is no room, or the engine has it by now."""
        stop = block_index * KV_BLOCK_TOKENS + int(tensor.shape[3])
        with self._lock:
            if key in self._adopted:
                return False
            try:
                self.kv.extend(key, stop)
            except OutOfBlocks:
                return False
            covered = self._keys.setdefault(key, {})
            self.kv.import_block(key, block_index, tensor, layers=rectangle.layers, kv_heads=rectangle.kv_heads)
            covered[rectangle] = stop
            return True

    def tokens_in(self, key: SequenceKey, rectangle: Rectangle) -> int:
        """Tokens of the sequence that are in place in a rectangle; 0 once an engine short of blocks dropped it."""
        with self._lock:
            return self._keys.get(key, {}).get(rectangle, 0)

    def drop(self, keys: Iterable[SequenceKey]) -> None:
        """Free sequences that nobody adopted."""
        with self._lock:
            for key in keys:
                if self._keys.pop(key, None) is not None:
                    self.kv.free(key)

    def take_blocks(self, needs: Sequence[tuple[SequenceKey, int]]) -> None:
        """Grow the engine's sequences to these tokens; the latest arrivals go for it, serving comes before moving in.

        All of it under the lock that arrivals take, so that none of them takes the room that was just made.

        Raises:
            OutOfBlocks: even without arrivals the pool is too small.
        """
        with self._lock:
            short = sum(self.kv.blocks_short(key, kv_tokens) for key, kv_tokens in needs)
            while self._keys and self.kv.num_free < short:
                key, _ = self._keys.popitem()
                self.kv.free(key)
            for key, kv_tokens in needs:
                self.kv.extend(key, kv_tokens)

    def adopt(self, sequences: Iterable[tuple[SequenceKey, int]], *, is_exclusive: bool) -> tuple[SequenceKey, ...]:
        """Hand sequences to the engine; returns those whose KV is not complete, which are freed.

        With `is_exclusive` everything else in the store is freed.
        """
        wanted = dict(sequences)
        missing = []
        with self._lock:
            for key, kv_tokens in wanted.items():
                is_complete = self._is_complete(key, kv_tokens)
                self._keys.pop(key, None)
                self._adopted.add(key)
                if is_complete:
                    self.kv.fill(key, kv_tokens)
                else:
                    missing.append(key)
                    self.kv.free(key)
            for key in list(self.kv.directory()) if is_exclusive else []:
                if key not in wanted:
                    self._keys.pop(key, None)
                    self.kv.free(key)
        return tuple(missing)

    def free(self, key: SequenceKey) -> None:
        """The engine is done with a sequence of its own."""
        with self._lock:
            self._adopted.discard(key)
            self.kv.free(key)

    def _is_complete(self, key: SequenceKey, kv_tokens: int) -> bool:
        covered = self._keys.get(key)
        if covered is None:
            return self.kv.kv_tokens(key) >= kv_tokens
        cells = set[tuple[int, int]]()
        for rectangle, tokens in covered.items():
            if tokens >= kv_tokens:
                cells |= rectangle.cells()
        return cells == Rectangle(self.kv.layers, self.kv.kv_heads).cells()


class KvFollower:
    """Copies one rectangle of one route, from `start` to `finish` or `abandon`."""

    def __init__(
        self, *, peer: Peer, route: KvRoute, source_generation: int, incoming: IncomingKv, is_local: bool = False
    ) -> None:
        self.is_caught_up = threading.Event()
        self.bytes_verified = 0
        self._bytes_taken = 0
        self.error: str | None = None
        self._peer = peer
        self._from: tuple[ReplicaId, int] = (route.from_replica, source_generation)
        self._rectangle = Rectangle(route.layers, route.kv_heads)
        self._incoming = incoming
        self._is_local = is_local
        self._brought: dict[SequenceKey, None] = {}
        self._crowded_out: set[SequenceKey] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def first_byte_s(self) -> float | None:
        """When the first transfer chunk came, if one has."""
        return self._peer.first_byte_s

    def take_bytes(self) -> int:
        """Bytes verified since the last call: `copy_kv` and its delta each report their own."""
        num_bytes = self.bytes_verified
        taken, self._bytes_taken = num_bytes - self._bytes_taken, num_bytes
        return taken

    def start(self) -> None:
        """Follow on a thread of its own; asked again (a restarted coordinator does) it goes on."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._follow, name="kv-follower", daemon=True)
        self._thread.start()

    def finish(self, manifest: Sequence[ChoicePosition]) -> list[tuple[str, int]]:
        """Bring what the manifest names and is not here, drop what it does not name.

        Returns:
            (request, choice) of each whose KV is not complete in this rectangle.
        """
        self._stop_following()
        wanted = {
            SequenceKey(item.request, item.choice, item.kv_generation): item.kv_tokens
            for item in manifest
            if item.kv_tokens > 0
        }
        self._incoming.drop(key for key in self._brought if key not in wanted)
        try:
            self._pull(wanted)
        except TransferError as error:
            self.error = error.message
            log.warning("kv_delta_failed", reason=error.message)
        return [
            (key.request, key.choice)
            for key, kv_tokens in wanted.items()
            if self._incoming.tokens_in(key, self._rectangle) < kv_tokens
        ]

    def abandon(self) -> None:
        """The plan was aborted: stop, and free what nobody adopted."""
        self._stopping.set()
        self._peer.close()
        self._stop_following()
        self._incoming.drop(self._brought)

    def close(self) -> None:
        """End the connection to the source."""
        self._stopping.set()
        self._peer.close()

    def _stop_following(self) -> None:
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._stopping.is_set():
                full = self._full_blocks()
                if self._is_within_one_block(full):
                    self.is_caught_up.set()
                self._pull({key: count * KV_BLOCK_TOKENS for key, count in full.items()})
                self._stopping.wait(FOLLOW_POLL_S)
        except TransferError as error:
            # The delta dials again and brings the rest, or reports it missing.
            self.error = error.message
            log.warning("kv_follow_failed", reason=error.message)
        finally:
            self.is_caught_up.set()

    def _full_blocks(self) -> dict[SequenceKey, int]:
        """What the source has: full blocks of each of its sequences."""
        replica, generation = self._from
        reply = self._peer.request({"op": "kv_list", "replica": replica, "generation": generation})
        listed = reply.get("sequences")
        if not isinstance(listed, list):
            raise TransferError("the source's list of KV is not a list")
        return {
            SequenceKey(RequestId(str(request)), int(choice), int(kv_generation)): int(kv_tokens) // KV_BLOCK_TOKENS
            for request, choice, kv_generation, kv_tokens in listed
        }

    def _is_within_one_block(self, full: dict[SequenceKey, int]) -> bool:
        return all(
            count * KV_BLOCK_TOKENS - self._tokens_in(key) <= KV_BLOCK_TOKENS
            for key, count in full.items()
            if key not in self._crowded_out
        )

    def _tokens_in(self, key: SequenceKey) -> int:
        return self._incoming.tokens_in(key, self._rectangle)

    def _pull(self, wanted: dict[SequenceKey, int]) -> None:
        """Bring each sequence up to its wanted tokens, in requests of bounded size."""
        batch: list[tuple[SequenceKey, int, int]] = []
        num_bytes = 0
        for key, kv_tokens in wanted.items():
            here = self._tokens_in(key)
            if here == 0 and key in self._brought:
                self._crowded_out.add(key)
            if key in self._crowded_out and not self._stopping.is_set():
                continue  # The engine there needs the room; once more at the delta.
            for block in range(here // KV_BLOCK_TOKENS, -(-kv_tokens // KV_BLOCK_TOKENS)):
                tokens = min(KV_BLOCK_TOKENS, kv_tokens - block * KV_BLOCK_TOKENS)
                batch.append((key, block, tokens))
                num_bytes += self._block_bytes(tokens)
                if num_bytes >= _MAX_REQUEST_BYTES or len(batch) >= _MAX_REQUEST_BLOCKS:
                    self._pull_blocks(batch)
                    batch, num_bytes = [], 0
        if batch:
            self._pull_blocks(batch)

    def _pull_blocks(self, batch: Sequence[tuple[SequenceKey, int, int]]) -> None:
        """One request, and once more from the last verified block if it breaks off."""
        try:
            self._request_blocks(batch)
        except TransferInterruptedError:
            if self._stopping.is_set() and self._thread is not None and self._thread is threading.current_thread():
                return
            self._request_blocks([item for item in batch if self._tokens_in(item[0]) < _stop_of(item)])

    def _request_blocks(self, batch: Sequence[tuple[SequenceKey, int, int]]) -> None:
        replica, generation = self._from
        present: list[tuple[SequenceKey, int, int]] = []
        tensors: list[Tensor] = []

        def destinations(reply: dict[str, object]) -> list[Tensor]:
            here = reply.get("present")
            if not isinstance(here, list) or len(here) != len(batch):
                raise TransferError("the source's answer does not say which blocks it has")
            present[:] = [item for item, is_here in zip(batch, here, strict=True) if is_here]
            tensors[:] = [torch.empty(self._shape(tokens), dtype=self._incoming.kv.dtype) for _, _, tokens in present]
            return tensors

        def written(index: int) -> None:
            key, block, _ = present[index]
            if not self._is_local:
                self.bytes_verified += tensors[index].nbytes
            if self._tokens_in(key) < block * KV_BLOCK_TOKENS:
                return  # A block before it found no room.
            if self._incoming.write(key, self._rectangle, block, tensors[index]):
                self._brought[key] = None
            else:
                # Half a sequence helps nobody: its blocks may let another one arrive whole.
                self._crowded_out.add(key)
                self._incoming.drop([key])

        self._peer.request(
            {
                "op": "kv",
                "replica": replica,
                "generation": generation,
                "layers": list(self._rectangle.layers),
                "kv_heads": list(self._rectangle.kv_heads),
                "blocks": [[*key, block, tokens] for key, block, tokens in batch],
            },
            destinations,
            on_buffer=written,
        )

    def _shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        rectangle = self._rectangle
        return self._incoming.kv.block_shape(tokens=tokens, layers=rectangle.layers, kv_heads=rectangle.kv_heads)

    def _block_bytes(self, tokens: int) -> int:
        count = self._incoming.kv.dtype.itemsize
        for extent in self._shape(tokens):
            count *= extent
        return count


def _stop_of(item: tuple[SequenceKey, int, int]) -> int:
    _, block, tokens = item
    return block * KV_BLOCK_TOKENS + tokens
