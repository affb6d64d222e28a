"""Scenario files: what they say is what is simulated, and what is wrong is one line with its path and a hint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spotserve.cli.scenario_file import scenario_of
from spotserve.errors import SpecError
from spotserve.sim.scenario import ONDEMAND

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "scenarios"
TINY = (EXAMPLES / "tiny.toml").read_text(encoding="utf-8")

Spoiled = Callable[[str, str], Path]


@pytest.fixture
def spoiled(tmp_path: Path) -> Spoiled:
    """Writes the tiny scenario with one text replaced by another."""

    def write(old: str, new: str) -> Path:
        assert 1 == TINY.count(old), old
        path = tmp_path / "scenario.toml"
        path.write_text(TINY.replace(old, new), encoding="utf-8")
        return path

    return write


def refusal(path: Path) -> SpecError:
    """The error that reading a scenario ends with."""
    with pytest.raises(SpecError) as caught:
        scenario_of(path)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_examples_are_read(name: str) -> None:
    """Tests that every example is a scenario whose files are there, with requests, capacity and an end."""
    scenario = scenario_of(EXAMPLES / name)
    assert scenario.arrivals()
    assert scenario.trace.events
    assert scenario.duration_s > 0
    assert ONDEMAND not in scenario.policies or scenario.ondemand_instances is not None


def test_the_seed_draws_the_requests() -> None:
    """Tests that another seed gives other arrivals and the same seed the same ones; the file's is the default."""
    path = EXAMPLES / "tiny.toml"
    assert 1 == scenario_of(path).seed
    assert scenario_of(path).workload == scenario_of(path, seed=1).workload
    assert scenario_of(path).workload.arrivals != scenario_of(path, seed=2).workload.arrivals


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("seed = 1", "sede = 1", "sede", "extra inputs are not permitted"),
        ("seed = 1", "seed = -1", "seed", "greater than or equal to 0"),
        ("seed = 1", 'seed = "one"', "seed", "valid integer"),
        ("duration_s = 60", "duration_s = -60", "duration_s", "greater than 0"),
        ("duration_s = 60", "duration_s = nan", "duration_s", ""),
        ("duration_s = 60", "duration_s = inf", "duration_s", ""),
        ('policies = ["live"]', "policies = []", "policies", "at least 1"),
        ('name = "tiny"', 'name = ""', "name", "at least 1"),
        ("rate_rps = 0.5", "rate_rps = 0", "workload.rate_rps", "greater than 0"),
        ("rate_rps = 0.5", "", "workload", "a workload has a file or a rate_rps"),
        ("cv = 1.0", "cv = -1.0", "workload.cv", "greater than or equal to 0"),
        ("cv = 1.0", "swing = 1.0", "workload.swing", "less than 1"),
        ("prompt_tokens = 512", "prompt_tokens = 0", "workload.lengths.prompt_tokens", "greater than or equal to 1"),
        ("prompt_tokens = 512", 'kind = "normal"', "workload.lengths.kind", "match pattern"),
        ("instances = 2", "instances = -2", "trace.instances", "greater than or equal to 0"),
        ("prompt_tokens = 512", 'kind = "uniform"', "workload.lengths", "need prompt_range and output_range"),
        ("prompt_tokens = 512", "prompt_range = [1, 9]", "workload.lengths", "prompt_range has no meaning with fixed"),
        ("prompt_tokens = 512", "output_cv = 2.0", "workload.lengths", "output_cv has no meaning with fixed"),
        ("cv = 1.0", "stop_s = 9.0", "workload", "stop_s has no meaning without a file"),
        ("rate_rps = 0.5", 'file = "x.json"', "workload", "cv has no meaning with a file"),
        ("instances = 2", "instances = 2\ngrace_s = 5", "trace", "grace_s has no meaning without zones"),
        ("instances = 2", 'file = "x"\nmost_per_zone = 5', "trace", "most_per_zone has no meaning without zones"),
        ("instances = 2", "instances = 2\nstop_s = 5", "trace", "stop_s has no meaning with instances that stay"),
        ('name = "opt-6.7b"', 'spec = "x.toml"', "model", "max_model_len has no meaning with a spec"),
        ("instances = 2", "", "trace", "a trace is one of instances, file and zones"),
        ("instances = 2", 'instances = 2\nfile = "x"', "trace", "a trace is one of instances, file and zones"),
        ("instances = 2", 'zones = ["a"]\nfile = "x"', "trace", "a trace is one of instances, file and zones"),
        ('name = "opt-6.7b"', 'name = "opt-6.7b"\nspec = "x"', "model", "either a name or a spec"),
        ('name = "opt-6.7b"', "", "model", "either a name or a spec"),
        ("gpu_memory_bytes = 14_000_000_000", "", "hardware.gpu_memory_bytes", "required"),
        ("gpus_per_instance = 4", "gpus_per_instance = 0", "hardware.gpus_per_instance", "greater than or equal to 1"),
        ("spot_usd_per_hour = 1.9046", "spot_usd_per_hour = 0", "hardware.spot_usd_per_hour", "greater than 0"),
        ("latency_s = 10", "latency_s = 0", "slo.latency_s", "greater than 0"),
        ("latency_s = 10", "p99_s = 10", "slo.p99_s", "extra inputs are not permitted"),
    ],
)
def test_what_is_malformed_is_told_with_its_place(spoiled: Spoiled, old: str, new: str, where: str, what: str) -> None:
    """Tests that a wrong value, an unknown key and a contradiction each name the file, the place and a schema."""
    path = spoiled(old, new)
    error = refusal(path)
    assert error.message.startswith(f"SCENARIO {path} is malformed at {where}: ")
    assert what in error.message.lower()
    assert error.hint is not None
    assert "schemas/scenario.schema.json" in error.hint


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ('name = "opt-6.7b"', 'name = "gpt-5"', "model 'gpt-5' has no table", "gpt-20b"),
        ('profile = "paper"', 'profile = "t5"', "profile 't5' is neither a file nor known", "known: paper, t4"),
        ('profile = "paper"', 'profile = "."', "profile '.' is neither a file nor known", "known: paper, t4"),
        ("[hardware]", '[model.solvers]\nplaces = "reuse"\n[hardware]', "places is not one of", "did you mean place?"),
        (
            "[hardware]",
            '[model.solvers]\nplace = "re-use"\n[hardware]',
            "place=re-use is not one of",
            "did you mean reuse?",
        ),
        ("instances = 2", 'file = "none.json"', "none.json", None),
        ("instances = 2", 'zones = ["none.json"]', "none.json", None),
        ("rate_rps = 0.5\ncv = 1.0", 'file = "none.json"', "workload", None),
        ("duration_s = 60", "", "scenario 'tiny' has no end", "duration_s"),
        ("max_model_len = 640", "max_model_len = 100_000", "max_model_len 100000", None),
    ],
)
def test_what_cannot_be_found_is_told(spoiled: Spoiled, old: str, new: str, message: str, hint: str | None) -> None:
    """Tests that a name that is none, a file that is not there and a missing number are one line each."""
    error = refusal(spoiled(old, new))
    assert message in error.message
    assert hint is None or (error.hint is not None and hint in error.hint)


