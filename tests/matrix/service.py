"""Service cells: one real daemon at pinned degrees, disturbed in every way in turn; its streams must not notice.

Undisturbed streams come first: greedy ones must have the tokens of `transformers` (float32) or of our own engine on one
rank (bfloat16), sampled ones those of our own engine. Then each disturbance in turn, with the evidence that it happened
(contracts section 7), and lost instances replaced. After a failure the rest is played on a fresh daemon.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spotserve.core.events import Quiesced
from spotserve.core.slices import kv_block_bytes, layer_split, shard_bytes, stage_shard
from spotserve.core.spec import KV_BLOCK_TOKENS, LinearKind, ModelSpec, weight_copies
from spotserve.core.wire import ChoicePosition
from spotserve.runtime.model_table import describe_model
from tests.e2e.daemon import Stream
from tests.e2e.history import last_run
from tests.e2e.models import write_profile
from tests.e2e.scene import PATIENCE_S, Scene, clear
from tests.matrix.cells import Cell
from tests.matrix.engine import unsupported
from tests.matrix.references import MAX_MODEL_LEN, PREFILL_LENGTH, PREFILL_TOKENS, Subject, own_tokens
from tests.matrix.results import Case, Journal
from tests.runtime.models import LocalReplica

MAX_TOKENS = 160
NUM_BEFORE = 20
MAX_RUNNING = 12
NUM_BLOCKS = 92
"""More than the six sequences of a walk take, fewer than twelve do."""
HEADROOM_SHARE = 0.05
NUM_SPARES = 2
TOKEN_S = 0.015
"""A stream's pace on every machine: 160 tokens last longer than a capped copy."""
COPY_S = 1.0
BURST_BYTES = 1 << 20
LEAST_LINK_BYTES_PER_S = 300_000.0
SHORT_GRACE_S = 0.25
ATTEMPTS = 6
LONG_GRACE_S = 60.0
LEAST_TOKENS_WHILE_COPYING = 3
"""More than are under way to the ledger at any moment."""
NO_PREFILL = "with several replicas, prompts that come during a plan go to one that stays; a notice is played instead"

REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"temperature": 0.9, "top_p": 0.95, "n": 2, "seed": 20},
    {"temperature": 0.8, "top_k": 40, "seed": 7},
)
"""How the request for each prompt chooses: three greedily, one twice, one among the likeliest forty."""

Tokens = dict[int, list[int]]


@dataclass(frozen=True, slots=True)
class Expected:
    """Tokens per choice of each request of a walk, and the greedy ones of the long prompts."""

    tokens: list[Tokens]
    long_tokens: list[list[int]]


def expected_tokens(subject: Subject, model: ModelSpec, linear: LinearKind) -> Expected:
    """What a daemon must bring: `transformers` where it is exact, our own undisturbed engine on one rank elsewhere."""
    replica = LocalReplica(subject.folder, model, num_blocks=NUM_BLOCKS, prepacked=linear == "prepacked")
    tokens: list[Tokens] = []
    for index, (ids, drawn) in enumerate(zip(subject.prompt_ids, REQUESTS, strict=True)):
        if not drawn and model.dtype == "float32":
            tokens.append({0: subject.token_ids[index][:MAX_TOKENS]})
            continue
        fields = {key: value for key, value in drawn.items() if key != "n"}
        choices = range(drawn.get("n", 1))
        own = own_tokens(replica, ids, choices, max_tokens=MAX_TOKENS, **fields)
        tokens.append(dict(zip(choices, own, strict=True)))
    long_tokens = subject.long_token_ids
    if model.dtype != "float32":
        long_tokens = [own_tokens(replica, ids, [0], max_tokens=PREFILL_TOKENS)[0] for ids in subject.long_prompt_ids]
    return Expected(tokens, long_tokens)


