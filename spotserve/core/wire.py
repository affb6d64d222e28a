"""The messages between the coordinator and its workers.

Each travels as JSON inside the thin protobuf envelope of `runtime/proto/worker.proto`, on one bidirectional stream
per worker. A `Command*` is answered by exactly one `Reply` with its id; a repeated id is answered by the first
outcome. Every message to a worker carries the coordinator's term; a worker refuses a lower one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId
from spotserve.core.plan import KvRoute
from spotserve.core.sampling import SamplingParameters, TokenLogprobs
from spotserve.core.slices import Shard, Slice
from spotserve.core.spec import ServingSpec

FinishReason = Literal["stop", "length", "error", "cancelled"]


# Worker -> coordinator


class ChoicePosition(Frozen):
    """How far one choice is: `tokens` generated, `kv_tokens` with KV in place (prompt included)."""

    request: RequestId
    choice: int
    kv_generation: int
    tokens: int
    kv_tokens: int


class RoleReport(Frozen):
    """A position that a worker holds, told at registration so that a restarted coordinator can adopt it."""

    replica: ReplicaId
    generation: int
    stage: int
    rank: int
    state: Literal["prepared", "serving", "quiesced", "broken"]


class Register(Frozen):
    """The first message of a stream."""

    kind: Literal["register"] = "register"
    worker: GpuId
    instance: InstanceId
    num_gpus: int
    """GPUs (worker processes) of the whole instance: it is ready when all have registered."""
    incarnation: str
    pid: int
    process_group: int
    started_at: float
    """Start time of the process as the OS tells it (psutil create_time): guards against pid reuse."""
    version: str
    memory_bytes: int
    device: str
    gpu_type: str = ""
    """What it calls its GPU: what it was told, else the device's own name; empty: as the daemon's."""
    mesh_address: str
    transfer_address: str
    roles: tuple[RoleReport, ...] = ()
    journal: str | None = None
    """Incarnation of the journal whose coordinator welcomed it first; None before that."""


class Heartbeat(Frozen):
    """Sent every second."""

    kind: Literal["heartbeat"] = "heartbeat"


class Reply(Frozen):
    """The outcome of a command. `result` is command specific (see each command); `error` is one line."""

    kind: Literal["reply"] = "reply"
    command: str
    ok: bool
    result: dict[str, Any] = {}
    error: str | None = None


class TokenRun(Frozen):
    """New tokens of one choice: `token_ids[i]` is at generated position `position + i` (first position 0).

    `logprobs` are of the same tokens, for requests that want them. `prompt_logprobs`, of every prompt token but the
    first, come with position 0, so that they are as durable as what follows them.
    """

    request: RequestId
    choice: int
    position: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Tokens(Frozen):
    """Tokens that a leader sampled; re-sent after a reconnect, the ledger drops doubles."""

    kind: Literal["tokens"] = "tokens"
    replica: ReplicaId
    generation: int
    runs: tuple[TokenRun, ...]
    again: bool = False
    """Everything that is not known to be durable: the first tokens of a leader on a new stream."""


class Evicted(Frozen):
    """A leader evicted a choice's KV blocks; it re-prefills under `kv_generation` when blocks are free."""

    kind: Literal["evicted"] = "evicted"
    replica: ReplicaId
    generation: int
    request: RequestId
    choice: int
    kv_generation: int


class ReplicaBroken(Frozen):
    """A rank lost a mesh peer: the replica cannot go on; the control plane decides."""

    kind: Literal["replica_broken"] = "replica_broken"
    replica: ReplicaId
    generation: int
    detail: str


class SelfNotice(Frozen):
    """The worker's instance was told (SIGTERM) that it will be taken."""

    kind: Literal["self_notice"] = "self_notice"
    grace_s: float


WorkerMessage = Annotated[
    Register | Heartbeat | Reply | Tokens | Evicted | ReplicaBroken | SelfNotice, Field(discriminator="kind")
]


# Coordinator -> worker


FileIdentity = tuple[int, int, int, int]
"""Device, inode, mtime and ctime in nanoseconds: the same only for the same unchanged file on the same machine."""


class ModelFile(Frozen):
    """One file of the model folder as the coordinator hashed it; without an identity nobody may take it on trust."""

    name: str
    size_bytes: int
    sha256: str
    identity: FileIdentity | None = None


