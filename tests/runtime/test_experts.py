"""Mixtures of experts are exact: each row's sum over its experts has the bits of that row alone, however cut.

The module by itself first, then whole models against transformers and against themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from spotserve.core.slices import column_chunks, shard_slices, split_evenly, stage_shard
from spotserve.errors import ModelError
from spotserve.runtime import experts as experts_module
from spotserve.runtime import stage_model
from spotserve.runtime.checkpoint import Checkpoint
from spotserve.runtime.experts import Experts, ExpertWeights
from spotserve.runtime.linear import Gather, WideActivation
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.stage_model import BatchSequence, StageBatch
from spotserve.runtime.weights import WeightStore
from tests.runtime.families import FAMILIES
from tests.runtime.models import ExchangeHub, LocalReplica, MemoryExchange, key_of, loaded_weights
from tests.runtime.test_stage_model import assert_same_bits, history, prompt, recomputed
from tests.transformers_reference import greedy_tokens, reference_model

VARIANTS = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
"""(dtype, prepacked products)"""
NUM_EXPERTS, CHOSEN, HIDDEN = 6, 3, 64


@dataclass(frozen=True)
class Routed:
    """Rows with their experts and weights."""

    rows: Tensor
    index: Tensor
    weights: Tensor

    def padded(self, multiple: int = 8, fill: float = 0.0) -> Routed:
        """Filled up with rows that choose experts like any other."""
        missing = -self.rows.shape[0] % multiple
        return Routed(
            F.pad(self.rows, (0, 0, 0, missing), value=fill),
            torch.cat([self.index, torch.arange(CHOSEN).expand(missing, -1)]),
            F.pad(self.weights, (0, 0, 0, missing), value=fill),
        )

    def only(self, row: int) -> Routed:
        """One of the rows."""
        return Routed(*(tensor[row : row + 1] for tensor in (self.rows, self.index, self.weights)))


def routed(num_rows: int, dtype: torch.dtype, *, experts: range = range(NUM_EXPERTS)) -> Routed:
    """Random rows, each with experts of its own choice out of `experts`, in no order."""
    generator = torch.Generator().manual_seed(num_rows)
    index = torch.stack([torch.randperm(len(experts), generator=generator)[:CHOSEN] for _ in range(num_rows)])
    return Routed(
        torch.randn(num_rows, HIDDEN, generator=generator).to(dtype),
        index + experts.start,
        torch.rand(num_rows, CHOSEN, generator=generator).softmax(dim=-1),
    )


def expert_weights(width: int, dtype: torch.dtype) -> ExpertWeights:
    """All columns of random experts."""
    generator = torch.Generator().manual_seed(width)
    gate, up = (torch.randn(NUM_EXPERTS, width, HIDDEN, generator=generator) / 8 for _ in range(2))
    down = torch.randn(NUM_EXPERTS, HIDDEN, width, generator=generator) / width**0.5
    return ExpertWeights(*(tensor.to(dtype) for tensor in (gate, up, down)))


def plain_sum(weights: ExpertWeights, routed: Routed) -> Tensor:
    """The definition, row by row in float64."""
    gate, up, down = (tensor.double() for tensor in (weights.gate, weights.up, weights.down))
    total = torch.zeros(routed.rows.shape, dtype=torch.float64)
    for row, (state, chosen, scales) in enumerate(zip(routed.rows.double(), routed.index, routed.weights, strict=True)):
        for expert, scale in zip(chosen.tolist(), scales.tolist(), strict=True):
            total[row] += scale * (down[expert] @ (F.silu(gate[expert] @ state) * (up[expert] @ state)))
    return total


@dataclass(frozen=True)
class Ranks:
    """The experts modules of all tensor ranks, as threads of this process."""

    modules: list[Experts]
    gathers: list[Gather]

    def of(self, given: Routed, *, fill: float = 0.0) -> Tensor:
        """[real rows, hidden], the same on every rank."""
        padded = given.padded(fill=fill)

        def run(rank: int) -> Tensor:
            self.gathers[rank].rows = given.rows.shape[0]
            output: Tensor = self.modules[rank](padded.rows, padded.index, padded.weights)
            return output

        with ThreadPoolExecutor(len(self.modules)) as pool:
            outputs = list(pool.map(run, range(len(self.modules))))
        assert all(torch.equal(outputs[0], other) for other in outputs)
        assert not outputs[0][given.rows.shape[0] :].any()
        return outputs[0][: given.rows.shape[0]]


def ranks_of(
    weights: ExpertWeights, *, tensor: int = 1, is_wide: bool = True, is_chunked: bool = True, **options: Any
) -> Ranks:
    """The ranks of a tensor degree; without `is_chunked` each has one product over all of its columns."""
    chunks = column_chunks(weights.down.shape[2])
    runs = [chunks[first:last] for first, last in split_evenly(len(chunks), tensor)]
    widths = [[stop - start for start, stop in run] for run in runs]
    hub = ExchangeHub(tensor)
    gathers = [
        Gather(MemoryExchange(hub, rank) if tensor > 1 else None, degree=tensor, rank=rank) for rank in range(tensor)
    ]
    modules = [
        Experts(
            ExpertWeights(
                weights.gate[:, run[0][0] : run[-1][1]].clone(),
                weights.up[:, run[0][0] : run[-1][1]].clone(),
                weights.down[:, :, run[0][0] : run[-1][1]].clone(),
            ),
            WideActivation(nn.SiLU()) if is_wide else nn.SiLU(),
            gather,
            widths if is_chunked else [[sum(each)] for each in widths],
            **{"row_multiple": 8, "min_columns": 16, **options},
        )
        for gather, run in zip(gathers, runs, strict=True)
    ]
    return Ranks(modules, gathers)


@pytest.mark.parametrize("tensor", [1, 3])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_the_sum_is_that_of_the_definition(tensor: int, is_chunked: bool) -> None:
    """Tests values against a plain reference, in both modes, with two experts that no row chose."""
    weights, given = expert_weights(179, torch.float32), routed(21, torch.float32, experts=range(1, 5))
    modules = ranks_of(weights, tensor=tensor, is_chunked=is_chunked, row_multiple=8 if is_chunked else 1)
    torch.testing.assert_close(modules.of(given).double(), plain_sum(weights, given), rtol=1e-4, atol=1e-4)


def cut_bits_differ(*, width: int = 179, dtype: torch.dtype = torch.float32, **options: Any) -> bool:
    """Whether some tensor degree gives other bits than degree 1."""
    weights, given = expert_weights(width, dtype), routed(37, dtype)
    expected = ranks_of(weights, **options).of(given)
    degrees = range(2, len(column_chunks(width)) + 1)
    return any(not torch.equal(expected, ranks_of(weights, tensor=each, **options).of(given)) for each in degrees)


def company_bits_differ(*, width: int = 179, dtype: torch.dtype = torch.float32, **options: Any) -> bool:
    """Whether some row has other bits in a batch than alone; in one batch all rows choose the same experts."""
    modules = ranks_of(expert_weights(width, dtype), **options)
    for given in (routed(37, dtype), routed(8, dtype, experts=range(CHOSEN))):
        together = modules.of(given)
        if any(not torch.equal(row, modules.of(given.only(index))[0]) for index, row in enumerate(together)):
            return True
    return False


@pytest.mark.parametrize("width", [40, 128, 179])
@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
def test_bits_do_not_depend_on_the_cut(width: int, dtype: torch.dtype, prepacked: bool) -> None:
    """Tests every tensor degree, with widths that are no multiple of 16 and ranks of unequal shares."""
    assert not cut_bits_differ(width=width, dtype=dtype, prepacked=prepacked)


@pytest.mark.parametrize("width", [40, 128, 179])
@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
def test_bits_do_not_depend_on_the_company(width: int, dtype: torch.dtype, prepacked: bool) -> None:
    """Tests every row of a batch against that row alone: its experts see one row where they saw many."""
    assert not company_bits_differ(width=width, dtype=dtype, prepacked=prepacked)


def in_order_of_choice(chosen: Tensor, num_experts: int) -> Iterator[Any]:
    """The groups in the order in which a batch's rows name the experts."""
    groups = {group.expert: group for group in GROUPS(chosen, num_experts)}
    yield from (groups[expert] for expert in dict.fromkeys(chosen.flatten().tolist()))


