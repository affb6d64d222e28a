"""Models by name: their sizes, that they are cut whole, and the paper's profiles."""

from __future__ import annotations

import json
import tomllib
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from spotserve.core.model_tables import MODEL_NAMES, model_table
from spotserve.core.paper_profiles import TIMES, paper_profile
from spotserve.core.slices import layer_split, max_tensor_degree, parameter_slices, shard_bytes, stage_shard
from spotserve.core.spec import ModelSpec, ServingSpec
from spotserve.errors import SpecError

PLANS = Path(__file__).resolve().parents[2] / "plans"


def spec_of(case: str) -> ServingSpec:
    return ServingSpec.model_validate(tomllib.loads((PLANS / case / "spec.toml").read_text(encoding="utf-8")))


def weights(model: ModelSpec) -> int:
    """Parameters of a model, a tied head counted once."""
    return sum(
        prod(each.shape) * (model.num_layers if each.stage == "layer" else 1)
        for each in model.parameters
        if each.source is None
    )


@pytest.mark.parametrize("name", ["opt-6.7b", "gpt-20b"])
def test_tables_are_those_of_the_plans(name: str) -> None:
    """Tests that a named model is the one that the worked example of the same name has."""
    assert spec_of(f"{name}-t4").model == model_table(name)


@pytest.mark.parametrize(
    ("name", "billions"), [("opt-6.7b", 6.66), ("gpt-20b", 20.25), ("llama-30b", 29.96), ("llama-70b", 70.55)]
)
def test_models_have_their_sizes(name: str, billions: float) -> None:
    """Tests that each table has as many parameters as the model is said to have."""
    assert billions == round(weights(model_table(name)) / 1e9, 2)


def test_the_papers_models_have_the_papers_shapes() -> None:
    """Tests hidden size, heads, layers and vocabulary of the LLaMA-30B that the paper measured, 4 bytes a weight."""
    model = model_table("llama-30b")
    assert (7168, 56, 48, 50_304) == (model.hidden_size, model.num_q_heads, model.num_layers, model.vocab_size)
    assert ("float32", 640) == (model.dtype, model.max_model_len)
    layer = stage_shard(model, layers=(1, 2), tensor=1, rank=0)
    assert 4 * (12 * 7168**2 + 13 * 7168) == shard_bytes(model, layer)


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 8), (3, 4), (4, 3)])
def test_tables_are_cut_whole(name: str, pipeline: int, tensor: int) -> None:
    """Tests that the ranks of a stage own every column of a split parameter, a kv head twice at most."""
    model = model_table(name)
    assert tensor <= max_tensor_degree(model)
    total = 0
    for layers in layer_split(model.num_layers, pipeline):
        total += layers[1] - layers[0]
        for parameter in model.parameters:
            owned = sorted(
                run for rank in range(tensor) for run in parameter_slices(model, parameter, tensor=tensor, rank=rank)
            )
            assert 0 == owned[0][0]
            assert parameter.shape[parameter.dim] == max(stop for _, stop in owned)
            assert all(after[0] <= before[1] for before, after in pairwise(owned))
    assert model.num_layers == total


def test_dtype_and_length_can_be_given() -> None:
    """Tests that a model is served in another dtype and shorter, and its name is read in any case."""
    model = model_table("GPT-20B", dtype="bfloat16", max_model_len=512)
    assert ("bfloat16", 512, 2) == (model.dtype, model.max_model_len, model.element_bytes)


@pytest.mark.parametrize(
    ("name", "length", "words"), [("gpt-3", None, "'gpt-3'"), ("gpt-20b", 641, "641"), ("gpt-20b", 0, "0 is not")]
)
def test_refuses_unknown_models(name: str, length: int | None, words: str) -> None:
    """Tests that an unknown name and a length beyond the model are refused, with what there is."""
    with pytest.raises(SpecError) as caught:
        model_table(name, max_model_len=length)
    assert words in caught.value.message


@pytest.mark.parametrize("name", sorted(TIMES))
def test_profiles_are_the_published_ones(shared_data: Path, name: str) -> None:
    """Tests that each profile has the published milliseconds, batch by batch, of the degrees it has."""
    files = {"opt-6.7b": "6.7B", "gpt-20b": "h6144", "llama-30b": "h7168"}
    path = shared_data / f"spotserve-paper/profiles/T4-4x/megatron_{files[name]}_profile.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    profile = paper_profile(name)
    expected = {
        (tokens, tensor): published[f"tp-{tensor}"][f"bsz-{batch}"][phase]
        for tensor in (1, 2, 4, 8)
        for batch in (1, 2, 4, 8)
        for phase, tokens in (("incr", batch), ("init", 512 * batch))
    }
    assert expected == {(point.tokens, point.tensor): point.layer_ms for point in profile.latencies}


def test_profiles_agree_with_the_plans() -> None:
    """Tests that the profile of GPT-20B is that of its worked example, and OPT-6.7B's has one degree more."""
    assert spec_of("gpt-20b-t4").profile == paper_profile("gpt-20b")
    assert set(spec_of("opt-6.7b-t4").profile.latencies) < set(paper_profile("opt-6.7b").latencies)


def test_refuses_models_that_the_paper_has_not() -> None:
    """Tests that there is no profile of a model that the paper did not measure."""
    with pytest.raises(SpecError, match="llama-70b"):
        paper_profile("llama-70b")
