"""Leader and followers over a real mesh in one process: what is asked of a replica, and what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest
import torch

from spotserve.core.batching import BatchLimits, SequenceKey
from spotserve.core.ids import ReplicaId, RequestId
from spotserve.core.sampling import SamplingParameters
from spotserve.core.slices import layer_split, stage_shard
from spotserve.core.spec import ModelSpec
from spotserve.core.wire import (
    ChoiceContent,
    Evicted,
    ReplicaBroken,
    RequestContent,
    ReserveCommand,
    TokenRun,
    Tokens,
    WorkerMessage,
)
from spotserve.runtime.descriptor import Admitted, Run, encode
from spotserve.runtime.holdings import Holdings, Position
from spotserve.runtime.kv_migration import Rectangle
from spotserve.runtime.leader import Leader, ReplicaEndedError
from spotserve.runtime.mesh import MeshListener, join
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.replica_loop import Follower
from spotserve.runtime.weight_transfer import load_slices
from tests.runtime.cluster import serving_spec
from tests.runtime.models import LocalReplica, key_of, write_llama

TIMEOUT_S = 30.0
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return write_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelSpec:
    """Its description."""
    return describe_model(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    """What one process generates after the test's prompt."""
    return LocalReplica(folder).generate(key_of(0), PROMPT, 120)


PROMPT = tuple(torch.randint(0, 500, (25,), generator=torch.Generator().manual_seed(3)).tolist())