class Walk(Scene):
    """A daemon of one cell and the streams that must come out of it."""

    def __init__(self, folder: Path, cell: Cell, subject: Subject, model: ModelSpec, expected: Expected) -> None:
        assert cell.degrees is not None
        self.degrees = cell.degrees
        self.subject = subject
        self.wanted = expected
        data, pipeline, tensor = cell.degrees
        profiles = folder / "profiles"
        write_profile(subject.folder, profiles, dtype=cell.dtype, linear=cell.linear)
        env = {
            "SPOTSERVE_PROFILE_CACHE": str(profiles),
            "SPOTSERVE_LINK_BYTES_PER_S": f"{link_bytes_per_s(model, pipeline=pipeline, tensor=tensor):.0f}",
            "SPOTSERVE_ITERATION_S": str(TOKEN_S / pipeline),
        }
        args = [str(subject.folder), "--dtype", cell.dtype, "--instances", str(cell.num_workers + NUM_SPARES)]
        memory = gpu_memory_bytes(model, cell.linear, pipeline=pipeline, tensor=tensor)
        args += ["--linear", cell.linear, "--gpu-memory", str(memory)]
        args += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_RUNNING)]
        args += ["-dp", str(data), "-pp", str(pipeline), "-tp", str(tensor)]
        super().__init__(folder, *args, env=env, max_tokens=MAX_TOKENS)

    def start(self) -> Walk:
        """Bring it up at its degrees."""
        self.daemon.start()
        self.num_living = len(self.living())
        parallel = self.daemon.status()["parallel"]
        assert self.degrees == (parallel["data"], parallel["pipeline"], parallel["tensor"])
        return self

    def open_all(self, which: int | None = None) -> list[Stream]:
        """One stream for each prompt (the first `which`), three of them greedy."""
        requests = list(zip(self.subject.prompt_ids, REQUESTS, strict=True))[:which]
        return [self.open(ids, max_tokens=MAX_TOKENS, **drawn) for ids, drawn in requests]

    def open(self, ids: Sequence[int], **fields: Any) -> Stream:
        """One more request."""
        self.num_accepted += 1
        return self.daemon.stream(ids, **fields)

    def decoding(self, num_tokens: int = NUM_BEFORE, which: int | None = None) -> list[Stream]:
        """The streams, each past its first tokens."""
        streams = self.open_all(which)
        for stream in streams:
            stream.wait_tokens(num_tokens, PATIENCE_S)
        return streams

    def compare(self, streams: Sequence[Stream]) -> int:
        """Every stream has the tokens it must have, in the ledger once; returns how many."""
        for index, (stream, tokens) in enumerate(zip(streams, itertools.cycle(self.wanted.tokens), strict=False)):
            stream.wait(PATIENCE_S)
            compare_tokens(tokens, stream.by_choice, f"stream {index % len(REQUESTS)}")
            self.check_rows_of(stream, tokens)
        return sum(len(own) for stream in streams for own in stream.by_choice.values())

    def check_rows_of(self, stream: Stream, tokens: Tokens) -> None:
        """The ledger holds each position of each choice once, in order."""
        held = dict.fromkeys(tokens, 0)
        for choice, first, count, _, _ in self.daemon.ledger_rows(stream.request):
            assert first == held[choice], f"ledger: choice {choice} continues at {first} after {held[choice]} tokens"
            held[choice] += count
        assert {choice: len(own) for choice, own in tokens.items()} == held

    def generations(self, stream: Stream) -> set[int]:
        """The generations that made a stream's tokens."""
        return {generation for *_, generation in self.daemon.ledger_rows(stream.request)}

    def held_once_copying(self, streams: Sequence[Stream]) -> dict[tuple[str, int], int]:
        """Tokens in the ledger, per choice, at a moment after the new plan's first `copy_weights` began."""
        earlier = self.daemon.status()["epoch"]

        def is_copying() -> bool:
            run = last_run(self.daemon)
            return run.plan.epoch.to > earlier and bool(run.begun("copy_weights"))

        self.daemon.wait_for(is_copying, "copying weights", PATIENCE_S)
        held: dict[tuple[str, int], int] = {}
        for stream in streams:
            for choice, first, count, _, _ in self.daemon.ledger_rows(stream.request):
                held[(stream.request, choice)] = first + count
        return held

    def calm(self) -> None:
        """Settle, with lost instances replaced."""
        self.settle()
        self.fill_up()
        self.settle()

    def migrations(self) -> list[dict[str, Any]]:
        """The status lines of all migrations."""
        lines: list[dict[str, Any]] = self.daemon.status()["migrations"]
        return lines

    def wait_migrated(self, trigger: str, num_earlier: int) -> dict[str, Any]:
        """The first migration of this trigger after `num_earlier` ones, once it has ended."""

        def ended() -> list[dict[str, Any]]:
            return [line for line in self.migrations()[num_earlier:] if line["trigger"] == trigger and line["outcome"]]

        self.daemon.wait_for(ended, f"migrated for {trigger}", PATIENCE_S)
        return ended()[0]

    def take_away(self, instance: str) -> None:
        """End a doomed instance now, so that nobody waits for its deadline."""
        if instance in self.living():
            self.kill(instance)


