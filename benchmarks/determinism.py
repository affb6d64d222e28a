"""What deterministic mode costs: tokens per second beside fast mode, and the cost of each of its measures.

    python -m benchmarks.determinism [--rounds 3] [--steps 8] [--out benchmarks/results/determinism]

One process, one thread, one shard that is the whole model. Every variant computes the same batch over the same weights
and the same KV, one after another within each step and in another order each round, so that a busy machine slows all of
them alike. Times are the thread's processor time: on a free core that is the time that passes.

A measure alone is deterministic mode with the others taken out, by the same replacements that the tests use to show
that each is needed (tests/runtime/test_stage_model.py): the product has no switches for them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.determinism_report import render
from benchmarks.random_llama import ModelShape, random_llama
from benchmarks.results_file import circumstances, say, write_results
from spotserve.core.batching import DEFAULT_TOKEN_BUDGET, SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.slices import Shard, kv_head_range, shard_slices, stage_shard
from spotserve.core.spec import ModelSpec
from spotserve.runtime import stage_model
from spotserve.runtime.checkpoint import TORCH_DTYPES, Checkpoint
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.linear import RowLinear
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.stage_model import BatchSequence, StageBatch, StageModel
from spotserve.runtime.weights import WeightStore

DTYPES = ("float32", "bfloat16")
LINEARS = ("plain", "prepacked")
BATCHES = (1, 8, 32)
PREFILL_TOKENS = 512
CONTEXT = (128, 168)
"""A decode's first positions lie in this range; the steps go on from there."""
NUM_BLOCKS = 512
MEASURES = ("row padding", "minimum columns", "reduction grid", "query tiles", "wide activation")
VARIANTS = ("fast", "deterministic", *MEASURES)


