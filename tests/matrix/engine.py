"""Engine cells: whole replicas in one process, at every (P, M), against `transformers` and against themselves.

A script of sequences with arrivals, ends, evictions and a batch that grows to 64 and shrinks again is played at every
degree and several chunk sizes. Each row of logits must have the bits that it has when its sequence runs alone on one
rank, each token must be that run's; greedy float32 tokens must be those of `generate` as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.sampling import SamplingParameters
from spotserve.core.slices import max_tensor_degree
from spotserve.core.spec import ModelSpec
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.sampler import Draw, sample
from spotserve.runtime.stage_model import BatchSequence, StageBatch
from tests.matrix.cells import Cell, engine_degrees
from tests.matrix.references import NUM_TOKENS, VOCAB_SIZE, Subject, free, sampling
from tests.matrix.results import Case, Journal
from tests.runtime.models import LocalReplica, key_of

CHUNKS = (64, 16, 7, 1)
NUM_LONG_TOKENS = 36
NUM_SHORT = 56
SHORT_ARRIVE_AT = 14
NUM_BLOCKS = 320
EVICTIONS: dict[int, tuple[int, ...]] = {9: (0, 4), 22: (2, 6), 30: (1, 5)}
"""Step -> sequences whose KV is thrown away there and computed anew."""

DRAWN: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"temperature": 0.9, "top_p": 0.95, "seed": 20},
    {"temperature": 0.9, "top_p": 0.95, "seed": 20},
    {"temperature": 0.8, "top_k": 40, "seed": 7},
    {"temperature": 1.1, "seed": 2**40 + 3},
    {"temperature": 0.7, "top_k": 100, "top_p": 0.8, "seed": 5},
)
"""How the long sequences choose; the fourth and fifth are two choices of one request."""


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence of the script."""

    index: int
    prompt: tuple[int, ...]
    parameters: SamplingParameters
    choice: int
    arrives_at: int


@dataclass(slots=True)
class Played:
    """What a sequence brought: tokens, and the logits each was chosen from."""

    tokens: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class _Live:
    part: Part
    ids: list[int]
    key: SequenceKey
    num_fed: int = 0
    num_chosen: int = 0


def script(subject: Subject, seed: int) -> list[Part]:
    """Eight long sequences that arrive one by one, and a wave of short ones that makes the batch 64 wide."""
    rng = random.Random(f"{seed}:script")
    prompts = [*subject.prompt_ids[:3], *[subject.prompt_ids[3]] * 2, subject.prompt_ids[4]]
    prompts += [ids[:80] for ids in subject.long_prompt_ids[:2]]
    parts = [
        Part(index, tuple(ids), sampling(max_tokens=NUM_LONG_TOKENS, **drawn), int(index == 4), index)
        for index, (ids, drawn) in enumerate(zip(prompts, DRAWN, strict=True))
    ]
    for index in range(len(parts), len(parts) + NUM_SHORT):
        ids = tuple(rng.randrange(8, VOCAB_SIZE) for _ in range(rng.randrange(1, 21)))
        drawn: dict[str, Any] = {"temperature": 0.9, "seed": index} if index % 4 == 0 else {}
        parts.append(Part(index, ids, sampling(max_tokens=rng.randrange(2, 5), **drawn), 0, SHORT_ARRIVE_AT))
    return parts


def play(
    replica: LocalReplica,
    parts: Sequence[Part],
    *,
    chunk: int,
    evictions: dict[int, tuple[int, ...]] | None = None,
    heard: Callable[[int, int, int, Tensor], None],
) -> int:
    """Run a script; `heard` is told (sequence, position, token, logits) of each choice. Returns the widest batch."""
    waiting = sorted(parts, key=lambda part: part.arrives_at, reverse=True)
    live: dict[int, _Live] = {}
    step = widest = 0
    while waiting or live:
        while waiting and (waiting[-1].arrives_at <= step or not live):
            part = waiting.pop()
            live[part.index] = _Live(part, list(part.prompt), key_of(part.index))
        for index in (evictions or {}).get(step, ()):
            if index in live:
                _evict(replica, live[index])
        widest = max(widest, len(live))
        _step(replica, live, chunk, heard)
        step += 1
    return widest


def _evict(replica: LocalReplica, one: _Live) -> None:
    free(replica, one.key)
    one.key = key_of(one.part.index, one.key.kv_generation + 1)
    one.num_fed = 0


def _step(
    replica: LocalReplica, live: dict[int, _Live], chunk: int, heard: Callable[[int, int, int, Tensor], None]
) -> None:
    batch, wanting = [], []
    for one in live.values():
        ids = one.ids[one.num_fed : one.num_fed + chunk]
        is_last = one.num_fed + len(ids) == len(one.ids)
        batch.append(BatchSequence(one.key, one.num_fed, len(ids), is_last, tuple(ids)))
        one.num_fed += len(ids)
        if is_last:
            wanting.append(one)
    logits = replica.forward(StageBatch(tuple(batch)))
    draws = [Draw(one.part.parameters, one.part.choice, one.num_chosen) for one in wanting]
    for one, token, row in zip(wanting, sample(logits, draws), logits, strict=True):
        heard(one.part.index, one.num_chosen, token, row)
        one.ids.append(token)
        one.num_chosen += 1
        if one.num_chosen == one.part.parameters.max_tokens:
            free(replica, one.key)
            del live[one.part.index]


def alone(replica: LocalReplica, parts: Sequence[Part]) -> dict[int, Played]:
    """Every sequence of a script by itself."""
    played = {part.index: Played() for part in parts}

    def heard(index: int, position: int, token: int, row: Tensor) -> None:
        assert position == len(played[index].tokens)
        played[index].tokens.append(token)
        played[index].rows.append(row.clone())

    for part in parts:
        play(replica, [part], chunk=64, heard=heard)
    return played