def compare_tokens(expected: Tokens, actual: Tokens, what: str) -> None:
    """Say where the first other token is."""
    for choice, tokens in expected.items():
        brought = actual.get(choice, [])
        for position, (token, other) in enumerate(zip(tokens, brought, strict=False)):
            assert token == other, f"{what} choice {choice} position {position}: {other}, expected {token}"
        assert len(tokens) == len(brought), f"{what} choice {choice}: {len(brought)} tokens, expected {len(tokens)}"


def gpu_memory_bytes(model: ModelSpec, linear: LinearKind, *, pipeline: int, tensor: int) -> int:
    """Memory for the largest shard, `NUM_BLOCKS` blocks of KV, and headroom.

    Prepacked copies are there twice during a live move: the old generation's and the new one's.
    """
    num_copies = 2 * weight_copies(linear) - 1
    needed = max(
        num_copies * shard_bytes(model, shard) + NUM_BLOCKS * kv_block_bytes(model, shard, block_tokens=KV_BLOCK_TOKENS)
        for shard in _shards(model, pipeline=pipeline, tensor=tensor)
    )
    return int(needed / (1.0 - HEADROOM_SHARE))


def link_bytes_per_s(model: ModelSpec, *, pipeline: int, tensor: int) -> float:
    """A cap with which the first shard's weights, less what a link lets through at once, take `COPY_S`."""
    share = shard_bytes(model, next(iter(_shards(model, pipeline=pipeline, tensor=tensor))))
    return max(LEAST_LINK_BYTES_PER_S, (share - BURST_BYTES) / COPY_S)


def _shards(model: ModelSpec, *, pipeline: int, tensor: int) -> Iterator[Any]:
    for layers in layer_split(model.num_layers, pipeline):
        for rank in range(tensor):
            yield stage_shard(model, layers=layers, tensor=tensor, rank=rank)


# Disturbances: each plays on a calm daemon, leaves a calm one, and says in its case what it compared and saw.


def undisturbed(walk: Walk, case: Case) -> None:
    """Nothing happens."""
    case.tokens = walk.compare(walk.open_all())
    walk.settle()


def notice(walk: Walk, case: Case) -> None:
    """A sufficient notice: weights and KV move while the replica decodes on, and nothing is computed twice."""
    for attempt in attempts(walk):
        streams = walk.decoding()
        leader, num_earlier = walk.serving()[0], len(walk.migrations())
        with arriving(walk) as arrivals:
            walk.notice(leader, LONG_GRACE_S)
            held = walk.held_once_copying(streams)
            line = walk.wait_migrated("notice", num_earlier)
        case.tokens += walk.compare(streams) + arrivals.compare()
        run = last_run(walk.daemon)
        made = [one.tokens - held.get((one.request, one.choice), one.tokens) for one in positions_at_cutover(walk)]
        moved = [stream for stream in streams if len(walk.generations(stream)) > 1]
        served = run.served_while_copying()
        case.evidence = {
            "kv_bytes": line["kv_bytes"],
            "weight_bytes": line["weight_bytes"],
            "recomputed_tokens": line["recomputed_tokens"],
            "streams_of_two_generations": len(moved),
            "served_while_copying": len(served),
            "tokens_while_copying": max(made, default=0),
            "attempts": attempt,
        }
        assert ("completed", "live", 0) == (line["outcome"], line["mode"], line["recomputed_tokens"]), str(line)
        assert line["kv_bytes"] > 0, str(line)
        assert run.plan.epoch.to == line["epoch"]
        assert moved if walk.degrees[0] > 1 else len(streams) == len(moved), f"{len(moved)} streams of two generations"
        walk.take_away(leader)
        # With several replicas new requests go to one that stays, so there only the streams themselves can tell.
        if served or max(made, default=0) >= LEAST_TOKENS_WHILE_COPYING:
            return
    raise AssertionError(f"no iteration between the first copy_weights and quiesce in any of {ATTEMPTS} runs")


def attempts(walk: Walk) -> Iterator[int]:
    """Numbers from 1: what only the moment decides is tried again on a calm daemon, and the case says how often."""
    for attempt in range(1, ATTEMPTS + 1):
        if attempt > 1:
            walk.calm()
        yield attempt


