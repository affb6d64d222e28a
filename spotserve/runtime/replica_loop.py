"""What every rank of a replica runs: its stage over the leader's descriptors, on a thread of its own.

All ranks run the same `StageRunner` over the same descriptors, in the same order; the leader (leader.py) makes them,
the followers obey. A rank that loses a mesh peer says so once and ends; its KV stays until the release.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import ReplicaId
from spotserve.core.sampling import SamplingParameters, TokenLogprobs
from spotserve.core.wire import ReplicaBroken, WorkerMessage
from spotserve.errors import InvariantError, MeshError
from spotserve.log import get_logger
from spotserve.runtime.checkpoint import TORCH_DTYPES
from spotserve.runtime.descriptor import (
    Admitted,
    Adopt,
    Answer,
    Free,
    Missing,
    Run,
    RunItem,
    Sampled,
    Stop,
    decode,
    encode,
)
from spotserve.runtime.envelope import places
from spotserve.runtime.kv_migration import IncomingKv
from spotserve.runtime.mesh import Mesh
from spotserve.runtime.sampler import NO_TOKEN, Draw, History, sample, token_logprobs
from spotserve.runtime.stage_model import BatchSequence, StageBatch, StageModel

LEADER = 0

log = get_logger("replica_loop")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank sits in its replica, and what its messages are signed with."""

    replica: ReplicaId
    generation: int
    stage: int
    rank: int
    pipeline: int
    tensor: int

    @property
    def mesh_rank(self) -> int:
        """stage * M + rank."""
        return self.stage * self.tensor + self.rank

    @property
    def sampler(self) -> int:
        """The mesh rank that samples: the last stage's first."""
        return (self.pipeline - 1) * self.tensor

    @property
    def num_ranks(self) -> int:
        """Ranks of the replica."""
        return self.pipeline * self.tensor

    @property
    def is_leader(self) -> bool:
        """Whether this rank schedules."""
        return self.mesh_rank == LEADER


@dataclass(frozen=True, slots=True)
class _Sampling:
    """What the sampler knows of a sequence: all that a token depends on beside its logits."""

    parameters: SamplingParameters
    history: History | None

    @classmethod
    def of(cls, admitted: Admitted) -> _Sampling:
        """As the leader told it, which knows every token wherever the sequence comes from."""
        parameters = admitted.sampling
        return cls(parameters, History(admitted.history) if parameters.needs_history else None)

    def draw(self, item: RunItem) -> Draw:
        """What its next token is drawn by."""
        assert item.position is not None
        return Draw(self.parameters, item.key.choice, item.position, self.history)


class StageRunner:
    """One rank's part of an iteration: descriptor and activations in, activations or tokens out."""

    def __init__(self, place: Place, model: StageModel, mesh: Mesh, incoming: IncomingKv) -> None:
        self.place = place
        self.mesh = mesh
        self._model = model
        self._incoming = incoming
        self._sampling: dict[SequenceKey, _Sampling] = {}

    def run(self, run: Run) -> Sampled | None:
        """Execute a micro-batch; what was sampled on the sampler rank, None elsewhere."""
        self.free(run.freed)
        if self.place.mesh_rank == self.place.sampler:
            self._sampling.update((admitted.key, _Sampling.of(admitted)) for admitted in run.admitted)
        batch = StageBatch(
            tuple(
                BatchSequence(
                    key=item.key,
                    start=item.start,
                    count=item.count,
                    wants_logits=item.num_logits > 0,
                    token_ids=item.token_ids,
                    num_logits=item.num_logits,
                )
                for item in run.items
            )
        )
        self._incoming.take_blocks([(item.key, item.start + item.count) for item in batch.sequences])
        out = self._model.forward(batch, self._receive_hidden(batch))
        if self.place.stage < self.place.pipeline - 1:
            self.mesh.send_tensor(self.place.mesh_rank + self.place.tensor, out.contiguous())
            return None
        logits = self._model.full_logits(out)
        return self._sample(run, logits) if self.place.rank == 0 else None

    def adopt(self, adopt: Adopt) -> Missing:
        """Take over sequences that were copied in; says which are not complete here."""
        missing = self._incoming.adopt(adopt.sequences, is_exclusive=adopt.is_exclusive)
        return Missing(missing)

    def free(self, keys: Sequence[SequenceKey]) -> None:
        """Drop sequences."""
        for key in keys:
            self._incoming.free(key)
            self._sampling.pop(key, None)

    def _receive_hidden(self, batch: StageBatch) -> Tensor | None:
        if self.place.stage == 0:
            return None
        model = self._model.model
        hidden = torch.empty((batch.rows, model.hidden_size), dtype=TORCH_DTYPES[model.dtype])
        self.mesh.recv_tensor(self.place.mesh_rank - self.place.tensor, hidden)
        return hidden

    def _sample(self, run: Run, logits: Tensor) -> Sampled:
        prompt_logprobs, draws, rows, row = [], [], [], 0
        for index, item in enumerate(run.items):
            if item.targets:
                scored = self._score(item, logits[row : row + len(item.targets)])
                prompt_logprobs.append((index, scored))
            row += item.num_logits
            if item.position is not None:
                draws.append(self._sampling[item.key].draw(item))
                rows.append(row - 1)
        sampled = logits[rows] if prompt_logprobs else logits
        token_ids = tuple(sample(sampled, draws))
        for draw, token_id in zip(draws, token_ids, strict=True):
            if draw.history is not None and token_id != NO_TOKEN:
                draw.history.add(token_id)
        return Sampled(run.number, token_ids, _logprobs(sampled, draws, token_ids), tuple(prompt_logprobs))

    def _score(self, item: RunItem, logits: Tensor) -> tuple[TokenLogprobs, ...]:
        """The logprobs of the prompt tokens that follow these rows."""
        num_top = self._sampling[item.key].parameters.logprobs or 0
        return tuple(token_logprobs(row, target, num_top) for row, target in zip(logits, item.targets, strict=True))


