"""`python -m spotserve.runtime.measure FOLDER [--dtype X] [--device cpu] [--linear plain]`: prints a profile as JSON.

A process of its own, because it imports torch and its caller must not. It times the very layers that a worker runs:
a few decoder layers at tensor degree 1 for several row counts; what a larger degree costs is derived from them, the
share of the work plus two exchanges per layer over the link that was measured as well.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import psutil
import torch

from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.slices import kv_head_range, max_tensor_degree, shard_slices, stage_shard
from spotserve.core.spec import DTYPE_BYTES, LatencyPoint, LinearKind, ModelSpec, Profile
from spotserve.errors import SpecError, SpotServeError
from spotserve.runtime.checkpoint import TORCH_DTYPES, Checkpoint
from spotserve.runtime.checkpoint_header import CheckpointLayout, validate_checkpoint
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.stage_model import BatchSequence, StageBatch, StageModel
from spotserve.runtime.weights import WeightStore

ROW_COUNTS = (1, 8, 32, 128)
TENSOR_DEGREES = (1, 2, 4, 8)
MAX_DECODE_ROWS = 8
"""Up to here rows are decoding sequences of one token each, beyond it one prefill chunk."""
CONTEXT_TOKENS = 64
POINT_BUDGET_S = 0.3
MIN_REPEATS = 3
MAX_REPEATS = 15
LINK_BYTES = 64 * 2**20
STORAGE_BYTES = 256 * 2**20
CHUNK_BYTES = 2**20
ROUND_TRIPS = 200
EXCHANGE_S = 1e-4
"""What an exchange between ranks costs beside the wire: waking the other process and its Python."""


def main(arguments: list[str] | None = None) -> int:
    """Print the profile; returns the exit code."""
    parser = argparse.ArgumentParser(prog="spotserve-measure", description="Measures a profile")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--linear", choices=get_args(LinearKind), default="plain")
    options = parser.parse_args(arguments)
    try:
        profile = measure(options.folder, dtype=options.dtype, device=options.device, linear=options.linear)
    except SpotServeError as error:
        lines = [error.message] if error.hint is None else [error.message, f"hint: {error.hint}"]
        sys.stderr.write("\n".join(lines) + "\n")
        return error.exit_code
    sys.stdout.write(profile.model_dump_json() + "\n")
    return 0


def measure(folder: Path, *, dtype: str | None = None, device: str = "cpu", linear: LinearKind = "plain") -> Profile:
    """The profile of a model folder on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda has no CUDA device", hint="leave --device out to measure on the CPU")
    torch.set_num_threads(1)
    model = describe_model(folder, dtype)
    layout = validate_checkpoint(folder)
    storage = storage_bytes_per_s(layout)
    link, round_trip_s = loopback_rates()
    stage = build_stage(folder, model, num_layers=min(3, model.num_layers), layout=layout, device=device, linear=linear)
    start_s = time.time() - psutil.Process().create_time()
    whole_ms = {rows: forward_ms(stage, rows, device=device) for rows in row_counts(model)}
    overhead_ms = 0.0
    if model.num_layers > 1:
        single = build_stage(folder, model, num_layers=1, layout=layout, device=device, linear=linear)
        overhead_ms = stage_overhead_ms(forward_ms(single, 1, device=device), whole_ms[1], stage.shard.layers[1])
    layers = stage.shard.layers[1]
    layer_ms = monotone({rows: max(1e-4, (total_ms - overhead_ms) / layers) for rows, total_ms in whole_ms.items()})
    return Profile(
        name=f"{model.name}-{model.dtype}-{device}",
        source="measured by spotserve profile",
        device=device_name(device),
        latencies=latency_points(model, layer_ms, link_bytes_per_s=link, round_trip_s=round_trip_s),
        stage_overhead_ms=overhead_ms,
        link_bytes_per_s=link,
        storage_bytes_per_s=storage,
        round_trip_s=round_trip_s,
        start_s=start_s,
    )


def monotone(layer_ms: dict[int, float]) -> dict[int, float]:
    """No row count may take longer than a larger one: what exceeds it was a disturbance."""
    least = float("inf")
    smoothed: dict[int, float] = {}
    for rows in sorted(layer_ms, reverse=True):
        least = min(least, layer_ms[rows])
        smoothed[rows] = least
    return dict(sorted(smoothed.items()))


def row_counts(model: ModelSpec) -> tuple[int, ...]:
    """The row counts that the model's longest sequence allows."""
    return tuple(rows for rows in ROW_COUNTS if rows <= max(1, model.max_model_len))


def build_stage(
    folder: Path, model: ModelSpec, *, num_layers: int, layout: CheckpointLayout, device: str, linear: LinearKind
) -> StageModel:
    """The first `num_layers` layers as a worker would run them, weights loaded, at tensor degree 1."""
    shard = stage_shard(model, layers=(0, num_layers), tensor=1, rank=0)
    slices = shard_slices(model, shard)
    weights = WeightStore(model, device=device)
    weights.reserve(slices)
    checkpoint = Checkpoint(folder, model, layout=layout)
    for piece in slices:
        weights.write_range(piece.parameter, piece.dim, piece.start, piece.stop, checkpoint.read(piece))
    kv = KvStore(
        num_blocks=MAX_DECODE_ROWS * 8 + 16,
        layers=shard.layers,
        kv_heads=kv_head_range(model, tensor=1, rank=0),
        head_dim=model.head_dim,
        dtype=TORCH_DTYPES[model.dtype],
        device=device,
    )
    return StageModel(folder, model, shard, weights, kv, prepacked=linear == "prepacked", device=device)