def short_notice(walk: Walk, case: Case) -> None:
    """A notice too short to move everything: what stays behind is computed anew."""
    streams = walk.decoding()
    leader, num_earlier = walk.serving()[0], len(walk.migrations())
    walk.notice(leader, SHORT_GRACE_S)
    case.tokens = walk.compare(streams)
    walk.daemon.wait_for(lambda: leader not in walk.living(), "taken at the deadline", PATIENCE_S)
    walk.settle()
    lines = walk.migrations()[num_earlier:]
    case.evidence = {"recomputed_tokens": sum(line["recomputed_tokens"] for line in lines)}
    assert case.evidence["recomputed_tokens"] > 0, f"the notice was not too short: {lines}"


def kill(walk: Walk, case: Case) -> None:
    """An instance dies without notice."""
    streams = walk.decoding()
    num_earlier = len(walk.migrations())
    walk.kill(walk.serving()[-1])
    line = walk.wait_migrated("lost", num_earlier)
    case.tokens = walk.compare(streams)
    walk.settle()
    lines = walk.migrations()[num_earlier:]
    case.evidence = {"recomputed_tokens": sum(one["recomputed_tokens"] for one in lines), "outcome": line["outcome"]}
    assert case.evidence["recomputed_tokens"] > 0, str(lines)


def eviction(walk: Walk, case: Case) -> None:
    """More sequences than the KV pool has blocks for: some are evicted and computed anew."""
    before = walk.count("request_evicted")
    for attempt in attempts(walk):
        # Who comes late meets sequences that have ended: the more there are, the surer some grow at once.
        streams = [stream for _ in range((attempt + 1) * walk.degrees[0]) for stream in walk.open_all()]
        case.tokens += walk.compare(streams)
        case.evidence = {"evicted": walk.count("request_evicted") - before, "attempts": attempt}
        walk.settle()
        if case.evidence["evicted"]:
            return
    raise AssertionError(f"nobody was evicted in {ATTEMPTS} attempts")


def notice_during_prefill(walk: Walk, case: Case) -> None:
    """A notice while prompts are being computed: half a prompt's KV moves."""
    for attempt in attempts(walk):
        streams = walk.decoding(which=2)
        leader, num_earlier = walk.serving()[0], len(walk.migrations())
        with prefilling(walk) as prefills:
            prefills.wait_ended(2 * walk.degrees[0])
            walk.notice(leader, LONG_GRACE_S)
            line = walk.wait_migrated("notice", num_earlier)
        case.tokens += walk.compare(streams) + prefills.compare()
        moved = positions_at_cutover(walk)
        begun = [one for one in moved if one.tokens == 0 and 0 < one.kv_tokens < PREFILL_LENGTH]
        case.evidence = {
            "moved": len(moved),
            "prefilling": len(begun),
            "kv_bytes": line["kv_bytes"],
            "attempts": attempt,
        }
        assert "completed" == line["outcome"], str(line)
        walk.take_away(leader)
        if begun:
            return
    raise AssertionError(f"nobody was prefilling at any of {ATTEMPTS} cutovers")


def positions_at_cutover(walk: Walk) -> list[ChoicePosition]:
    """Where the choices stood that the last plan moved."""
    epoch = last_run(walk.daemon).plan.epoch.to
    quiesced = [entry.event for entry in walk.entries() if isinstance(entry.event, Quiesced)]
    return [position for event in quiesced if event.epoch == epoch for position in event.positions]


def coordinator_restart(walk: Walk, case: Case) -> None:
    """The coordinator dies by SIGKILL and comes back: workers are adopted, cut streams are fetched to their end."""
    streams = walk.decoding()
    walk.daemon.kill9()
    assert all(stream.done.wait(PATIENCE_S) for stream in streams)
    num_seen = [{choice: len(own) for choice, own in stream.by_choice.items()} for stream in streams]
    walk.daemon.start()
    for stream, tokens in zip(streams, walk.wanted.tokens, strict=True):
        name = stream.request
        walk.daemon.wait_for(lambda name=name: "finished" == walk.daemon.fetch(name)["state"], "finished", PATIENCE_S)
        fetched = {one["index"]: one["token_ids"] for one in walk.daemon.fetch(name)["choices"]}
        compare_tokens(tokens, fetched, "fetched")
        seen = {choice: tokens[choice][: len(own)] for choice, own in stream.by_choice.items()}
        compare_tokens(seen, stream.by_choice, "before the kill")
        walk.check_rows_of(stream, tokens)
        case.tokens += sum(len(own) for own in fetched.values())
    case.evidence = {"seen_before": sum(sum(seen.values()) for seen in num_seen)}
    assert not all(stream.finish_reason for stream in streams), "every stream had ended before"