GROUPS = experts_module._groups


@pytest.mark.parametrize(
    ("breaks", "width", "options"),
    [
        (company_bits_differ, 179, {"row_multiple": 1}),
        (cut_bits_differ, 179, {"is_chunked": False}),
        (company_bits_differ, 83, {"is_wide": False}),
    ],
)
def test_each_measure_is_needed(breaks: Callable[..., bool], width: int, options: dict[str, Any]) -> None:
    """Tests that these tests can fail: without row groups of 8, chunks or wide activations some bits differ."""
    assert not breaks(width=width)
    assert breaks(width=width, **options)


def test_the_order_of_the_experts_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the tests of company fail where experts are added in the order of the batch."""
    monkeypatch.setattr(experts_module, "_groups", in_order_of_choice)
    assert company_bits_differ()


def test_padding_rows_disturb_nobody() -> None:
    """Tests that what stands in padding rows, infinities too, reaches no other row and costs no expert a row."""
    modules, given = ranks_of(expert_weights(128, torch.float32)), routed(5, torch.float32)
    assert torch.equal(modules.of(given), modules.of(given, fill=float("inf")))


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with several experts per token and experts that are no multiple of 16 wide."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def transformers_tokens(folder: Path, num_tokens: int) -> list[int]:
    """Greedy tokens of `generate` after `prompt(37)`."""
    return greedy_tokens(reference_model(folder), prompt(37), num_tokens)


@pytest.mark.thorough
def test_float32_tokens_are_those_of_transformers(folder: Path) -> None:
    """Tests varied greedy tokens against `generate`, whole and cut, and some in fast mode."""
    expected = transformers_tokens(folder, 120)
    assert len(set(expected)) >= 50
    for pipeline, tensor, num_tokens in ((1, 1, 120), (1, 2, 50), (1, 3, 50), (2, 2, 50)):
        replica = LocalReplica(folder, pipeline=pipeline, tensor=tensor)
        assert expected[:num_tokens] == replica.generate(key_of(0), prompt(37), num_tokens)
    for tensor in (1, 3):
        replica = LocalReplica(folder, tensor=tensor, deterministic=False)
        assert expected[:30] == replica.generate(key_of(0), prompt(37), 30)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_s_bits_do_not_depend_on_the_cut_or_the_chunk(folder: Path, dtype: str) -> None:
    """Tests logits of prefill and decode for several (P, M), and for prefill chunks down to one token."""
    model = describe_model(folder, dtype)
    expected = history(LocalReplica(folder, model), chunk=64)
    for pipeline, tensor in ((1, 2), (1, 3), (2, 2), (1, 5)):
        replica = LocalReplica(folder, model, pipeline=pipeline, tensor=tensor)
        assert_same_bits(expected, history(replica, chunk=64))
    for chunk in (1, 7, 16):
        assert_same_bits(expected, history(LocalReplica(folder, model), chunk=chunk))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_s_bits_do_not_depend_on_the_batch_or_the_history(folder: Path, dtype: str) -> None:
    """Tests rows alone against a mixed batch, and a recomputed KV against the one that decoding wrote."""
    assert_same_bits(*recomputed(folder, dtype=dtype))
    alone, mixed = (LocalReplica(folder, dtype=dtype) for _ in range(2))
    lengths = [1, 15, 16, 17, 33, 70]
    for replica in (alone, mixed):
        for index, length in enumerate(lengths):
            replica.prefill(key_of(index), prompt(length, seed=index), chunk=64)
    sequences = [BatchSequence(key_of(index), length, 1, True, (index,)) for index, length in enumerate(lengths)] + [
        BatchSequence(key_of(20), 0, 45, True, tuple(prompt(45, seed=20))),
        BatchSequence(key_of(21), 0, 9, True, tuple(prompt(9, seed=21))),
    ]
    expected = [row for each in sequences for row in alone.forward(StageBatch((each,)))]
    assert_same_bits(expected, list(mixed.forward(StageBatch(tuple(sequences)))))


def test_a_wide_gate_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the gate of a shared expert has other bits in a chunk of few rows, unless it is made wide."""
    folder = FAMILIES["qwen2_moe"](tmp_path)

    def rows(chunk: int) -> Tensor:
        return torch.stack(history(LocalReplica(folder), chunk=chunk))

    assert torch.equal(rows(64), rows(4))
    monkeypatch.setattr(stage_model, "WideGate", lambda gate, width: gate)
    assert not torch.equal(rows(64), rows(4))


