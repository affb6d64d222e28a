"""The paper's T4 figures and models in our own schema: what the cases under plans/ hold."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from spotserve.core.slices import shard_bytes, stage_shard
from spotserve.core.spec import ServingSpec
from spotserve.solvers.paper.models import GPT_20B, PAPER_MODELS, sharded_floats
from tests.solvers.paper.golden import PROFILE_FILES

PLANS = Path(__file__).resolve().parents[3] / "plans"
CASES = {"opt-6.7b-t4": "OPT-6.7B", "gpt-20b-t4": "GPT-20B"}


def spec_of(case: str) -> ServingSpec:
    """The spec of a case."""
    return ServingSpec.model_validate(tomllib.loads((PLANS / case / "spec.toml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("case", CASES)
def test_the_profile_is_the_artifact_s(shared_data: Path, case: str) -> None:
    """Tests that every latency point is one of the published table: decoding below 512 rows, prompts from there on."""
    path = shared_data / "spotserve-paper/profiles/T4-4x" / f"{PROFILE_FILES[CASES[case]]}_profile.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    points = spec_of(case).profile.latencies
    assert len({(point.tensor, point.tokens) for point in points}) == len(points) >= 24
    for point in points:
        is_prompt = point.tokens >= 512
        batch = point.tokens // 512 if is_prompt else point.tokens
        cell = published[f"tp-{point.tensor}"][f"bsz-{batch}"]
        assert point.layer_ms == cell["init" if is_prompt else "incr"], point


@pytest.mark.parametrize("case", CASES)
def test_the_parameter_table_is_the_paper_s_model(case: str) -> None:
    """Tests sizes and weight bytes: 12 h^2 + 13 h floats a layer, as many layers as are real, embedding and logits."""
    model, paper = spec_of(case).model, PAPER_MODELS[CASES[case]]
    hidden = paper.hidden
    assert (model.num_layers, model.hidden_size, model.num_q_heads) == (paper.layers, hidden, paper.heads)
    whole = shard_bytes(model, stage_shard(model, layers=(0, model.num_layers), tensor=1, rank=0))
    positions = next(each for each in model.parameters if "embed_positions" in each.name).shape[0]
    floats = model.num_layers * (sharded_floats(paper) + 6 * hidden) + (2 * model.vocab_size + positions + 2) * hidden
    assert whole == 4 * floats


def test_gpt_20b_goes_where_the_paper_goes() -> None:
    """Tests that the plan of the case is the paper's (2,2,8) -> (2,3,4), live, without the instance that goes."""
    plan = json.loads((PLANS / "gpt-20b-t4" / "expected-plan.json").read_text(encoding="utf-8"))
    before = plan["snapshot"]["world"]["replicas"]
    after = plan["target"]["replicas"]
    degrees = [
        (len(replicas), len(replicas[0]["stages"]), len(replicas[0]["stages"][0]["gpus"]))
        for replicas in (before, after)
    ]
    gpus = {gpu for replica in after for stage in replica["stages"] for gpu in stage["gpus"]}
    assert degrees == [(2, 2, 8), (2, 3, 4)]
    assert (plan["mode"], plan["complete"], len(gpus)) == ("live", True, 24)
    assert not any(gpu.startswith("i0/") for gpu in gpus)
    assert plan["estimates"]["slack_s"] > 20
    assert spec_of("gpt-20b-t4").model.vocab_size == GPT_20B.vocab