DISTURBANCES: dict[str, Callable[[Walk, Case], None]] = {
    "undisturbed": undisturbed,
    "notice": notice,
    "short-notice": short_notice,
    "kill": kill,
    "eviction": eviction,
    "notice-during-prefill": notice_during_prefill,
    "coordinator-restart": coordinator_restart,
}


class Arrivals:
    """Short requests for as long as it goes on; each must have the tokens it should."""

    def __init__(self, walk: Walk, prompts: Sequence[Sequence[int]], expected: Sequence[list[int]], width: int) -> None:
        self._walk = walk
        self._given = list(zip(prompts, expected, strict=True))
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._threads = [threading.Thread(target=self._arrive) for _ in range(width)]
        self.streams: list[tuple[Stream, list[int]]] = []

    def start(self) -> None:
        """Let them arrive."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The last ones are waited for."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _arrive(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                ids, tokens = self._given[next(self._numbers) % len(self._given)]
                stream = self._walk.open(ids, max_tokens=len(tokens))
                self.streams.append((stream, tokens))
            stream.done.wait(PATIENCE_S)

    def wait_ended(self, count: int) -> None:
        """Until so many have come to their end."""
        self._walk.daemon.wait_for(lambda: self._num_ended() >= count, f"{count} arrivals served", PATIENCE_S)

    def _num_ended(self) -> int:
        return len([stream for stream, _ in list(self.streams) if stream.done.is_set()])

    def compare(self) -> int:
        """They had the tokens they should; returns how many."""
        for stream, tokens in self.streams:
            stream.wait(PATIENCE_S)
            compare_tokens({0: tokens}, stream.by_choice, "arrival")
        return sum(len(tokens) for _, tokens in self.streams)


@contextmanager
def arriving(walk: Walk) -> Iterator[Arrivals]:
    """A few short requests after one another; they tell which replica served when."""
    ids, tokens = walk.subject.prompt_ids[0], walk.wanted.tokens[0][0][:2]
    yield from _arrived(Arrivals(walk, [ids], [tokens], 2 * walk.degrees[0]))


@contextmanager
def prefilling(walk: Walk) -> Iterator[Arrivals]:
    """So many long prompts at a time that there is always one being prefilled and others wait."""
    yield from _arrived(Arrivals(walk, walk.subject.long_prompt_ids, walk.wanted.long_tokens, 12 * walk.degrees[0]))


def _arrived(arrivals: Arrivals) -> Iterator[Arrivals]:
    arrivals.start()
    try:
        yield arrivals
    finally:
        arrivals.stop()


def run_service(cell: Cell, subject: Subject, journal: Journal, *, folder: Path) -> None:
    """Play a service cell: every disturbance in one daemon, or in a fresh one after a failure."""
    assert cell.degrees is not None
    model = describe_model(subject.folder, cell.dtype)
    _, pipeline, tensor = cell.degrees
    reason = unsupported(model, pipeline, tensor)
    if reason is not None:
        for name in cell.disturbances:
            journal.leave_out(name, reason)
        return
    expected = expected_tokens(subject, model, cell.linear)
    names = ["undisturbed", *cell.disturbances]
    if cell.degrees[0] > 1 and "notice-during-prefill" in names:
        journal.leave_out("notice-during-prefill", NO_PREFILL)
        names.remove("notice-during-prefill")
        if "notice" not in names:
            names.insert(1, "notice")
    for attempt in itertools.count():
        walk = Walk(folder / f"daemon{attempt}", cell, subject, model, expected)
        try:
            names = _walk_on(walk, names, journal)
        finally:
            clear(walk)
        if not names:
            return


def _walk_on(walk: Walk, names: list[str], journal: Journal) -> list[str]:
    """Play disturbances until one fails; returns those that are left."""
    title = "start" if names[0] == "undisturbed" else f"start again for {names[0]}"
    started = journal.take(title, lambda _: _start(walk))
    if not started:
        return []
    for index, name in enumerate(names):
        if not journal.take(name, partial(_play, walk, name)):
            return names[index + 1 :]
    journal.take("stop", lambda _: walk.stop())
    return []


def _start(walk: Walk) -> None:
    walk.start()


def _play(walk: Walk, name: str, case: Case) -> None:
    DISTURBANCES[name](walk, case)
    walk.calm()
