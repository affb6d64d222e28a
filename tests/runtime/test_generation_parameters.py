"""Penalties, bias, `min_tokens` and logprobs on every path by which a sequence reaches a sampler: the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.sampling import SamplingParameters, TokenLogprobs
from spotserve.core.spec import ModelSpec
from spotserve.core.wire import ChoiceContent, Evicted, RequestContent, TokenRun
from spotserve.runtime import leader as leader_module
from spotserve.runtime.kv_migration import Rectangle
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.sampler import token_logprobs
from spotserve.runtime.stage_model import BatchSequence, StageBatch, StageModel
from tests.runtime.models import LocalReplica, key_of, write_llama
from tests.runtime.test_replica_loop import TIMEOUT_S, Replica, result, running

NUM_TOKENS = 60
PROMPT = tuple(torch.randint(0, 500, (25,), generator=torch.Generator().manual_seed(3)).tolist())
LONG_PROMPT = tuple(torch.randint(0, 500, (450,), generator=torch.Generator().manual_seed(4)).tolist())
SHAPES = [(1, 1), (3, 1), (2, 2)]

STEERED: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.95,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.9,
    "logit_bias": ((7, 6.0), (8, 5.0), (9, -100.0)),
    "min_tokens": 40,
    "stop_token_ids": tuple(range(450, 500)),
    "ignore_eos": False,
    "logprobs": 3,
}
"""Ends somewhere past its 40th token, unlike what it would be without `min_tokens`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return write_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelSpec:
    """Its description."""
    return describe_model(folder)


def content(
    name: str = "a",
    *,
    prompt_ids: tuple[int, ...] = PROMPT,
    token_ids: Sequence[int] = (),
    kv_tokens: int = 0,
    arrival_index: int = 0,
    **changes: Any,
) -> RequestContent:
    """A request of one choice."""
    fields = {"temperature": 0.0, "seed": 5, "max_tokens": NUM_TOKENS, "ignore_eos": True, **changes}
    choice = ChoiceContent(choice=0, kv_generation=0, token_ids=tuple(token_ids), kv_tokens=kv_tokens)
    return RequestContent(
        request=RequestId(name),
        arrival_index=arrival_index,
        prompt_ids=prompt_ids,
        sampling=SamplingParameters(**fields),
        choices=(choice,),
    )


@dataclass(frozen=True)
class Told:
    """All that was said of a choice, doubles left out."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    finish_reason: str | None


def told(runs: Sequence[TokenRun], known: int = 0) -> Told:
    """The runs of a choice of which `known` tokens had been said before, put together; doubles must agree."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    for run in runs:
        at = run.position - known
        assert at <= len(token_ids)
        assert token_ids[at:] == list(run.token_ids[: len(token_ids) - at])
        assert logprobs[at:] == list(run.logprobs[: len(logprobs) - at])
        logprobs += run.logprobs[len(logprobs) - at :]
        token_ids += run.token_ids[len(token_ids) - at :]
        assert not run.prompt_logprobs or run.position == 0
        assert prompt_logprobs in ([], list(run.prompt_logprobs)) or not run.prompt_logprobs
        prompt_logprobs = prompt_logprobs or list(run.prompt_logprobs)
    return Told(token_ids, logprobs, prompt_logprobs, runs[-1].finish_reason)


def finished(replica: Replica, name: str = "a", known: int = 0) -> Told:
    """What was said of a request once it has ended."""
    with replica.changed:
        assert replica.changed.wait_for(
            lambda: any(run.finish_reason for run in replica.runs(name)) or replica.leader.broken, TIMEOUT_S
        )
        assert replica.leader.broken is None
        return told(replica.runs(name), known)


def undisturbed(folder: Path, model: ModelSpec, request: RequestContent) -> Told:
    """What one process says to a request."""
    with running(Replica(folder, model, pipeline=1, tensor=1)) as replica:
        result(replica.leader.admit([request]))
        return finished(replica)


@pytest.fixture(scope="module")
def expected(folder: Path, model: ModelSpec) -> Told:
    """What `STEERED` gives undisturbed."""
    return undisturbed(folder, model, content(**STEERED))


def test_penalties_bias_and_min_tokens_are_what_they_say(folder: Path, model: ModelSpec) -> None:
    """Tests a greedy run against logits, counts and masks put together here, token by token."""
    parameters = {**STEERED, "temperature": 0.0, "logprobs": None}
    actual = undisturbed(folder, model, content(**parameters)).token_ids
    local, tokens = LocalReplica(folder), list[int]()
    logits = local.prefill(key_of(0), PROMPT, chunk=64)
    while len(tokens) < len(actual):
        row = logits.double().tolist()
        for token, count in Counter(tokens).items():
            row[token] = row[token] - (count * 0.9 + 0.7)
        for token, bias in ((7, 6.0), (8, 5.0), (9, -100.0)):
            row[token] += bias
        if len(tokens) < 40:
            row[450:500] = [-1e9] * 50
        tokens.append(row.index(max(row)))
        logits = local.decode({key_of(0): tokens[-1]})[0]
    assert tokens == actual
    assert 40 <= len(actual)
    assert len(actual) == NUM_TOKENS or actual[-1] >= 450


