"""The leader of a replica: takes requests, schedules micro-batches, commits tokens and speaks for all ranks.

It owns the batcher and all that is asked of the replica: requests, closings, a quiesce are posted to its thread and
done between micro-batches. With P stages up to P micro-batches are out, so that it works on one while the last stage
samples another. A token leaves as soon as it is committed; what the ledger has not is kept to be said again.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from spotserve.core.admission import Start
from spotserve.core.batching import Batcher, BatchItem, BatchLimits, MicroBatch, SequenceKey
from spotserve.core.batching import Sequence as BatchedSequence
from spotserve.core.ids import RequestId
from spotserve.core.sampling import SamplingParameters, TokenLogprobs
from spotserve.core.wire import (
    ChoiceContent,
    ChoicePosition,
    Evicted,
    FinishReason,
    RequestContent,
    TokenRun,
    Tokens,
    WorkerMessage,
)
from spotserve.errors import InvariantError, MeshError, SpotServeError
from spotserve.log import get_logger
from spotserve.runtime.descriptor import (
    Admitted,
    Adopt,
    Descriptor,
    Free,
    Missing,
    Run,
    RunItem,
    Sampled,
    Stop,
    decode,
    encode,
)
from spotserve.runtime.envelope import MAX_MESSAGE_BYTES
from spotserve.runtime.replica_loop import ReplicaLoop, StageRunner
from spotserve.runtime.sampler import NO_TOKEN

Result = TypeVar("Result")

_PROGRESS_PERIOD_S = 0.01

MAX_RUNS_BYTES = MAX_MESSAGE_BYTES // 4
"""Runs go out in messages of at most about this size, which leaves the event loop time between two of them."""

log = get_logger("leader")


class ReplicaEndedError(SpotServeError):
    """The replica's loop is over: released or broken."""

    code = "SPS-195"


@dataclass(slots=True)
class _Choice:
    """One choice as the leader knows it, kept past its end until the ledger has all of it."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParameters
    token_ids: list[int]
    num_durable: int
    finish_reason: FinishReason | None = None
    announced: SequenceKey | None = None
    """The key under which the ranks know its sampling parameters."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens from `first_logprob` on, where they are wanted."""
    first_logprob: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they are computed. A recompute goes on behind them."""
    scores_prompt: bool = False

    @classmethod
    def of(cls, request: RequestContent, content: ChoiceContent) -> _Choice:
        """A choice as it is admitted: what the ledger has of it needs no second computation."""
        num_tokens = len(content.token_ids)
        return cls(
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            token_ids=list(content.token_ids),
            num_durable=num_tokens,
            first_logprob=num_tokens,
            scores_prompt=_scores_prompt(request, content),
        )

    def admitted(self, key: SequenceKey) -> Admitted:
        """What the ranks need to know of it beside its KV."""
        return Admitted(key, self.sampling, tuple(self.token_ids) if self.sampling.needs_history else ())

    def targets(self, start: int, stop: int) -> tuple[int, tuple[int, ...]]:
        """Of the rows [start, stop): the first that scores a prompt token, and the tokens scored from it on."""
        if not self.scores_prompt:
            return 0, ()
        first = max(start, len(self.prompt_logprobs))
        return first, self.prompt_ids[first + 1 : stop + 1]

    def add(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The next token."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)

    def run(self, request: RequestId, choice: int, start: int) -> TokenRun:
        """Its tokens from position `start` on, and its end."""
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self.sampling.logprobs is not None:
            if start < self.first_logprob:
                raise InvariantError(f"request {request} is asked for tokens from {start}, durable before")
            logprobs = tuple(self.logprobs[start - self.first_logprob :])
        return TokenRun(
            request=request,
            choice=choice,
            position=start,
            token_ids=tuple(self.token_ids[start:]),
            finish_reason=self.finish_reason,
            logprobs=logprobs,
            prompt_logprobs=tuple(self.prompt_logprobs) if start == 0 else (),
        )

    def set_durable(self, num_tokens: int) -> None:
        """The ledger holds so many tokens: their logprobs are never said again."""
        self.num_durable = max(self.num_durable, num_tokens)
        if self.num_durable > self.first_logprob:
            del self.logprobs[: self.num_durable - self.first_logprob]
            self.first_logprob = self.num_durable
            self.scores_prompt = False
            self.prompt_logprobs.clear()

    def known_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids at absolute positions [start, stop)."""
        prompt = self.prompt_ids[start:stop]
        first = max(0, start - len(self.prompt_ids))
        return (*prompt, *self.token_ids[first : max(0, stop - len(self.prompt_ids))])


