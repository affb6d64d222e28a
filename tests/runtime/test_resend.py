"""What a leader says again: in messages that the stream carries, and never in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.sampling import RankedToken, TokenLogprobs
from spotserve.core.spec import ModelSpec
from spotserve.core.wire import ReplicaBroken, TokenRun, Tokens
from spotserve.runtime import leader
from spotserve.runtime.envelope import MAX_MESSAGE_BYTES
from spotserve.runtime.model_table import describe_model
from tests.runtime.models import write_llama
from tests.runtime.test_generation_parameters import NUM_TOKENS, content, finished, told
from tests.runtime.test_replica_loop import TIMEOUT_S, Replica, result, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return write_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelSpec:
    """Its description."""
    return describe_model(folder)


def test_a_resend_never_outgrows_a_message(folder: Path, model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that what is said again is split by its size, that the first part alone lifts the hold, and keeps all."""
    replica = Replica(folder, model, pipeline=1, tensor=1)
    replica.keeps_up = False
    names = ["a", "b", "c"]
    with running(replica):
        result(replica.leader.admit([content(name, arrival_index=at, logprobs=20) for at, name in enumerate(names)]))
        before = {name: finished(replica, name) for name in names}
        replica.leader.resend()
        result(replica.leader.progress())
        (whole,) = replica.said[-1:]
        assert isinstance(whole, Tokens)
        assert names == [run.request for run in whole.runs]
        monkeypatch.setattr(leader, "MAX_RUNS_BYTES", len(whole.model_dump_json()))
        count = len(replica.said)
        replica.leader.resend()
        result(replica.leader.progress())
        parts = [message for message in replica.said[count:] if isinstance(message, Tokens)]
    assert 1 < len(parts)
    assert [True, *[False] * (len(parts) - 1)] == [message.again for message in parts]
    runs = [run for message in parts for run in message.runs]
    assert before == {run.request: told([run]) for run in runs}
    assert list(whole.runs) == runs


def test_the_size_of_a_run_is_never_underestimated() -> None:
    """Tests that parts of the largest ids and the longest floats stay within the bound as JSON, and lose nothing."""
    long = -2.2250738585072014e-308
    scored = (TokenLogprobs(long, (RankedToken(2**32 - 1, long),) * 20),) * 40
    runs = [
        TokenRun(
            request=RequestId("f" * 32),
            choice=127,
            position=10**9,
            token_ids=(2**32 - 1,) * 40,
            finish_reason="length",
            logprobs=scored,
        )
    ] * 700
    parts = leader.parts_of(runs)
    assert runs == [run for part in parts for run in part]
    sizes = [
        len(Tokens(replica=ReplicaId("r1"), generation=1, runs=part, again=True).model_dump_json()) for part in parts
    ]
    assert leader.MAX_RUNS_BYTES // 2 < sizes[0]
    assert max(sizes) <= leader.MAX_RUNS_BYTES < MAX_MESSAGE_BYTES


def test_a_resend_that_cannot_be_breaks_the_replica(folder: Path, model: ModelSpec) -> None:
    """Tests that being asked for logprobs that were durable before is told, not lost with all that was to be said."""
    replica = Replica(folder, model, pipeline=1, tensor=1)
    replica.keeps_up = False
    with running(replica):
        result(replica.leader.admit([content("a", logprobs=2), content("b", arrival_index=1)]))
        finished(replica, "a")
        finished(replica, "b")
        replica.leader.set_durable([(RequestId("a"), 0, NUM_TOKENS - 1)])
        replica.leader.resend([(RequestId("a"), 0, 3), (RequestId("b"), 0, 0)])
        with replica.changed:
            assert replica.changed.wait_for(
                lambda: any(isinstance(message, ReplicaBroken) for message in replica.said), TIMEOUT_S
            )
        (broken,) = [message for message in replica.said if isinstance(message, ReplicaBroken)]
        assert "InvariantError: request a is asked for tokens from 3" in broken.detail