def _one_sum(self: StageModel, parameter: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A stage's linear modules without the reduction grid."""
    linear: nn.Module
    if parameter.kind == "row":
        linear = RowLinear(weight, bias, self._gather, prepacked=self._prepacked)
    else:
        linear = _LINEAR(self, parameter, weight, bias)
    return linear


_LINEAR = StageModel._linear
WITHOUT: Mapping[str, tuple[str, object]] = {
    "row padding": ("ROW_MULTIPLE", 1),
    "minimum columns": ("MIN_COLUMNS", 1),
    "reduction grid": ("StageModel._linear", _one_sum),
    "query tiles": ("ALIGNED_TILES", stage_model.FREE_TILES),
    "wide activation": ("WideActivation", lambda activation: activation),
}
"""Measure -> what is put where to take it out."""


@contextmanager
def only(variant: str) -> Iterator[None]:
    """Deterministic mode with no measure but this one; the two whole modes as they are."""
    with ExitStack() as stack:
        if variant in MEASURES:
            for measure in MEASURES:
                if measure != variant:
                    name, value = WITHOUT[measure]
                    stack.enter_context(patch(f"{stage_model.__name__}.{name}", value))
        yield


@dataclass(frozen=True, slots=True)
class Bench:
    """The whole model as one shard in one dtype, with weights and KV that all variants share."""

    folder: Path
    model: ModelSpec
    shard: Shard
    weights: WeightStore
    kv: KvStore

    def stage(self, variant: str, linear: str) -> StageModel:
        """A variant over the shared weights."""
        with only(variant):
            return StageModel(
                self.folder,
                self.model,
                self.shard,
                self.weights,
                self.kv,
                deterministic=variant != "fast",
                prepacked=linear == "prepacked",
            )


def load(folder: Path, dtype: str) -> Bench:
    """The model of `folder`, converted to `dtype`."""
    model = describe_model(folder, dtype)
    shard = stage_shard(model, layers=(0, model.num_layers), tensor=1, rank=0)
    weights, slices, checkpoint = WeightStore(model), shard_slices(model, shard), Checkpoint(folder, model)
    weights.reserve(slices)
    for piece in weights.missing(slices):
        weights.write_range(piece.parameter, piece.dim, piece.start, piece.stop, checkpoint.read(piece))
    kv = KvStore(
        num_blocks=NUM_BLOCKS,
        layers=shard.layers,
        kv_heads=kv_head_range(model, tensor=1, rank=0),
        head_dim=model.head_dim,
        dtype=TORCH_DTYPES[model.dtype],
    )
    return Bench(folder, model, shard, weights, kv)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.determinism", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a round")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--linears", default=",".join(LINEARS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "spotserve-benchmarks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "determinism")
    parser.add_argument("--render", type=Path, help="only write the markdown of a results file again")
    options = parser.parse_args(arguments)
    if options.render is not None:
        write_results(options.render.with_suffix(""), json.loads(options.render.read_text(encoding="utf-8")), render)
        return 0
    torch.set_num_threads(1)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    write_results(options.out, measure(options), render)
    say(f"written: {options.out}.md, {options.out}.json")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every dtype, kind of linear and scenario."""
    shape = ModelShape(seed=options.seed)
    folder = random_llama(shape, options.work_dir)
    facts = circumstances("benchmarks.determinism")
    cells: list[dict[str, Any]] = []
    for dtype in options.dtypes.split(","):
        bench = load(folder, dtype)
        for linear in options.linears.split(","):
            say(f"{dtype} {linear}")
            stages = {variant: bench.stage(variant, linear) for variant in options.variants.split(",")}
            for scenario, rounds in _scenarios(bench, stages, options.rounds, options.steps, options.seed):
                cells.append({"dtype": dtype, "linear": linear, **scenario, "rounds": rounds})
    facts["load_average_after"] = os.getloadavg()
    return {
        "format_version": "0.1",
        "circumstances": facts,
        "model": asdict(shape),
        "rounds": options.rounds,
        "steps": options.steps,
        "variants": options.variants.split(","),
        "cells": cells,
    }


Rounds = list[dict[str, list[float]]]
"""For each round, variant -> seconds of each step."""


def _scenarios(
    bench: Bench, stages: Mapping[str, StageModel], num_rounds: int, num_steps: int, seed: int
) -> Iterator[tuple[dict[str, Any], Rounds]]:
    """What was run, and its times."""
    ids = torch.randint(bench.model.vocab_size, (4096,), generator=torch.Generator().manual_seed(seed)).tolist()
    for batch in BATCHES:
        keys = [SequenceKey(RequestId(f"decode-{index}"), 0, 0) for index in range(batch)]
        starts = [CONTEXT[0] + 37 * index % (CONTEXT[1] - CONTEXT[0]) for index in range(batch)]
        for key, start in zip(keys, starts, strict=True):
            next(iter(stages.values())).forward(_chunk(key, 0, start, ids))

        def step(number: int, keys: list[SequenceKey] = keys, starts: list[int] = starts) -> list[StageBatch]:
            rows = [
                BatchSequence(key, start + number, 1, True, (ids[number + index],))
                for index, (key, start) in enumerate(zip(keys, starts, strict=True))
            ]
            return [StageBatch(tuple(rows))]

        yield {"scenario": f"decode {batch}", "tokens": batch}, _timed(stages, step, num_rounds, num_steps)
        for key in keys:
            bench.kv.free(key)
    key = SequenceKey(RequestId("prefill"), 0, 0)
    chunks = [_chunk(key, start, DEFAULT_TOKEN_BUDGET, ids) for start in range(0, PREFILL_TOKENS, DEFAULT_TOKEN_BUDGET)]
    yield {"scenario": "prefill 512", "tokens": PREFILL_TOKENS}, _timed(stages, lambda number: chunks, num_rounds, 1)
    bench.kv.free(key)


def _chunk(key: SequenceKey, start: int, count: int, ids: Sequence[int]) -> StageBatch:
    return StageBatch((BatchSequence(key, start, count, True, tuple(ids[start : start + count])),))


def _timed(
    stages: Mapping[str, StageModel], step: Callable[[int], list[StageBatch]], num_rounds: int, num_steps: int
) -> Rounds:
    """Times of every variant; a step that comes again writes the KV it wrote before."""
    names = list(stages)
    for name in names:
        _time(name, stages[name], step(0))
    rounds: Rounds = []
    for round_number in range(num_rounds):
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(round_number * num_steps, (round_number + 1) * num_steps):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                times[name].append(_time(name, stages[name], step(number)))
        rounds.append(times)
    return rounds


def _time(variant: str, stage: StageModel, batches: Sequence[StageBatch]) -> float:
    with only(variant):
        began_s = time.thread_time()
        for batch in batches:
            stage.forward(batch)
        return time.thread_time() - began_s


if __name__ == "__main__":
    sys.exit(main())
