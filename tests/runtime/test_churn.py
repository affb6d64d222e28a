"""Bits under churn: sequences that join, pause, leave and are evicted at random, cut in any way, sampled in any way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.sampling import SamplingParameters
from spotserve.runtime.sampler import Draw, sample
from spotserve.runtime.stage_model import BatchSequence, StageBatch
from tests.runtime.models import LocalReplica, write_llama

VARIANTS = [(dtype, prepacked) for dtype in ("float32", "bfloat16") for prepacked in (False, True)]
"""(dtype, prepacked linears)"""
DEGREES = [(pipeline, tensor) for pipeline in range(1, 9) for tensor in range(1, 8 // pipeline + 1)]
"""Every (P, M) of up to 8 workers."""
CHUNKS = (1, 7, 16, 33)
VOCABULARY = 301


@dataclass(slots=True)
class Choice:
    """One text and what its rows of logits were."""

    request: RequestId
    index: int
    prompt: list[int]
    parameters: SamplingParameters
    kv_generation: int = 0
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def key(self) -> SequenceKey:
        """The name of its KV."""
        return SequenceKey(self.request, self.index, self.kv_generation)

    @property
    def is_finished(self) -> bool:
        """Whether it has all its tokens."""
        return len(self.tokens) == self.parameters.max_tokens

    def take(self, row: Tensor) -> None:
        """Sample the next token from its logits."""
        self.logits.append(row)
        self.tokens += sample(row[None], [Draw(self.parameters, self.index, len(self.tokens))])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer for each of 8 stages and a q head for each of 8 ranks, in inconvenient sizes."""
    changes = {"num_hidden_layers": 8, "head_dim": 8, "intermediate_size": 179, "vocab_size": VOCABULARY}
    return write_llama(tmp_path_factory.mktemp("deep"), **changes)


def drawn_choices(number: int, rng: random.Random) -> list[Choice]:
    """Two choices each of random requests: greedy ones and sampled ones."""
    choices = []
    for request in range(number // 2):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 50))]
        parameters = SamplingParameters(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 20]),
            seed=rng.randrange(2**32),
            max_tokens=rng.randint(1, 8),
        )
        choices += [Choice(RequestId(f"request-{request}"), index, prompt, parameters) for index in range(2)]
    return choices


def serve_with_churn(replica: LocalReplica, choices: list[Choice], rng: random.Random) -> int:
    """Generate all choices in random batches of whoever is there; returns how many were evicted."""
    waiting, live, num_evicted = list(choices), list[Choice](), 0
    while waiting or live:
        for _ in range(rng.randint(0, len(waiting))):
            live.append(waiting.pop(0))
        if live and rng.random() < 0.2:
            victim = rng.choice(live)
            forget(replica, victim)
            victim.kv_generation += 1
            num_evicted += 1
        chosen = rng.sample(live, rng.randint(0, len(live)))
        if chosen:
            batch = StageBatch(tuple(next_rows(replica, choice, rng.choice(CHUNKS)) for choice in chosen))
            logits = iter(replica.forward(batch))
            for choice, sequence in zip(chosen, batch.sequences, strict=True):
                if sequence.wants_logits:
                    choice.take(next(logits))
        for choice in [choice for choice in live if choice.is_finished]:
            live.remove(choice)
            forget(replica, choice)
    return num_evicted


def next_rows(replica: LocalReplica, choice: Choice, chunk: int) -> BatchSequence:
    """A prefill chunk of what has no KV yet; the last one, of one row while decoding, wants logits."""
    known = choice.prompt + choice.tokens
    start = replica.stages[0][0].kv.kv_tokens(choice.key)
    ids = tuple(known[start : start + chunk])
    return BatchSequence(choice.key, start, len(ids), start + len(ids) == len(known), ids)


def forget(replica: LocalReplica, choice: Choice) -> None:
    """Drop the KV of a choice on all ranks."""
    for ranks in replica.stages:
        for rank in ranks:
            rank.kv.free(choice.key)


def assert_undisturbed(single: LocalReplica, choices: list[Choice]) -> None:
    """Bits and tokens of each choice against the whole text in one forward of its own on (1, 1)."""
    for choice in choices:
        alone = Choice(choice.request, choice.index, choice.prompt, choice.parameters)
        text = tuple(choice.prompt + choice.tokens[:-1])
        rows = BatchSequence(choice.key, 0, len(text), True, text, num_logits=len(choice.tokens))
        for row in single.forward(StageBatch((rows,))):
            alone.take(row)
        forget(single, choice)
        assert [True] * len(choice.tokens) == [
            torch.equal(*pair) for pair in zip(alone.logits, choice.logits, strict=True)
        ]
        assert alone.tokens == choice.tokens


def undisturbed_after_churn(
    folder: Path, *, degrees: tuple[int, int], dtype: str, prepacked: bool, number: int, seed: int
) -> None:
    """One drawn scene."""
    rng = random.Random(seed)
    choices = drawn_choices(number, rng)
    replica = LocalReplica(
        folder, pipeline=degrees[0], tensor=degrees[1], dtype=dtype, num_blocks=4 * number, prepacked=prepacked
    )
    num_evicted = serve_with_churn(replica, choices, rng)
    assert num_evicted > 0
    assert_undisturbed(LocalReplica(folder, dtype=dtype, num_blocks=8, prepacked=prepacked), choices)


def drawn_scenes() -> list[tuple[tuple[int, int], str, bool]]:
    """A cut for each variant, drawn from all of them, odd ones included."""
    drawn = random.Random(3).sample([cut for cut in DEGREES if cut[1] > 1], len(VARIANTS))
    assert any(tensor % 2 for _, tensor in drawn)
    return [(cut, *variant) for cut, variant in zip(drawn, VARIANTS, strict=True)]


@pytest.mark.thorough
@pytest.mark.parametrize(("degrees", "dtype", "prepacked"), drawn_scenes())
def test_bits_do_not_depend_on_churn(deep: Path, degrees: tuple[int, int], dtype: str, prepacked: bool) -> None:
    """Tests a drawn (P, M) for each variant with 16 sequences that come, pause, go and are evicted."""
    undisturbed_after_churn(deep, degrees=degrees, dtype=dtype, prepacked=prepacked, number=16, seed=1)


def test_chunks_of_few_inputs(deep: Path) -> None:
    """Tests the scene in which the product of a chunk of 8 inputs, a head of 8, had other bits among 40 rows."""
    undisturbed_after_churn(deep, degrees=(1, 1), dtype="bfloat16", prepacked=False, number=64, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
@pytest.mark.parametrize("degrees", DEGREES)
def test_bits_do_not_depend_on_churn_at_any_cut(
    deep: Path, degrees: tuple[int, int], dtype: str, prepacked: bool
) -> None:
    """Tests every (P, M) of up to 8 workers with batches of up to 64 sequences."""
    undisturbed_after_churn(deep, degrees=degrees, dtype=dtype, prepacked=prepacked, number=64, seed=sum(degrees))