def _logprobs(logits: Tensor, draws: Sequence[Draw], token_ids: Sequence[int]) -> tuple[TokenLogprobs | None, ...]:
    """Of each new token whose request asked; empty when none did."""
    if all(draw.parameters.logprobs is None for draw in draws):
        return ()
    return tuple(
        None
        if (num_top := draw.parameters.logprobs) is None or token_id == NO_TOKEN
        else token_logprobs(row, token_id, num_top)
        for row, draw, token_id in zip(logits, draws, token_ids, strict=True)
    )


class ReplicaLoop:
    """A rank's thread: what leader and follower share."""

    def __init__(self, runner: StageRunner, send: Callable[[WorkerMessage], None]) -> None:
        self.place = runner.place
        self._runner = runner
        self._mesh = runner.mesh
        self._send = send
        self._is_stopping = False
        self.broken: str | None = None
        name = f"{self.place.replica}.{self.place.generation}"
        self._thread = threading.Thread(target=self._run, name=f"replica-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the loop and the mesh; a loop that is stuck in the mesh is woken by its end."""
        self._is_stopping = True
        self._wake()
        if self.place.is_leader:
            self._thread.join(timeout_s)
        self._mesh.close()
        self._thread.join()

    def report(self) -> ReplicaBroken | None:
        """What this rank said when it broke, for a coordinator that may not have heard."""
        if self.broken is None:
            return None
        return ReplicaBroken(replica=self.place.replica, generation=self.place.generation, detail=self.broken)

    def _wake(self) -> None:
        """Make a loop that waits for work look at `_is_stopping`."""

    def _iterate(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            self._iterate()
        except MeshError as error:
            self._break(error.message)
        except ValidationError as error:
            # Its text quotes what a client sent; the detail goes to the journal, the rest to the log.
            traceback.print_tb(error.__traceback__)
            self._break(f"{type(error).__name__}: {places(error)}")
        except Exception as error:  # noqa: BLE001  # The thread's edge: whatever it is, the replica cannot go on.
            traceback.print_exc()
            self._break(f"{type(error).__name__}: {error}")
        finally:
            self._finish()

    def _break(self, detail: str) -> None:
        if self._is_stopping:
            return
        self.broken = detail
        log.warning("replica_broken", replica=self.place.replica, generation=self.place.generation, detail=detail)
        report = self.report()
        assert report is not None
        self._send(report)
        self._mesh.close()  # So that the peers that do not talk to the lost one learn of it too.

    def _finish(self) -> None:
        """Whatever is left to answer."""


class Follower(ReplicaLoop):
    """Every rank but the leader: blocked on the leader's next descriptor."""

    def _iterate(self) -> None:
        while True:
            descriptor = decode(self._mesh.recv_control(LEADER, None))
            answer: Answer | None = None
            match descriptor:
                case Free():
                    self._runner.free(descriptor.keys)
                case Run():
                    answer = self._runner.run(descriptor)
                case Adopt():
                    answer = self._runner.adopt(descriptor)
                case Stop():
                    return
                case _:
                    raise InvariantError(f"follower was sent {type(descriptor).__name__}")
            if answer is not None:
                self._mesh.send_control(LEADER, encode(answer))