class Replica:
    """P x M ranks as threads of this process, and all that they said."""

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        *,
        pipeline: int,
        tensor: int,
        kv_blocks: int = 64,
        token_budget: int = 64,
        layers: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`layers` are those of each stage where they are not dealt out evenly."""
        self.said: list[WorkerMessage] = []
        self.changed = threading.Condition()
        self.keeps_up = True
        spec = serving_spec(model)
        self.listeners = [MeshListener() for _ in range(pipeline * tensor)]
        self.held = [Holdings(spec, folder=folder, memory_bytes=1 << 28, device="cpu") for _ in self.listeners]
        self.positions: list[Position] = []
        for index, held in enumerate(self.held):
            stage, rank = divmod(index, tensor)
            held.reserve(
                ReserveCommand(
                    term=1,
                    command="c",
                    epoch=1,
                    replica=ReplicaId("r1"),
                    generation=1,
                    stage=stage,
                    rank=rank,
                    pipeline=pipeline,
                    tensor=tensor,
                    shard=stage_shard(
                        model,
                        layers=(layers or layer_split(model.num_layers, pipeline))[stage],
                        tensor=tensor,
                        rank=rank,
                    ),
                    kv_blocks=kv_blocks,
                    max_running=4,
                )
            )
            position = held.position(ReplicaId("r1"), 1)
            assert position is not None
            load_slices(held, position.slices)
            self.positions.append(position)
        self._join(pipeline, tensor)
        runners = [held.build(position) for held, position in zip(self.held, self.positions, strict=True)]
        limits = BatchLimits(num_blocks=kv_blocks, max_running=4, max_in_flight=pipeline, token_budget=token_budget)
        self.leader = Leader(runners[0], limits, self.hear)
        self.loops = [self.leader, *(Follower(runner, self.hear) for runner in runners[1:])]

    def _join(self, pipeline: int, tensor: int) -> None:
        addresses = [listener.address for listener in self.listeners]

        def one(rank: int) -> None:
            self.positions[rank].mesh = join(
                self.listeners[rank],
                "r1.1",
                rank,
                addresses,
                b"secret",
                pipeline_degree=pipeline,
                tensor_degree=tensor,
                timeout_s=TIMEOUT_S,
                cancelled=threading.Event(),
            )

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(addresses))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def start(self) -> None:
        """All ranks begin."""
        for loop in self.loops:
            loop.start()

    def stop(self) -> None:
        """All ranks end; the followers first, as a release may well come."""
        for loop in reversed(self.loops):
            loop.stop()
        for listener in self.listeners:
            listener.close()

    def hear(self, message: WorkerMessage) -> None:
        """What a rank says; a ledger that keeps up answers tokens."""
        if isinstance(message, Tokens) and self.keeps_up:
            self.leader.set_durable([(r.request, r.choice, r.position + len(r.token_ids)) for r in message.runs])
        with self.changed:
            self.said.append(message)
            self.changed.notify_all()

    def runs(self, name: str, choice: int = 0) -> list[TokenRun]:
        """Everything said of a choice."""
        return [
            run
            for message in self.said
            if isinstance(message, Tokens)
            for run in message.runs
            if (run.request, run.choice) == (name, choice)
        ]

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        """The stream of a choice; doubles must agree."""
        stream: list[int] = []
        for run in self.runs(name, choice):
            overlap = len(stream) - run.position
            assert overlap >= 0
            assert stream[run.position :] == list(run.token_ids[:overlap])
            stream += run.token_ids[overlap:]
        return stream

    def wait(self, name: str, count: int) -> None:
        """Until a choice has so many tokens."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.tokens(name)) >= count, TIMEOUT_S)

    def wait_free(self, num_blocks: int) -> None:
        """Until every rank has so many free blocks; followers are told after the leader has spoken."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while [position.kv.num_free for position in self.positions] != [num_blocks] * len(self.positions):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


@contextmanager
def running(replica: Replica) -> Iterator[Replica]:
    """Start, and stop whatever happens."""
    replica.start()
    try:
        yield replica
    finally:
        replica.stop()


def request(name: str, *, max_tokens: int = 120, kv_tokens: int = 0, token_ids: tuple[int, ...] = ()) -> RequestContent:
    """A greedy request of one choice."""
    return RequestContent(
        request=RequestId(name),
        arrival_index=0,
        prompt_ids=PROMPT,
        sampling=SamplingParameters(temperature=0.0, seed=1, max_tokens=max_tokens, ignore_eos=True),
        choices=(ChoiceContent(choice=0, kv_generation=0, token_ids=token_ids, kv_tokens=kv_tokens),),
    )


def result(future: Future[Result]) -> Result:
    """What was asked for."""
    return future.result(TIMEOUT_S)


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (3, 1), (2, 2)])
def test_quiesce_reports_what_was_said_and_resume_goes_on(
    folder: Path, model: ModelSpec, expected: list[int], pipeline: int, tensor: int
) -> None:
    """Tests that all tokens up to the quiesced positions were said before, and that a resumed stream is the same."""
    with running(Replica(folder, model, pipeline=pipeline, tensor=tensor)) as replica:
        result(replica.leader.admit([request("a"), request("b")]))
        replica.wait("a", 10)
        report = result(replica.leader.quiesce())
        said = {name: len(replica.tokens(name)) for name in ("a", "b")}
        assert said == {position.request: position.tokens for position in report.positions}
        assert [25 + count - 1 for count in said.values()] == [p.kv_tokens for p in report.positions]
        assert replica.leader.is_quiesced
        assert report.positions == result(replica.leader.quiesce()).positions
        result(replica.leader.resume())
        replica.wait("a", 120)
        replica.wait("b", 120)
        assert [expected, expected] == [replica.tokens("a"), replica.tokens("b")]
        assert "length" == replica.runs("a")[-1].finish_reason
        assert [] == [message for message in replica.said if not isinstance(message, Tokens)]
        replica.wait_free(64)


@pytest.mark.parametrize("tensor", [1, 2])
def test_uneven_stages_say_the_same_tokens(folder: Path, model: ModelSpec, expected: list[int], tensor: int) -> None:
    """Tests that a plan may deal out layers as it likes: one in the first stage and all others in the second."""
    layers = ((0, 1), (1, model.num_layers))
    assert layers != layer_split(model.num_layers, 2)
    with running(Replica(folder, model, pipeline=2, tensor=tensor, layers=layers)) as replica:
        result(replica.leader.admit([request("a")]))
        replica.wait("a", 120)
        assert expected == replica.tokens("a")


def test_a_close_frees_on_every_rank_and_a_repeat_changes_nothing(
    folder: Path, model: ModelSpec, expected: list[int]
) -> None:
    """Tests that a closed request says nothing more and leaves no block, and that a repeated admission runs once."""
    with running(Replica(folder, model, pipeline=2, tensor=1)) as replica:
        result(replica.leader.admit([request("a"), request("b")]))
        replica.wait("a", 5)
        result(replica.leader.admit([request("b")]))
        result(replica.leader.close(RequestId("a"), None))
        said = len(replica.tokens("a"))
        result(replica.leader.close(RequestId("unknown"), 3))
        replica.wait("b", 120)
        assert expected == replica.tokens("b")
        assert said == len(replica.tokens("a"))
        replica.wait_free(64)


def test_undurable_tokens_are_said_again(folder: Path, model: ModelSpec, expected: list[int]) -> None:
    """Tests that tokens are kept past their choice's end until they are durable, and are said again when asked."""
    replica = Replica(folder, model, pipeline=1, tensor=1)
    replica.keeps_up = False
    with running(replica):
        result(replica.leader.admit([request("a", max_tokens=40)]))
        replica.wait("a", 40)
        replica.leader.resend([(RequestId("a"), 0, 10)])
        replica.leader.resend()
        result(replica.leader.progress())
        again = replica.runs("a")[-2:]
        assert [10, 10] == [run.position for run in again]
        assert [tuple(expected[10:40])] * 2 == [run.token_ids for run in again]
        assert ["length", "length"] == [run.finish_reason for run in again]
        replica.leader.set_durable([(RequestId("a"), 0, 40)])
        count = len(replica.runs("a"))
        replica.leader.resend()
        result(replica.leader.progress())
        assert count == len(replica.runs("a"))