class Welcome(Frozen):
    """Answer to `Register`: the spec to serve, the model folder, link caps."""

    kind: Literal["welcome"] = "welcome"
    term: int
    spec: ServingSpec
    model_path: str
    model_files: tuple[ModelFile, ...] = ()
    journal: str
    """Incarnation of the coordinator's journal: names, generations and weights mean something within one only."""
    link_bytes_per_s: float | None = None
    """Cap on this worker's transfer traffic, each direction (benchmarks); None is uncapped."""
    least_iteration_s: float = 0.0
    """What a micro-batch takes at least (tests: the pace of a slower GPU, alike on every machine); 0 is full speed."""
    orphan_timeout_s: float = 60.0


class Refused(Frozen):
    """The worker may not join: wrong secret, version, journal, double id. It exits."""

    kind: Literal["refused"] = "refused"
    term: int
    reason: str


class ChoiceContent(Frozen):
    """Durable tokens of one open choice and the KV the new owner may rely on."""

    choice: int
    kv_generation: int
    token_ids: tuple[int, ...] = ()
    kv_tokens: int = 0
    """Tokens (prompt included) whose KV the replica already has in place; 0 means prefill everything."""


class RequestContent(Frozen):
    """All a leader needs to run a request; content, so never journaled or logged."""

    request: RequestId
    arrival_index: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParameters
    choices: tuple[ChoiceContent, ...]


class Command(Frozen):
    """Base of what is answered by a `Reply`. `command` is the idempotency id."""

    term: int
    command: str


class ReserveCommand(Command):
    """Allocate a position of a new generation: weights and the KV pool. Result: {}.

    Without `with_weights` (in_place: old and new do not fit side by side, and nothing goes back any more) the KV pool
    alone; weights take their memory when they come, and what the worker still runs of an older generation ends.
    """

    kind: Literal["reserve"] = "reserve"
    epoch: int
    replica: ReplicaId
    generation: int
    stage: int
    rank: int
    pipeline: int
    tensor: int
    shard: Shard
    kv_blocks: int
    max_running: int
    with_weights: bool = True


class GrantCommand(Command):
    """Let a peer pull from this worker: sent to the source before the destination's copy. Result: {}."""

    kind: Literal["grant"] = "grant"
    epoch: int
    grant: str
    secret: str
    """Hex; minted per (plan, source, destination), never logged."""
    expires_s: float


class CopyWeightsCommand(Command):
    """Pull slices from a peer. Result: {"bytes": verified bytes}."""

    kind: Literal["copy_weights"] = "copy_weights"
    epoch: int
    replica: ReplicaId
    generation: int
    source: GpuId
    source_address: str
    grant: str
    secret: str
    slices: tuple[Slice, ...]


class LoadWeightsCommand(Command):
    """Read slices from the model folder. Result: {"bytes": bytes read}."""

    kind: Literal["load_weights"] = "load_weights"
    epoch: int
    replica: ReplicaId
    generation: int
    slices: tuple[Slice, ...]


class CopyKvCommand(Command):
    """Follow the filled KV blocks of a rectangle; replies once within one full block per request, then goes on
    following until the delta or an abort. Result: {"bytes": verified bytes so far}."""

    kind: Literal["copy_kv"] = "copy_kv"
    epoch: int
    step: str
    source: GpuId
    source_address: str
    grant: str
    secret: str
    route: KvRoute
    source_generation: int
    target_generation: int


class CopyKvDeltaCommand(Command):
    """Bring what the manifest names and `copy_kv` (step `follows`) has not brought.

    Result: {"bytes": all verified bytes of this rectangle, "missing": [[request, choice], …]}.
    """

    kind: Literal["copy_kv_delta"] = "copy_kv_delta"
    epoch: int
    step: str
    follows: str
    source: GpuId
    source_address: str
    grant: str
    secret: str
    route: KvRoute
    source_generation: int
    target_generation: int
    manifest: tuple[ChoicePosition, ...]


class JoinGroupCommand(Command):
    """Open the mesh of a new generation on a side thread. `addresses` in mesh rank order (stage * M + rank)."""

    kind: Literal["join_group"] = "join_group"
    epoch: int
    replica: ReplicaId
    generation: int
    addresses: tuple[str, ...]
    secret: str
    timeout_s: float = 30.0