def test_each_parameter_changes_the_answer(folder: Path, model: ModelSpec, expected: Told) -> None:
    """Tests that none of the parameters could be lost on the way without another answer."""
    assert 40 <= len(expected.token_ids)
    assert not set(expected.token_ids[:40]) & set(range(450, 500))
    for neutral in ({"presence_penalty": 0.0}, {"frequency_penalty": 0.0}, {"logit_bias": ()}, {"min_tokens": 0}):
        other = undisturbed(folder, model, content(**{**STEERED, **neutral}))
        assert expected.token_ids != other.token_ids


def test_logprobs_are_the_models_own(folder: Path, expected: Told) -> None:
    """Tests each token's logprob, and the best three, against the raw logits: no bias or penalty is in them."""
    local = LocalReplica(folder)
    logits = local.prefill(key_of(0), PROMPT, chunk=64)
    for token, actual in zip(expected.token_ids, expected.logprobs, strict=True):
        row = torch.log_softmax(logits.double(), dim=-1)
        assert float(row[token]) == actual.logprob
        assert [float(value) for value in row.sort(descending=True).values[:3]] == [one.logprob for one in actual.top]
        assert all(float(row[one.token_id]) == one.logprob for one in actual.top)
        logits = local.decode({key_of(0): token})[0]


# Every path to a sampler


def fresh(folder: Path, model: ModelSpec, shape: tuple[int, int], expected: Told) -> Told:
    """Admitted from the first token on, beside others that come and go."""
    with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1])) as replica:
        others = [content(name, prompt_ids=PROMPT[at:], max_tokens=10 * at) for at, name in ((2, "b"), (5, "c"))]
        result(replica.leader.admit([*others, content(**STEERED)]))
        return finished(replica)


def restarted(folder: Path, model: ModelSpec, shape: tuple[int, int], expected: Told) -> Told:
    """Started again from the ledger's tokens, without KV."""
    with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1])) as replica:
        result(replica.leader.admit([content(token_ids=expected.token_ids[:23], **STEERED)]))
        return joined(expected, 23, finished(replica, known=23))


def adopted(folder: Path, model: ModelSpec, shape: tuple[int, int], expected: Told) -> Told:
    """Quiesced in one replica, its KV copied into another one, and gone on with there."""
    with running(Replica(folder, model, pipeline=1, tensor=1)) as source:
        result(source.leader.admit([content(**STEERED)]))
        source.wait("a", 9)
        (position,) = result(source.leader.quiesce()).positions
        before = told(source.runs("a"))
        with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1])) as target:
            copy_kv(source, target, SequenceKey(RequestId("a"), 0, 0), position.kv_tokens)
            moved = content(token_ids=before.token_ids, kv_tokens=position.kv_tokens, **STEERED)
            result(target.leader.admit([moved]))
            after = finished(target, known=len(before.token_ids))
            assert not [message for message in target.said if isinstance(message, Evicted)]
    return joined(before, len(before.token_ids), after)


def bereft(folder: Path, model: ModelSpec, shape: tuple[int, int], expected: Told) -> Told:
    """Adopted by ranks that turn out to lack its KV: computed again under a new name."""
    with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1])) as replica:
        result(replica.leader.admit([content(token_ids=expected.token_ids[:12], kv_tokens=36, **STEERED)]))
        after = finished(replica, known=12)
        assert [1] == [message.kv_generation for message in replica.said if isinstance(message, Evicted)]
    return joined(expected, 12, after)


def evicted(folder: Path, model: ModelSpec, shape: tuple[int, int], expected: Told) -> Told:
    """Evicted for an older one, and computed again when that has ended."""
    with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1], kv_blocks=9)) as replica:
        older = content("older", max_tokens=100)
        result(replica.leader.admit([older, content(arrival_index=1, **STEERED)]))
        after = finished(replica)
        assert {"a"} == {message.request for message in replica.said if isinstance(message, Evicted)}
    return after


def resumed(folder: Path, model: ModelSpec, shape: tuple[int, int], expected: Told) -> Told:
    """Quiesced for a plan that was aborted."""
    with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1])) as replica:
        result(replica.leader.admit([content(**STEERED)]))
        replica.wait("a", 9)
        result(replica.leader.quiesce())
        result(replica.leader.resume())
        return finished(replica)