@dataclass(slots=True)
class QuiesceReport:
    """Where every open choice stands once nothing is in flight."""

    positions: tuple[ChoicePosition, ...]
    iterations: int


@dataclass(slots=True)
class Progress:
    """What a probe is told."""

    positions: tuple[ChoicePosition, ...] = ()
    free_blocks: int = 0
    iterations: int = 0
    prefilled_tokens: int = 0
    evictions: int = 0


@dataclass(slots=True)
class _Mail:
    action: Callable[[], Any]
    reply: Future[Any] = field(default_factory=Future)


class Leader(ReplicaLoop):
    """Schedules, commits and speaks for the replica. Public methods may be called from any thread."""

    def __init__(
        self,
        runner: StageRunner,
        limits: BatchLimits,
        send: Callable[[WorkerMessage], None],
        *,
        least_iteration_s: float = 0.0,
    ) -> None:
        super().__init__(runner, send)
        self._least_iteration_s = least_iteration_s
        self._next_issue_s = 0.0
        self._batcher = Batcher(limits)
        self._choices: dict[tuple[RequestId, int], _Choice] = {}
        self._mailbox: queue.SimpleQueue[_Mail] = queue.SimpleQueue()
        self._mail_lock = threading.Lock()
        self._is_over = False
        self._batches: dict[int, MicroBatch] = {}
        self._quiesces: list[Future[QuiesceReport]] = []
        self._is_quiesced = False
        self._last_progress = Progress()
        self._told_progress_s = 0.0

    @property
    def last_progress(self) -> Progress:
        """Positions and counters of a moment ago: at most the iteration that is under way is not in them."""
        return self._last_progress

    @property
    def is_quiesced(self) -> bool:
        """Whether it stands still after a quiesce."""
        return self._is_quiesced

    # Asked by the agent

    def admit(self, requests: Sequence[RequestContent], *, is_exclusive: bool = False) -> Future[None]:
        """Run requests; with `is_exclusive` (at the start) KV of any other sequence is freed."""
        return self._post(lambda: self._admit(requests, is_exclusive=is_exclusive))

    def close(self, request: RequestId, choice: int | None) -> Future[None]:
        """Stop generating and free; unknown is fine."""
        return self._post(lambda: self._close(request, choice))

    def set_durable(self, positions: Sequence[tuple[RequestId, int, int]]) -> None:
        """What the ledger holds."""
        self._post(lambda: self._set_durable(positions))

    def resend(self, positions: Sequence[tuple[RequestId, int, int]] | None = None) -> None:
        """Say again every token past these counts; None: past what is known to be durable."""
        self._post(lambda: self._resend(positions))

    def quiesce(self) -> Future[QuiesceReport]:
        """Stop scheduling; the report comes when nothing is in flight, after all tokens were sent."""
        report: Future[QuiesceReport] = Future()
        posted = self._post(lambda: self._quiesce(report))
        posted.add_done_callback(lambda done: _pass_failure(done, report))
        return report

    def resume(self) -> Future[None]:
        """Go on after a quiesce."""
        return self._post(self._resume)

    def progress(self) -> Future[Progress]:
        """Positions and counters now."""
        return self._post(self._progress)

    def _post(self, action: Callable[[], Result]) -> Future[Result]:
        mail = _Mail(action)
        with self._mail_lock:
            if not self._is_over:
                self._mailbox.put(mail)
                return mail.reply
        mail.reply.set_exception(ReplicaEndedError(f"replica {self.place.replica} does not run here any more"))
        return mail.reply

    # The loop

    def _wake(self) -> None:
        self._post(lambda: None)

    def _iterate(self) -> None:
        while not self._is_stopping:
            self._keep_pace()
            self._read_mail(wait=False)
            while self._batches and self.place.num_ranks > 1 and self._mesh.poll_control(self.place.sampler):
                self._collect()
            self._note_progress()
            batch = self._batcher.schedule()
            self._tell_evictions()
            if batch is not None:
                self._issue(batch)
            elif self._batches:
                self._collect()
            else:
                self._rest()
        with contextlib.suppress(MeshError):  # Followers that were released before the leader are gone.
            self._tell(Stop())

    def _rest(self) -> None:
        """Nothing is in flight and nothing to do: answer a quiesce, tell what was freed, wait for mail."""
        for report in self._quiesces:
            report.set_result(QuiesceReport(self._batcher.positions(), self._batcher.num_iterations))
        self._is_quiesced = self._is_quiesced or bool(self._quiesces)
        self._quiesces.clear()
        self._flush_freed()
        self._last_progress = self._progress()
        # The mail that `stop` wakes with may have been read after the loop last looked: its flag was set before.
        self._read_mail(wait=not self._is_stopping)

    def _flush_freed(self) -> None:
        freed = tuple(self._batcher.take_freed())
        if freed:
            self._runner.free(freed)
            self._tell(Free(freed))

    def _read_mail(self, *, wait: bool) -> None:
        while True:
            try:
                mail = self._mailbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if not mail.reply.set_running_or_notify_cancel():
                continue
            try:
                mail.reply.set_result(mail.action())
            except (MeshError, InvariantError) as error:
                # Nobody reads the reply of a resend: our own bug would be lost there, and tokens with it.
                mail.reply.set_exception(error)
                raise
            except SpotServeError as error:
                mail.reply.set_exception(error)

    def _issue(self, batch: MicroBatch) -> None:
        """Send a micro-batch round and compute our own stage of it."""
        self._next_issue_s = time.monotonic() + self._least_iteration_s
        run = self._describe(batch)
        self._tell(run)
        self._batches[batch.number] = batch
        sampled = self._runner.run(run)
        if sampled is not None:
            self._commit(sampled)
        elif self.place.pipeline == 1:
            raise InvariantError("the leader of a one-stage replica did not sample")

    def _keep_pace(self) -> None:
        """Sleep for what the last micro-batch lacks of the least time one takes, if another could go out before.

        The mail is read after it: what comes meanwhile is in the next micro-batch, as where a GPU takes that long.
        """
        if self._least_iteration_s and self._batcher.num_in_flight < self.place.pipeline:
            time.sleep(max(0.0, self._next_issue_s - time.monotonic()))

    def _describe(self, batch: MicroBatch) -> Run:
        items = []
        admitted = []
        for item in batch.items:
            choice = self._of(item.key)
            if choice.announced != item.key:
                choice.announced = item.key
                admitted.append(choice.admitted(item.key))
            items.append(self._run_item(item, choice))
        return Run(batch.number, tuple(self._batcher.take_freed()), tuple(admitted), tuple(items))

    def _run_item(self, item: BatchItem, choice: _Choice) -> RunItem:
        first_scored, targets = choice.targets(item.start, item.start + item.count)
        return RunItem(
            key=item.key,
            start=item.start,
            count=item.count,
            position=len(choice.token_ids) if item.samples else None,
            token_ids=choice.known_ids(item.start, item.start + item.count),
            first_scored=first_scored,
            targets=targets,
        )

    def _collect(self) -> None:
        """The tokens of the oldest micro-batch, from the sampler."""
        answer = decode(self._mesh.recv_control(self.place.sampler, None))
        if not isinstance(answer, Sampled):
            raise InvariantError(f"sampler sent {type(answer).__name__}")
        self._commit(answer)

    def _commit(self, sampled: Sampled) -> None:
        batch = self._batches.pop(sampled.number)
        sampling = [item.key for item in batch.items if item.samples]
        tokens = dict(zip(sampling, sampled.token_ids, strict=True))
        logprobs = dict(zip(sampling, sampled.logprobs, strict=True)) if sampled.logprobs else {}
        # A choice that was closed while it was in flight is not there any more.
        there = {item.key: self._of(item.key) for item in batch.items if self._batcher.is_open(item.key)}
        for index, scored in sampled.prompt_logprobs:
            if batch.items[index].key in there:
                there[batch.items[index].key].prompt_logprobs += scored
        stopped = {key for key, token in tokens.items() if self._is_stop(key, token)}
        failed = {key for key, token in tokens.items() if token == NO_TOKEN}
        outcome = self._batcher.commit(batch.number, stopped | failed)
        runs = []
        for key, choice in there.items():
            start = len(choice.token_ids)
            if key in failed:
                log.warning("logits_not_finite", request=key.request, choice=key.choice, position=start)
                choice.finish_reason = "error"
            elif key in tokens:
                choice.add(tokens[key], logprobs.get(key))
            if key in stopped:
                choice.finish_reason = "stop"
            elif key in outcome.at_length and key not in failed:
                choice.finish_reason = "length"
            if key in tokens or choice.finish_reason is not None:
                runs.append(choice.run(key.request, key.choice, start))
        self._send_runs(runs)

    def _of(self, key: SequenceKey) -> _Choice:
        return self._choices[(key.request, key.choice)]

    def _is_stop(self, key: SequenceKey, token: int) -> bool:
        choice = self._choices.get((key.request, key.choice))
        if choice is None:
            return False
        return not choice.sampling.ignore_eos and token in choice.sampling.stop_token_ids

    # What the mail says

    def _admit(self, requests: Sequence[RequestContent], *, is_exclusive: bool) -> None:
        new = [
            (request, content)
            for request in requests
            for content in request.choices
            if (request.request, content.choice) not in self._choices
        ]
        missing = self._adopt(new, is_exclusive=is_exclusive)
        failed = []
        for request, content in new:
            name = (request.request, content.choice)
            choice = self._choices[name] = _Choice.of(request, content)
            if not self._batcher.fits(prompt_tokens=len(request.prompt_ids), max_tokens=request.sampling.max_tokens):
                choice.finish_reason = "error"
                failed.append(choice.run(*name, len(content.token_ids)))
                continue
            self._batcher.admit(_sequence(request, content))
            # The logprobs of a prompt's computed part went with its old leader: it is computed again from its start.
            is_headless = choice.scores_prompt and content.kv_tokens > 0
            if is_headless or SequenceKey(request.request, content.choice, content.kv_generation) in missing:
                self._batcher.drop_kv(request.request, content.choice)
        self._send_runs(failed)
        self._tell_evictions()

    def _adopt(self, new: Sequence[tuple[RequestContent, ChoiceContent]], *, is_exclusive: bool) -> set[SequenceKey]:
        """Have every rank take over the KV that was copied in; returns what any of them lacks."""
        sequences = tuple(
            (SequenceKey(request.request, content.choice, content.kv_generation), content.kv_tokens)
            for request, content in new
            if content.kv_tokens
        )
        if not sequences and not is_exclusive:
            return set()
        while self._batches:  # The answers must be the next thing the followers say.
            self._collect()
        adopt = Adopt(sequences, is_exclusive)
        self._tell(adopt)
        missing = set(self._runner.adopt(adopt).keys)
        for rank in range(1, self.place.num_ranks):
            answer = decode(self._mesh.recv_control(rank, None))
            if not isinstance(answer, Missing):
                raise InvariantError(f"rank {rank} sent {type(answer).__name__}")
            missing.update(answer.keys)
        return missing

    def _close(self, request: RequestId, choice: int | None) -> None:
        self._batcher.close(request, choice)
        for name in [name for name in self._choices if name[0] == request and choice in (None, name[1])]:
            del self._choices[name]

    def _set_durable(self, positions: Sequence[tuple[RequestId, int, int]]) -> None:
        for request, choice_index, num_tokens in positions:
            self._batcher.set_durable(request, choice_index, num_tokens)
            choice = self._choices.get((request, choice_index))
            if choice is None:
                continue
            choice.set_durable(num_tokens)
            # An error's end has no token that could become durable: it is kept until the close.
            if choice.finish_reason in ("stop", "length") and choice.num_durable >= len(choice.token_ids):
                del self._choices[(request, choice_index)]

    def _resend(self, positions: Sequence[tuple[RequestId, int, int]] | None) -> None:
        known = {(request, choice): count for request, choice, count in positions or ()}
        runs = []
        for (request, index), choice in sorted(self._choices.items()):
            start = min(known.get((request, index), choice.num_durable), len(choice.token_ids))
            if (request, index) in known:
                choice.num_durable = start
            if start < len(choice.token_ids) or choice.finish_reason is not None:
                runs.append(choice.run(request, index, start))
        self._send_runs(runs, again=True)

    def _quiesce(self, report: Future[QuiesceReport]) -> None:
        self._batcher.pause()
        self._quiesces.append(report)

    def _resume(self) -> None:
        self._batcher.resume()
        self._is_quiesced = False

    def _progress(self) -> Progress:
        batcher = self._batcher
        return Progress(
            positions=batcher.positions(),
            free_blocks=batcher.free_blocks,
            iterations=batcher.num_iterations,
            prefilled_tokens=batcher.num_prefilled_tokens,
            evictions=batcher.num_evictions,
        )

    def _note_progress(self) -> None:
        """For a probe that cannot wait for the iteration's end; not in every one of the short ones."""
        now_s = time.monotonic()
        if now_s - self._told_progress_s >= _PROGRESS_PERIOD_S:
            self._told_progress_s = now_s
            self._last_progress = self._progress()

    # Words

    def _tell(self, descriptor: Descriptor) -> None:
        if self.place.num_ranks == 1:
            return
        payload = encode(descriptor)
        for rank in range(1, self.place.num_ranks):
            self._mesh.send_control(rank, payload)

    def _tell_evictions(self) -> None:
        for key in self._batcher.take_evicted():
            self._send(
                Evicted(
                    replica=self.place.replica,
                    generation=self.place.generation,
                    request=key.request,
                    choice=key.choice,
                    kv_generation=key.kv_generation,
                )
            )

    def _send_runs(self, runs: Sequence[TokenRun], *, again: bool = False) -> None:
        if not runs and not again:
            return
        place = self.place
        for index, part in enumerate(parts_of(runs) or [()]):
            # The first lifts the link's hold, and the others follow it in order.
            is_again = again and index == 0
            self._send(Tokens(replica=place.replica, generation=place.generation, runs=part, again=is_again))

    def _finish(self) -> None:
        """Nobody answers mail any more."""
        with self._mail_lock:
            self._is_over = True
        ended = ReplicaEndedError(f"replica {self.place.replica} does not run here any more")
        while True:
            try:
                mail = self._mailbox.get(block=False)
            except queue.Empty:
                break
            if mail.reply.set_running_or_notify_cancel():
                mail.reply.set_exception(ended)
        for report in self._quiesces:
            report.set_exception(ended)
        self._quiesces.clear()