class QuiesceCommand(Command):
    """To a leader: schedule nothing new, drain, report. Result: {"positions": [ChoicePosition…], "iterations": n}.

    All tokens up to the reported positions were sent as `Tokens` before the reply.
    """

    kind: Literal["quiesce"] = "quiesce"
    epoch: int
    replica: ReplicaId
    generation: int


class ResumeCommand(Command):
    """To a quiesced leader whose plan was aborted: go on decoding. Result: {}."""

    kind: Literal["resume"] = "resume"
    replica: ReplicaId
    generation: int


class ActivateCommand(Command):
    """Start to serve as the prepared generation; the leader gets the requests that moved. Result: {}."""

    kind: Literal["activate"] = "activate"
    epoch: int
    replica: ReplicaId
    generation: int
    requests: tuple[RequestContent, ...] = ()


class ReleaseCommand(Command):
    """Free a generation's position: its KV pool, and weights that no other generation shares. Result: {}.

    With `keep_weights` (the replica was lost) the weights stay as loose holdings that the next plan may copy from.
    With `slices` (in_place) only these ranges of its weights and, with `kv`, its KV pool (or all of it but
    `keep_blocks` blocks): what is left can be copied from until a release without `slices` ends the position. Unknown
    generation: nothing to do, ok.
    """

    kind: Literal["release"] = "release"
    replica: ReplicaId
    generation: int
    keep_weights: bool = False
    slices: tuple[Slice, ...] | None = None
    kv: bool = True
    keep_blocks: int | None = None


class AbortCommand(Command):
    """Forget what was prepared for an epoch except weights already copied, which stay as holdings. Result: {}."""

    kind: Literal["abort"] = "abort"
    epoch: int


class AdmitCommand(Command):
    """To a leader (serving, or untouched target of moved requests): run this request. Result: {}.

    For a request already running (same kv_generation) it is a repeat: ok, nothing changes.
    """

    kind: Literal["admit"] = "admit"
    replica: ReplicaId
    generation: int
    requests: tuple[RequestContent, ...]


class CloseCommand(Command):
    """Stop generating a request (choice None = all choices) and free its KV. Unknown: ok. Result: {}."""

    kind: Literal["close"] = "close"
    replica: ReplicaId
    generation: int
    request: RequestId
    choice: int | None = None


class ProbeCommand(Command):
    """Report holdings and, from a leader, progress.

    Result: {"shards": [Shard…], "slices": [Slice…], "positions": [ChoicePosition…], "free_blocks": n}.
    """

    kind: Literal["probe"] = "probe"
    drop_loose: bool = False
    """First forget slices that belong to no position."""


class Durable(Frozen):
    """Durable tokens per choice: the leader may run at most 64 tokens past it. Not answered."""

    kind: Literal["durable"] = "durable"
    term: int
    positions: tuple[tuple[RequestId, int, int], ...]
    """(request, choice, number of durable tokens)"""


class Resend(Frozen):
    """After an adoption: send again every token past these counts, for every choice you run. Not answered."""

    kind: Literal["resend"] = "resend"
    term: int
    positions: tuple[tuple[RequestId, int, int], ...]


class Shutdown(Frozen):
    """Exit now. Not answered."""

    kind: Literal["shutdown"] = "shutdown"
    term: int


CoordinatorMessage = Annotated[
    Welcome
    | Refused
    | ReserveCommand
    | GrantCommand
    | CopyWeightsCommand
    | LoadWeightsCommand
    | CopyKvCommand
    | CopyKvDeltaCommand
    | JoinGroupCommand
    | QuiesceCommand
    | ResumeCommand
    | ActivateCommand
    | ReleaseCommand
    | AbortCommand
    | AdmitCommand
    | CloseCommand
    | ProbeCommand
    | Durable
    | Resend
    | Shutdown,
    Field(discriminator="kind"),
]

WORKER_MESSAGE: TypeAdapter[WorkerMessage] = TypeAdapter(WorkerMessage)
COORDINATOR_MESSAGE: TypeAdapter[CoordinatorMessage] = TypeAdapter(CoordinatorMessage)

MAX_UNDURABLE_TOKENS = 64
"""Tokens per choice that a leader may be ahead of the ledger."""