def joined(before: Told, num_tokens: int, after: Told) -> Told:
    """A choice of two lives."""
    return Told(
        before.token_ids[:num_tokens] + after.token_ids,
        before.logprobs[:num_tokens] + after.logprobs,
        before.prompt_logprobs + after.prompt_logprobs,
        after.finish_reason,
    )


def copy_kv(source: Replica, target: Replica, key: SequenceKey, num_tokens: int) -> None:
    """What a migration copies, from a replica of one rank."""
    kv = source.positions[0].kv
    for position in target.positions:
        layers, heads = position.kv.layers, position.kv.kv_heads
        for block in range(-(-num_tokens // 16)):
            rectangle = kv.export_block(key, block, layers=layers, kv_heads=heads)
            assert position.incoming.write(key, Rectangle(layers, heads), block, rectangle)


PATHS = (fresh, restarted, adopted, bereft, evicted, resumed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_every_path_to_a_sampler(
    folder: Path,
    model: ModelSpec,
    expected: Told,
    path: Callable[[Path, ModelSpec, tuple[int, int], Told], Told],
    shape: tuple[int, int],
) -> None:
    """Tests that tokens and logprob bits are the undisturbed ones however the sequence came to its sampler."""
    assert expected == path(folder, model, shape, expected)


@pytest.mark.parametrize("path", [restarted, adopted, bereft, evicted], ids=lambda path: path.__name__)
def test_a_lost_history_would_be_noticed(
    folder: Path,
    model: ModelSpec,
    expected: Told,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    path: Callable[[Path, ModelSpec, tuple[int, int], Told], Told],
) -> None:
    """Tests that a sampler which was not told what a choice has generated breaks rather than draw another token."""
    told_all = leader_module._Choice.admitted

    def forgetful(choice: Any, key: SequenceKey) -> Any:
        admitted = told_all(choice, key)
        return type(admitted)(admitted.key, admitted.sampling, ())

    monkeypatch.setattr(leader_module._Choice, "admitted", forgetful)
    with pytest.raises(AssertionError):
        path(folder, model, (1, 1), expected)
    assert "generated tokens known at position" in capfd.readouterr().err


@pytest.mark.thorough
def test_bfloat16_is_as_exact(tmp_path: Path) -> None:
    """Tests tokens and logprob bits, the prompt's included, in bfloat16 over cuts, chunks, eviction and adoption."""
    folder = write_llama(tmp_path, dtype=torch.bfloat16)
    model = describe_model(folder)
    assert model.dtype == "bfloat16"
    scored = content(**STEERED, prompt_logprobs=True)
    expected = undisturbed(folder, model, scored)
    assert len(PROMPT) - 1 == len(expected.prompt_logprobs)
    for pipeline, tensor in SHAPES[1:]:
        with running(Replica(folder, model, pipeline=pipeline, tensor=tensor, token_budget=20)) as replica:
            result(replica.leader.admit([content("b", arrival_index=1), scored]))
            assert expected == finished(replica)
    unscored = Told(expected.token_ids, expected.logprobs, [], expected.finish_reason)
    for path in (adopted, evicted):
        assert unscored == path(folder, model, (2, 2), unscored)


# The prompt's logprobs

SCORED: dict[str, Any] = {"logprobs": 2, "prompt_logprobs": True, "max_tokens": 6}


@pytest.fixture(scope="module")
def scores(folder: Path) -> list[TokenLogprobs]:
    """Of the long prompt's tokens but the first: one forward of one process, all rows at once."""
    rows = LocalReplica(folder).forward(
        StageBatch((BatchSequence(key_of(0), 0, len(LONG_PROMPT), True, LONG_PROMPT, len(LONG_PROMPT)),))
    )
    return [token_logprobs(row, token, 2) for row, token in zip(rows, LONG_PROMPT[1:], strict=False)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("token_budget", [24, 64, 512])
def test_a_prompt_is_scored_once_whatever_its_chunks(
    folder: Path, model: ModelSpec, scores: list[TokenLogprobs], shape: tuple[int, int], token_budget: int
) -> None:
    """Tests that chunked prefill over stages and ranks tells the bits of one forward, with the first token alone."""
    pipeline, tensor = shape
    with running(Replica(folder, model, pipeline=pipeline, tensor=tensor, token_budget=token_budget)) as replica:
        requests = [content("b", arrival_index=1), content(prompt_ids=LONG_PROMPT, **SCORED)]
        result(replica.leader.admit(requests))
        assert scores == finished(replica).prompt_logprobs
        assert [True, *[False] * 5] == [bool(run.prompt_logprobs) for run in replica.runs("a")]
        assert [] == finished(replica, "b").prompt_logprobs


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_may_be_all_there_is(
    folder: Path, model: ModelSpec, scores: list[TokenLogprobs], shape: tuple[int, int]
) -> None:
    """Tests that `max_tokens` 0 says the prompt's logprobs with its end, generates nothing and leaves no block."""
    with running(Replica(folder, model, pipeline=shape[0], tensor=shape[1])) as replica:
        silent = content("silent", prompt_ids=LONG_PROMPT, max_tokens=0)
        result(replica.leader.admit([content(prompt_ids=LONG_PROMPT, **{**SCORED, "max_tokens": 0}), silent]))
        assert Told([], [], scores, "length") == finished(replica)
        assert Told([], [], [], "length") == finished(replica, "silent")
        assert [1, 1] == [len(replica.runs(name)) for name in ("a", "silent")]
        replica.wait_free(64)
        replica.leader.resend()
        result(replica.leader.progress())
        assert [1, 1] == [len(replica.runs(name)) for name in ("a", "silent")]


def test_an_eviction_in_mid_prompt_goes_on_behind_what_is_scored(
    folder: Path, model: ModelSpec, scores: list[TokenLogprobs]
) -> None:
    """Tests that a prompt that was evicted while it was prefilled tells each logprob once, with the same bits."""
    with running(Replica(folder, model, pipeline=1, tensor=1, kv_blocks=32, token_budget=24)) as replica:
        scored = content(prompt_ids=LONG_PROMPT, arrival_index=1, **SCORED)
        result(replica.leader.admit([content("older", max_tokens=80), scored]))
        assert scores == finished(replica).prompt_logprobs
        order = [message for message in replica.said if isinstance(message, Evicted) or names(message, "a")]
        assert isinstance(order[0], Evicted), "it was not evicted before its first token"


def names(message: Any, name: str) -> bool:
    """Whether tokens of a request are in a message."""
    return any(run.request == name for run in getattr(message, "runs", ()))


def test_a_prompt_moved_half_way_is_scored_from_its_start(
    folder: Path, model: ModelSpec, scores: list[TokenLogprobs]
) -> None:
    """Tests that KV of a part of a prompt is dropped where its logprobs stayed behind, and that none is lost."""
    local = LocalReplica(folder)
    local.prefill(key_of(0), LONG_PROMPT[:96], chunk=96)
    with running(Replica(folder, model, pipeline=2, tensor=1)) as replica:
        key = SequenceKey(RequestId("a"), 0, 0)
        for position in replica.positions:
            layers, heads = position.kv.layers, position.kv.kv_heads
            for block in range(6):
                rectangle = local.stages[0][0].kv.export_block(key_of(0), block, layers=layers, kv_heads=heads)
                assert position.incoming.write(key, Rectangle(layers, heads), block, rectangle)
        result(replica.leader.admit([content(prompt_ids=LONG_PROMPT, kv_tokens=96, **SCORED)]))
        assert scores == finished(replica).prompt_logprobs
        assert [1] == [message.kv_generation for message in replica.said if isinstance(message, Evicted)]


def test_logprobs_are_said_again_until_they_are_durable(folder: Path, model: ModelSpec, expected: Told) -> None:
    """Tests that a resend brings each token with its logprobs, the prompt's with the first, and then no more."""
    replica = Replica(folder, model, pipeline=1, tensor=1)
    replica.keeps_up = False
    with running(replica):
        result(replica.leader.admit([content(prompt_ids=LONG_PROMPT, **SCORED)]))
        first = finished(replica)
        replica.leader.resend()
        replica.leader.set_durable([(RequestId("a"), 0, 4)])
        replica.leader.resend()
        result(replica.leader.progress())
        whole, rest = replica.runs("a")[-2:]
        assert first == told([whole])
        assert (4, first.token_ids[4:], first.logprobs[4:], ()) == (
            rest.position,
            list(rest.token_ids),
            list(rest.logprobs),
            rest.prompt_logprobs,
        )


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1)])
def test_a_choice_without_finite_logits_ends_alone(
    folder: Path, model: ModelSpec, monkeypatch: pytest.MonkeyPatch, degrees: tuple[int, int]
) -> None:
    """Tests that a choice whose logits overflow ends with an error, and neither the replica nor its neighbour does."""
    full_logits, num_calls = StageModel.full_logits, 0

    def overflowing(self: StageModel, local: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        logits = full_logits(self, local).clone()
        num_calls += 1
        if num_calls == 20:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(StageModel, "full_logits", overflowing)
    pipeline, tensor = degrees
    with running(Replica(folder, model, pipeline=pipeline, tensor=tensor)) as replica:
        result(replica.leader.admit([content("a"), content("b", arrival_index=1)]))
        finished(replica, "a")
        finished(replica, "b")
        reasons = {name: next(run.finish_reason for run in replica.runs(name)[::-1]) for name in "ab"}
        assert {"error", "length"} == set(reasons.values())
        failed = next(name for name in "ab" if reasons[name] == "error")
        assert sum(len(run.token_ids) for run in replica.runs(failed)) < NUM_TOKENS