def parts_of(runs: Sequence[TokenRun]) -> list[tuple[TokenRun, ...]]:
    """The runs in their order, in parts of at most `MAX_RUNS_BYTES`; one that is larger stands alone."""
    parts: list[list[TokenRun]] = []
    room = 0
    for run in runs:
        size = _most_bytes(run)
        if not parts or size > room:
            parts.append([])
            room = MAX_RUNS_BYTES
        parts[-1].append(run)
        room -= size
    return [tuple(part) for part in parts]


def _most_bytes(run: TokenRun) -> int:
    """A bound of the run's size as JSON: a token id has at most 10 digits, a float 24 characters."""
    scored = (*run.logprobs, *run.prompt_logprobs)
    num_ranked = sum(len(one.top) for one in scored)
    return 256 + len(run.request) + 12 * len(run.token_ids) + 32 * len(scored) + 40 * num_ranked


def _scores_prompt(request: RequestContent, content: ChoiceContent) -> bool:
    """Whether the prompt's logprobs are still to be told: they are durable before the first token is."""
    return request.sampling.prompt_logprobs and not content.token_ids


def _sequence(request: RequestContent, content: ChoiceContent) -> BatchedSequence:
    return BatchedSequence.handed_over(
        request.request,
        content.choice,
        Start(content.kv_generation, content.kv_tokens),
        arrival_index=request.arrival_index,
        lengths=(len(request.prompt_ids), request.sampling.max_tokens, len(content.token_ids)),
    )


def _pass_failure(done: Future[Any], report: Future[QuiesceReport]) -> None:
    error = done.exception()
    if error is not None and not report.done():
        report.set_exception(error)
