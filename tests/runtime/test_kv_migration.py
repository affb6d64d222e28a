"""Following KV: blocks arrive while they fill, breaks are retried, a full pool steps back, and deltas complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.plan import KvRoute
from spotserve.core.wire import ChoicePosition
from spotserve.errors import TransferError
from spotserve.runtime.kv_migration import IncomingKv, KvFollower, Peer, Rectangle
from spotserve.runtime.kv_store import KvStore, OutOfBlocks
from spotserve.runtime.transfer import TransferInterruptedError
from spotserve.runtime.transfer_source import LocalPeer, TransferSource

LAYERS, HEADS = (0, 2), (0, 4)
WHOLE = Rectangle(LAYERS, HEADS)


def key_of(name: str, kv_generation: int = 0) -> SequenceKey:
    """A sequence's name."""
    return SequenceKey(name, 0, kv_generation)


def store(num_blocks: int = 32, *, seed: int | None = None) -> KvStore:
    """A KV store; with a seed its pool is random."""
    kv = KvStore(num_blocks=num_blocks, layers=LAYERS, kv_heads=HEADS, head_dim=8, dtype=torch.float32)
    if seed is not None:
        torch.manual_seed(seed)
        for layer in range(*LAYERS):
            kv.keys(layer).normal_()
            kv.values(layer).normal_()
    return kv