def test_progress_is_known_without_waiting_for_an_iteration(folder: Path, model: ModelSpec) -> None:
    """Tests that the last progress names a running choice, and is exact once the leader rests."""
    with running(Replica(folder, model, pipeline=1, tensor=1)) as replica:
        leader = replica.leader
        result(leader.admit([request("a")]))
        replica.wait("a", 60)
        assert [("a", 0)] == [(item.request, item.choice) for item in leader.last_progress.positions]
        assert 0 < leader.last_progress.iterations
        replica.wait("a", 120)
        replica.wait_free(64)
        deadline_s = time.monotonic() + TIMEOUT_S
        while leader.last_progress != result(leader.progress()):
            assert time.monotonic() < deadline_s
        assert () == leader.last_progress.positions


def test_a_stop_between_a_look_and_the_mail_is_seen(folder: Path, model: ModelSpec) -> None:
    """Tests that an idle leader ends although the mail that was to wake it was read before it came to rest."""
    replica = Replica(folder, model, pipeline=1, tensor=1)
    leader = replica.leader
    read_mail, stoppers = leader._read_mail, [threading.Thread(target=leader.stop, daemon=True)]

    def stopped_just_before(*, wait: bool) -> None:
        if stoppers:
            stoppers.pop().start()
            while leader._mailbox.empty():
                time.sleep(0.001)
        read_mail(wait=wait)

    with mock.patch.object(leader, "_read_mail", stopped_just_before):
        leader.start()
        leader._thread.join(TIMEOUT_S)
    assert not leader._thread.is_alive()
    replica.stop()


def test_a_lost_rank_is_reported_once_by_each_survivor(folder: Path, model: ModelSpec) -> None:
    """Tests that every rank left says that the replica broke, that asking it afterwards fails, and that KV stays."""
    with running(Replica(folder, model, pipeline=3, tensor=1)) as replica:
        result(replica.leader.admit([request("a", max_tokens=400)]))
        replica.wait("a", 5)
        replica.loops[2].stop()
        with replica.changed:
            broken = [ReplicaBroken] * 2
            assert replica.changed.wait_for(
                lambda: [type(m) for m in replica.said if isinstance(m, ReplicaBroken)] == broken, TIMEOUT_S
            )
        with pytest.raises(ReplicaEndedError):
            result(replica.leader.quiesce())
        assert [False, False, True] == [loop.broken is None for loop in replica.loops]
        assert replica.positions[0].kv.kv_tokens(SequenceKey("a", 0, 0)) > 25
        assert 2 == len([message for message in replica.said if isinstance(message, ReplicaBroken)])


def test_a_break_quotes_no_client(folder: Path, model: ModelSpec, capfd: pytest.CaptureFixture[str]) -> None:
    """Tests that parameters a follower refuses are told by their place: neither the journal nor the log quotes them."""
    biased = Admitted(key_of(0), SamplingParameters(seed=1, max_tokens=9, logit_bias=((4711, 31.5),)))
    payload = encode(Run(1, (), (biased,), ())).replace(b"31.5", b'"of a client"')
    with running(Replica(folder, model, pipeline=2, tensor=1)) as replica:
        follower = replica.loops[1]
        replica.leader._mesh.send_control(1, payload)
        with replica.changed:
            assert replica.changed.wait_for(lambda: follower.report() in replica.said, TIMEOUT_S)
    assert "ValidationError: logit_bias.0.1: float_parsing" == follower.broken
    assert "of a client" not in "".join(capfd.readouterr())


def test_serving_goes_before_moving_in(folder: Path, model: ModelSpec, expected: list[int]) -> None:
    """Tests that KV copied in makes room for a running stream, and that its request is then prefilled again."""
    with running(Replica(folder, model, pipeline=2, tensor=1, kv_blocks=16)) as replica:
        incoming = replica.positions[1].incoming
        heads = replica.positions[1].kv.kv_heads
        layers = replica.positions[1].kv.layers
        shape = replica.positions[1].kv.block_shape(tokens=16, layers=layers, kv_heads=heads)
        moved = SequenceKey("moved", 0, 0)
        for block in range(10):
            assert incoming.write(moved, Rectangle(layers, heads), block, torch.zeros(shape))
        result(replica.leader.admit([request("a")]))
        replica.wait("a", 120)
        assert expected == replica.tokens("a")
        assert 0 == incoming.tokens_in(moved, Rectangle(layers, heads))
        result(replica.leader.admit([request("moved", kv_tokens=30, token_ids=tuple(expected[:6]))]))
        with replica.changed:
            assert replica.changed.wait_for(lambda: any(r.finish_reason for r in replica.runs("moved")), TIMEOUT_S)
        moved_tokens = [token for run in replica.runs("moved") for token in run.token_ids]
        assert expected[6:] == moved_tokens
        evicted = [message for message in replica.said if isinstance(message, Evicted)]
        assert [("moved", 1)] == [(message.request, message.kv_generation) for message in evicted]