def test_experts_migrate_like_any_weight(folder: Path) -> None:
    """Tests that what the ranks of degree 3 hold makes up both ranks of degree 2, bit for bit and without a read."""
    model = describe_model(folder, "bfloat16")
    checkpoint = Checkpoint(folder, model)
    shards = {
        (tensor, rank): stage_shard(model, layers=(0, model.num_layers), tensor=tensor, rank=rank)
        for tensor in (2, 3)
        for rank in range(tensor)
    }
    old = [loaded_weights(model, checkpoint, shards[3, rank]) for rank in range(3)]
    num_bytes = checkpoint.bytes_read
    for rank in range(2):
        slices = shard_slices(model, shards[2, rank])
        new = WeightStore(model)
        new.reserve(slices)
        for piece in new.missing(slices):
            for source in old:
                for held in source.holdings():
                    start, stop = max(piece.start, held.start), min(piece.stop, held.stop)
                    if held.parameter == piece.parameter and start < stop:
                        content = source.read_range(piece.parameter, piece.dim, start, stop)
                        new.write_range(piece.parameter, piece.dim, start, stop, content)
        assert checkpoint.bytes_read == num_bytes
        expected = loaded_weights(model, Checkpoint(folder, model), shards[2, rank])
        assert all(torch.equal(expected.tensor(piece), new.tensor(piece)) for piece in slices)


def test_layers_of_two_kinds_are_refused(tmp_path: Path) -> None:
    """Tests that a model some of whose layers have no experts is refused by name."""
    with pytest.raises(ModelError, match=r"mlp\.experts\.gate_up_proj is in 3 of 4 layers"):
        describe_model(FAMILIES["qwen3_moe"](tmp_path, mlp_only_layers=[1]))