def grow(kv: KvStore, name: str, tokens: int) -> None:
    """Let a sequence reach so many tokens, with random KV."""
    key = key_of(name)
    first = kv.kv_tokens(key) // 16
    kv.extend(key, tokens)
    for block in range(first, -(-tokens // 16)):
        shape = kv.block_shape(tokens=16, layers=LAYERS, kv_heads=HEADS)
        old = min(16, max(0, kv.kv_tokens(key) - block * 16))
        rectangle = torch.randn(shape)
        if old:
            rectangle[:, :, :, :old] = kv.export_block(key, block, layers=LAYERS, kv_heads=HEADS)
        kv.import_block(key, block, rectangle, layers=LAYERS, kv_heads=HEADS)
    kv.fill(key, tokens)


def content(kv: KvStore, name: str) -> Tensor:
    """All KV of a sequence, block by block."""
    key = key_of(name)
    blocks = range(-(-kv.kv_tokens(key) // 16))
    return torch.cat([kv.export_block(key, block, layers=LAYERS, kv_heads=HEADS) for block in blocks], dim=3)


def manifest(*items: tuple[str, int]) -> tuple[ChoicePosition, ...]:
    """Quiesced positions."""
    return tuple(
        ChoicePosition(request=RequestId(name), choice=0, kv_generation=0, tokens=1, kv_tokens=kv_tokens)
        for name, kv_tokens in items
    )


def peer_of(kv: KvStore) -> LocalPeer:
    """A source that holds this store."""
    return LocalPeer(TransferSource(weights=lambda: None, kv=lambda replica, generation: kv))


def follower(peer: Peer, incoming: IncomingKv, *, kv_heads: tuple[int, int] = HEADS) -> KvFollower:
    """A follower of one rectangle."""
    route = KvRoute(from_replica=ReplicaId("r1"), to_replica=ReplicaId("r2"), layers=LAYERS, kv_heads=kv_heads)
    return KvFollower(peer=peer, route=route, source_generation=1, incoming=incoming)


class BreakingPeer:
    """A source whose connection breaks after a few buffers, so many times."""

    first_byte_s: float | None = None

    def __init__(self, peer: Peer, *, breaks: int, after: int = 1) -> None:
        self.peer = peer
        self.breaks = breaks
        self.after = after

    def request(
        self,
        request: dict[str, object],
        destinations: Sequence[Tensor] | Callable[[dict[str, object]], Sequence[Tensor]] = (),
        *,
        on_buffer: Callable[[int], None] | None = None,
    ) -> dict[str, object]:
        """Ask, and break off if it is time to."""
        if request["op"] != "kv" or not self.breaks:
            return self.peer.request(request, destinations, on_buffer=on_buffer)
        self.breaks -= 1

        def count(index: int) -> None:
            if index >= self.after:
                raise TransferInterruptedError("broke off", num_buffers_verified=index)
            assert on_buffer is not None
            on_buffer(index)

        return self.peer.request(request, destinations, on_buffer=count)

    def close(self) -> None:
        """Nothing is open."""


def test_a_rectangle_per_source_completes_a_sequence() -> None:
    """Tests that two sources of some heads each fill one sequence, adoptable only when both are through."""
    source, target = store(seed=1), store()
    incoming = IncomingKv(target)
    grow(source, "a", 40)
    left, right = (follower(peer_of(source), incoming, kv_heads=heads) for heads in ((0, 1), (1, 4)))
    left.start()
    assert left.is_caught_up.wait(10)
    grow(source, "a", 75)
    assert [] == left.finish(manifest(("a", 75)))
    assert (key_of("a"),) == IncomingKv.adopt(incoming, [(key_of("a"), 75)], is_exclusive=False)
    incoming = IncomingKv(target)
    left, right = (follower(peer_of(source), incoming, kv_heads=heads) for heads in ((0, 1), (1, 4)))
    assert [] == left.finish(manifest(("a", 75)))
    assert [] == right.finish(manifest(("a", 75)))
    assert () == incoming.adopt([(key_of("a"), 75)], is_exclusive=False)
    assert 75 == target.kv_tokens(key_of("a"))
    assert torch.equal(content(source, "a"), content(target, "a"))
    assert 75 * 2 * 2 * 8 * 4 * 1 == left.bytes_verified


def test_follows_while_the_source_decodes() -> None:
    """Tests that blocks filled later arrive too, and that the delta then brings only what is left."""
    source, target = store(seed=2), store()
    incoming = IncomingKv(target)
    grow(source, "a", 33)
    following = follower(peer_of(source), incoming)
    following.start()
    assert following.is_caught_up.wait(10)
    for tokens in (50, 90, 130):
        grow(source, "a", tokens)
        while incoming.tokens_in(key_of("a"), WHOLE) < tokens // 16 * 16:
            assert following.error is None
    before = following.bytes_verified
    assert [] == following.finish(manifest(("a", 130)))
    assert 2 * 2 * 2 * 4 * 8 * 4 == following.bytes_verified - before
    incoming.adopt([(key_of("a"), 130)], is_exclusive=True)
    assert torch.equal(content(source, "a"), content(target, "a"))


def test_a_copy_and_its_delta_report_each_byte_once() -> None:
    """Tests that what `copy_kv` has reported is not in what the delta reports, however far the follower got between."""
    source, target = store(seed=2), store()
    incoming = IncomingKv(target)
    grow(source, "a", 40)
    following = follower(peer_of(source), incoming)
    following.start()
    assert following.is_caught_up.wait(10)
    first = following.take_bytes()
    grow(source, "a", 75)
    assert [] == following.finish(manifest(("a", 75)))
    assert 75 * 2 * 2 * 8 * 4 * 4 == first + following.take_bytes()
    assert 0 == following.take_bytes()


def test_what_the_manifest_does_not_name_is_dropped() -> None:
    """Tests that a sequence which ended meanwhile leaves no block, and that one the source lost is reported."""
    source, target = store(seed=3), store()
    incoming = IncomingKv(target)
    for name in ("a", "b"):
        grow(source, name, 48)
    following = follower(peer_of(source), incoming)
    following.start()
    assert following.is_caught_up.wait(10)
    source.free(key_of("a"))
    assert [("c", 0)] == following.finish(manifest(("b", 48), ("c", 20)))
    assert 0 == incoming.tokens_in(key_of("a"), WHOLE)
    assert target.num_blocks - 3 == target.num_free


@pytest.mark.parametrize("breaks", [1, 2])
def test_a_break_is_retried_once(breaks: int) -> None:
    """Tests that a transfer that breaks off goes on from the last verified block, and that two breaks lose the rest."""
    source, target = store(seed=4), store()
    incoming = IncomingKv(target)
    grow(source, "a", 70)
    following = follower(BreakingPeer(peer_of(source), breaks=breaks), incoming)
    missing = following.finish(manifest(("a", 70)))
    if breaks == 1:
        assert [] == missing
        incoming.adopt([(key_of("a"), 70)], is_exclusive=False)
        assert torch.equal(content(source, "a"), content(target, "a"))
    else:
        assert [("a", 0)] == missing
        assert "broke off" == following.error
        assert 32 == incoming.tokens_in(key_of("a"), WHOLE)


def test_a_full_pool_keeps_what_fits() -> None:
    """Tests that a sequence without room is reported missing and does not disturb the one that fits."""
    source, target = store(seed=5), store(num_blocks=5)
    incoming = IncomingKv(target)
    grow(source, "a", 60)
    grow(source, "b", 60)
    following = follower(peer_of(source), incoming)
    following.start()
    assert following.is_caught_up.wait(10)
    assert [("b", 0)] == following.finish(manifest(("a", 60), ("b", 60)))
    assert () == incoming.adopt([(key_of("a"), 60)], is_exclusive=True)
    assert torch.equal(content(source, "a"), content(target, "a"))
    assert 1 == target.num_free


def test_the_engine_takes_the_room_back() -> None:
    """Tests that the latest arrivals go when an engine needs blocks, and are not brought again before the delta."""
    source, target = store(seed=6), store(num_blocks=8)
    incoming = IncomingKv(target)
    grow(source, "a", 48)
    grow(source, "b", 48)
    following = follower(peer_of(source), incoming)
    following.start()
    assert following.is_caught_up.wait(10)
    incoming.take_blocks([(SequenceKey("own", 0, 0), 80)])
    assert (48, 0) == tuple(incoming.tokens_in(key_of(name), WHOLE) for name in ("a", "b"))
    assert [("b", 0)] == following.finish(manifest(("a", 48), ("b", 48)))
    with pytest.raises(OutOfBlocks):
        target.extend(SequenceKey("own", 0, 0), 81)


def test_an_aborted_copy_leaves_nothing_but_what_was_adopted() -> None:
    """Tests that abandoning frees what came in, and never a sequence that the engine has taken over."""
    source, target = store(seed=7), store()
    incoming = IncomingKv(target)
    grow(source, "a", 32)
    grow(source, "b", 32)
    following = follower(peer_of(source), incoming)
    following.start()
    assert following.is_caught_up.wait(10)
    assert () == incoming.adopt([(key_of("a"), 32)], is_exclusive=False)
    following.abandon()
    assert {key_of("a"): 32} == target.directory()
    assert not incoming.write(
        key_of("a"), WHOLE, 0, torch.zeros(target.block_shape(tokens=16, layers=LAYERS, kv_heads=HEADS))
    )
    incoming.free(key_of("a"))
    assert target.num_blocks == target.num_free


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "dance"},
        {},
        {"op": "kv", "replica": "r1"},
        {"op": "weights", "slices": [["a", 0, 0, 1]]},
        {"op": "kv_list", "replica": "r9", "generation": 1},
    ],
)
def test_a_source_refuses_what_it_does_not_hold_or_know(request_: dict[str, object]) -> None:
    """Tests that malformed requests and unknown replicas are errors of the request."""
    source = TransferSource(weights=lambda: None, kv=lambda replica, generation: None)
    with pytest.raises(TransferError):
        source.answer("grant", request_)