def forward_ms(stage: StageModel, rows: int, *, device: str) -> float:
    """Milliseconds of one undisturbed forward of `rows` rows."""
    context = min(CONTEXT_TOKENS, stage.model.max_model_len - 1)
    if rows <= MAX_DECODE_ROWS:
        keys = [SequenceKey(RequestId(f"decode-{index}"), 0, 0) for index in range(rows)]
        if context:
            stage.forward(batch_of(stage.model, keys, start=0, count=context))
        batch = batch_of(stage.model, keys, start=context, count=1)
    else:
        keys = [SequenceKey(RequestId("prefill"), 0, 0)]
        batch = batch_of(stage.model, keys, start=0, count=rows)
    try:
        return least_ms(lambda: stage.forward(batch), device=device)
    finally:
        for key in keys:
            stage.kv.free(key)


def batch_of(model: ModelSpec, keys: list[SequenceKey], *, start: int, count: int) -> StageBatch:
    """`count` tokens of each sequence from `start` on, all of them different: equal rows would share their experts."""
    return StageBatch(
        tuple(
            BatchSequence(
                key=key,
                start=start,
                count=count,
                wants_logits=False,
                token_ids=tuple((7919 * position + 613 * index) % model.vocab_size for position in range(count)),
            )
            for index, key in enumerate(keys)
        )
    )


def least_ms(run: Callable[[], object], *, device: str) -> float:
    """The least of the repeats within the budget, after one warm-up; work on a GPU is waited for.

    What else the machine does only ever adds time: a median taken beside other work has made layers look 30 times as
    slow as they are, and a planner that believes it re-shapes for nothing.
    """

    def once_s() -> float:
        started_s = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started_s

    once_s()
    samples_s = [once_s() for _ in range(MIN_REPEATS)]
    while len(samples_s) < MAX_REPEATS and sum(samples_s) < POINT_BUDGET_S:
        samples_s.append(once_s())
    return 1000 * min(samples_s)


def stage_overhead_ms(single_ms: float, several_ms: float, num_layers: int) -> float:
    """What a forward costs beside its layers, from one layer's and several layers' time."""
    per_layer_ms = (several_ms - single_ms) / (num_layers - 1)
    return max(0.0, min(single_ms - per_layer_ms, 0.5 * single_ms))


def latency_points(
    model: ModelSpec, layer_ms: dict[int, float], *, link_bytes_per_s: float, round_trip_s: float
) -> tuple[LatencyPoint, ...]:
    """The measured points at degree 1, and derived ones: a share of the work and two all-to-all exchanges a layer."""
    points = []
    for degree in TENSOR_DEGREES:
        if degree > max_tensor_degree(model):
            break
        for rows, measured_ms in layer_ms.items():
            exchange_bytes = rows * model.hidden_size * 4 * (degree - 1)
            exchange_s = 0.0 if degree == 1 else EXCHANGE_S + round_trip_s / 2 + exchange_bytes / link_bytes_per_s
            derived_ms = measured_ms / degree + 2 * 1000 * exchange_s
            points.append(LatencyPoint(tokens=rows, tensor=degree, layer_ms=derived_ms))
    return tuple(points)


def loopback_rates() -> tuple[float, float]:
    """(bytes per second, round trip in seconds) of a loopback TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        echo = threading.Thread(target=echo_then_drain, args=(server,), daemon=True)
        echo.start()
        trips_s = []
        for _ in range(ROUND_TRIPS):
            started_s = time.perf_counter()
            client.sendall(b"x")
            client.recv(1)
            trips_s.append(time.perf_counter() - started_s)
        chunk = bytes(CHUNK_BYTES)
        started_s = time.perf_counter()
        for _ in range(LINK_BYTES // CHUNK_BYTES):
            client.sendall(chunk)
        client.recv(1)
        rate = LINK_BYTES / (time.perf_counter() - started_s)
        echo.join()
    return rate, statistics.median(trips_s)


def echo_then_drain(server: socket.socket) -> None:
    """The other end of `loopback_rates`: answer each byte, then swallow the bulk and answer once."""
    for _ in range(ROUND_TRIPS):
        server.sendall(server.recv(1))
    buffer, left = bytearray(CHUNK_BYTES), LINK_BYTES
    while left:
        left -= server.recv_into(buffer)
    server.sendall(b"x")


def storage_bytes_per_s(layout: CheckpointLayout) -> float:
    """How fast the checkpoint's own files are read, past the page cache where the system allows it."""
    files = sorted({header.file for header in layout.tensors.values()})
    buffer, read, elapsed_s = bytearray(CHUNK_BYTES), 0, 0.0
    for path in files:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started_s = time.perf_counter()
            while read < STORAGE_BYTES and (count := file.readinto(buffer)):
                read += count
            elapsed_s += time.perf_counter() - started_s
    return read / max(elapsed_s, 1e-6)


def device_name(device: str) -> str:
    """What was measured."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread"


if __name__ == "__main__":
    sys.exit(main())