def test_a_scenario_that_is_no_toml(tmp_path: Path) -> None:
    """Tests that a folder, nothing, a broken line and bytes that are no text are refused."""
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"name = [")
    no_text = tmp_path / "no_text.toml"
    no_text.write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "none.toml", broken, no_text):
        assert refusal(path).message.startswith(f"SCENARIO {path} ")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a scenario and its files may be moved together, and read from anywhere."""
    for name in ("gpt-20b-a_s.toml", "a_s.json", "gpt-20b-requests.json"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    monkeypatch.chdir("/")
    assert scenario_of(tmp_path / "gpt-20b-a_s.toml").workload == scenario_of(EXAMPLES / "gpt-20b-a_s.toml").workload


def test_scalings_are_told(tmp_path: Path) -> None:
    """Tests that a lag, a window, a rate and clipped lengths each leave a note."""
    for name in ("a_s.json", "gpt-20b-requests.json"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    text = (EXAMPLES / "gpt-20b-a_s.toml").read_text(encoding="utf-8")
    text = text.replace('file = "a_s.json"', 'file = "a_s.json"\nready_after_s = 30\nstart_s = 60\nstop_s = 600')
    text = text.replace('requests.json"', 'requests.json"\nrate_rps = 0.7\nmax_output_tokens = 100')
    path = tmp_path / "scaled.toml"
    path.write_text(text.replace("duration_s = 1320\n", ""), encoding="utf-8")
    scenario = scenario_of(path)
    assert 540.0 == scenario.duration_s
    assert [210.0, 330.0] == [one.at_s for one in scenario.trace.events if one.kind == "add" and one.at_s > 0]
    assert "an instance is ready 30 s after the trace adds it" in scenario.trace.notes
    assert any(note.startswith("60 to 600 s of it") for note in scenario.trace.notes)
    assert any("0.7 requests per second" in note for note in scenario.workload.notes)
    assert any("answers to 100 tokens: 461 of 461 requests" in note for note in scenario.workload.notes)
    assert "storage 1e+09 bytes/s by the scenario" in scenario.spec.profile.source


def test_a_roofline_knows_the_instances_of_the_scenario(spoiled: Spoiled) -> None:
    """Tests that a profile of the catalogue is made for the GPUs of an instance and the dtype that are asked for."""
    text = 'profile = "a10g"\ndtype = "float16"'
    alone = scenario_of(spoiled('profile = "paper"', text)).spec
    assert "float16" == alone.model.dtype
    assert "a10g" == alone.profile.device
    other = spoiled('profile = "paper"', text)
    other.write_text(other.read_text().replace("gpus_per_instance = 4", "gpus_per_instance = 1"), encoding="utf-8")
    assert scenario_of(other).spec.profile.latencies != alone.profile.latencies


def test_gpus_of_another_type_are_refused(tmp_path: Path) -> None:
    """Tests that a trace that names GPUs which the profile does not measure is refused, and one of its own is not."""
    for gpu_type in ("h100", "cuda"):
        entry = {"at_s": 0, "kind": "add", "count": 2, "gpu_type": gpu_type}
        trace = {"format_version": "0.1", "end_s": 60, "events": [entry]}
        (tmp_path / "typed.json").write_text(json.dumps(trace), encoding="utf-8")
        path = tmp_path / "scenario.toml"
        path.write_text(TINY.replace("instances = 2", 'file = "typed.json"'), encoding="utf-8")
        if gpu_type == "cuda":
            assert scenario_of(path).trace.events
        else:
            assert "GPU type h100, the profile is of cuda" in refusal(path).message


def test_no_clipping_is_no_note() -> None:
    """Tests that a workload that nobody cuts has no note about cutting."""
    assert not any("cut to" in note for note in scenario_of(EXAMPLES / "tiny.toml").workload.notes)


def test_on_demand_is_a_fleet_that_stays() -> None:
    """Tests that the policy ondemand plays `live` on so many instances that never go, at their price."""
    scenario = scenario_of(EXAMPLES / "gpt-20b-a_s.toml")
    played = scenario.of_policy(ONDEMAND)
    assert "live" == played.spec.policy
    assert 8 == sum(len(one.instances) for one in played.trace.events if one.at_s == 0)
    assert {"add"} == {one.kind for one in played.trace.events}
    assert scenario.hardware.ondemand_usd_per_hour == played.hardware.spot_usd_per_hour
    assert "reroute" == scenario.of_policy("reroute").spec.policy
    assert scenario.trace == scenario.of_policy("reroute").trace