class Comparison:
    """Counts tokens whose bits and choice are those of the reference; says where the first other one is."""

    def __init__(self, expected: dict[int, Played]) -> None:
        self._expected = expected
        self.num_tokens = 0

    def hear(self, index: int, position: int, token: int, row: Tensor) -> None:
        """Compare one row and the token chosen from it."""
        own = self._expected[index]
        if not torch.equal(own.rows[position], row):
            num_other = int((own.rows[position] != row).sum())
            raise AssertionError(f"sequence {index} position {position}: {num_other} logits have other bits")
        assert own.tokens[position] == token, (
            f"sequence {index} position {position}: {token}, not {own.tokens[position]}"
        )
        self.num_tokens += 1


def run_engine(cell: Cell, subject: Subject, journal: Journal, *, seed: int) -> None:
    """Play an engine cell, one case per comparison."""
    model = describe_model(subject.folder, cell.dtype)
    parts = script(subject, seed)
    one = LocalReplica(subject.folder, model, num_blocks=NUM_BLOCKS)
    if cell.dtype == "float32":
        journal.take("transformers p1m1", lambda case: greedy_like_transformers(one, subject, case))
    expected: dict[int, Played] = {}
    journal.take("alone", lambda case: _take_alone(one, parts, subject, cell, expected, case))
    if not expected:
        return
    rng = random.Random(f"{seed}:{cell.name}")
    for pipeline, tensor in engine_degrees():
        name = f"churn p{pipeline}m{tensor}"
        reason = unsupported(model, pipeline, tensor)
        if reason is not None:
            journal.leave_out(name, reason)
            continue
        # One token at a time takes a step for each, so that is left to few ranks.
        chunk = rng.choice(CHUNKS if pipeline * tensor <= 3 else CHUNKS[:-1])

        def compare(case: Case, pipeline: int = pipeline, tensor: int = tensor, chunk: int = chunk) -> None:
            replica = LocalReplica(subject.folder, model, pipeline=pipeline, tensor=tensor, num_blocks=NUM_BLOCKS)
            _take_churn(replica, parts, expected, chunk, case)

        journal.take(name, compare)
    most = max(tensor for pipeline, tensor in engine_degrees() if unsupported(model, 1, tensor) is None)
    if cell.dtype == "float32":
        split = LocalReplica(subject.folder, model, pipeline=2, tensor=min(3, most), num_blocks=NUM_BLOCKS)
        journal.take(f"transformers p2m{min(3, most)}", lambda case: greedy_like_transformers(split, subject, case))
    journal.take("prepacked p2m2", lambda case: _take_prepacked(subject, model, parts, min(2, most), case))


def unsupported(model: ModelSpec, pipeline: int, tensor: int) -> str | None:
    """Why a model has no such degrees, None if it has."""
    if pipeline > model.num_layers:
        return f"{pipeline} stages, the model has {model.num_layers} layers"
    if tensor > max_tensor_degree(model):
        return f"tensor degree {tensor}, the model has {max_tensor_degree(model)} reduction chunks"
    return None


def greedy_like_transformers(replica: LocalReplica, subject: Subject, case: Case) -> None:
    """Compare 200 greedy tokens of every prompt with those of `generate`."""
    keys = [key_of(index, 50) for index in range(len(subject.prompt_ids))]
    rows = torch.stack([replica.prefill(key, ids, chunk=64) for key, ids in zip(keys, subject.prompt_ids, strict=True)])
    for position in range(NUM_TOKENS):
        chosen: list[int] = rows.argmax(-1).tolist()
        for index, token in enumerate(chosen):
            expected = subject.token_ids[index][position]
            assert expected == token, f"prompt {index} position {position}: {token}, transformers has {expected}"
        case.tokens += len(chosen)
        if position + 1 < NUM_TOKENS:
            rows = replica.decode(dict(zip(keys, chosen, strict=True)))
    for key in keys:
        free(replica, key)


def _take_alone(
    one: LocalReplica, parts: Sequence[Part], subject: Subject, cell: Cell, expected: dict[int, Played], case: Case
) -> None:
    played = alone(one, parts)
    if cell.dtype == "float32":
        for index in range(3):
            assert subject.token_ids[index][:NUM_LONG_TOKENS] == played[index].tokens
            case.tokens += NUM_LONG_TOKENS
    assert played[3].tokens != played[4].tokens, "two choices of one request are the same"
    expected.update(played)


def _take_churn(
    replica: LocalReplica, parts: Sequence[Part], expected: dict[int, Played], chunk: int, case: Case
) -> None:
    comparison = Comparison(expected)
    widest = play(replica, parts, chunk=chunk, evictions=EVICTIONS, heard=comparison.hear)
    assert sum(len(own.tokens) for own in expected.values()) == comparison.num_tokens
    case.tokens = comparison.num_tokens
    case.evidence = {"chunk": chunk, "widest_batch": widest}


def _take_prepacked(subject: Subject, model: ModelSpec, parts: Sequence[Part], tensor: int, case: Case) -> None:
    """Prepacked linears have bits of their own, so they get a reference of their own."""
    long = parts[: len(DRAWN)]
    expected = alone(LocalReplica(subject.folder, model, num_blocks=NUM_BLOCKS, prepacked=True), long)
    split = LocalReplica(subject.folder, model, pipeline=2, tensor=tensor, num_blocks=NUM_BLOCKS, prepacked=True)
    _take_churn(split, long, expected, 16, case)
