"""What the paper's models need of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotserve.solvers.paper.models import (
    GPT_20B,
    LLAMA_30B,
    OPT_6_7B,
    PAPER_MODELS,
    PaperModel,
    kv_bytes,
    min_gpus,
    noop_layers,
    weight_bytes,
)
from tests.solvers.paper.golden import golden_rows


def test_every_row_of_gpu_memory(shared_data: Path) -> None:
    """Tests that weight and KV bytes per GPU meet every published row."""
    for row in golden_rows(shared_data, "gpu_memory.csv"):
        model, pipeline, tensor = PAPER_MODELS[row["model"]], int(row["P"]), int(row["M"])
        first = weight_bytes(model, pipeline=pipeline, tensor=tensor, is_last=pipeline == 1)
        last = weight_bytes(model, pipeline=pipeline, tensor=tensor, is_last=True)
        assert (first, last) == (int(row["weight_bytes_first_stage"]), int(row["weight_bytes_last_stage"])), row
        assert int(row["gpus"]) == pipeline * tensor
        for batch in (1, 4, 8):
            held = kv_bytes(model, pipeline=pipeline, tensor=tensor, batch=batch, tokens=640)
            assert held == int(row[f"kv_bytes_per_gpu_B{batch}"]), row


def test_gpt_20b_as_the_paper_cuts_it() -> None:
    """Tests GPT-20B at (3, 4): weights of the first and last stage, and KV of 640 tokens for one and eight."""
    assert weight_bytes(GPT_20B, pipeline=3, tensor=4, is_last=False) == 8_524_824_576
    assert weight_bytes(GPT_20B, pipeline=3, tensor=4, is_last=True) == 9_783_164_928
    assert kv_bytes(GPT_20B, pipeline=3, tensor=4, batch=1, tokens=640) == 125_829_120
    assert kv_bytes(GPT_20B, pipeline=3, tensor=4, batch=8, tokens=640) == 1_006_632_960


@pytest.mark.parametrize(("model", "gpus"), [(OPT_6_7B, 4), (GPT_20B, 12), (LLAMA_30B, 16)])
def test_min_gpus_of_table_1(model: PaperModel, gpus: int) -> None:
    """Tests that 12 GB of weights per T4 give Table 1's 4, 12 and 16 GPUs."""
    assert min_gpus(model, weight_budget_bytes=12 * 10**9) == gpus


def test_less_room_needs_more_gpus() -> None:
    """Tests that 9 GB, as without the migration planner, take GPT-20B to 16 GPUs, and that no room holds nothing."""
    assert min_gpus(GPT_20B, weight_budget_bytes=9 * 10**9) == 16
    assert min_gpus(GPT_20B, weight_budget_bytes=10**9) is None


def test_padding() -> None:
    """Tests which padded layers compute nothing."""
    assert noop_layers(OPT_6_7B) == (8, 17, 26, 35)
    assert noop_layers(GPT_20B) == (11, 23, 35, 47)
    assert noop_layers(LLAMA_30B) == ()
