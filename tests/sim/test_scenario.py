"""Scenario files: what they say is what is simulated, and what is wrong is one line with its path and a hint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spotserve.cli.scenario_file import scenario_of
from spotserve.core.canonical import canonical_json
from spotserve.core.gpu_catalogue import gpu_type
from spotserve.core.model_tables import model_table
from spotserve.core.paper_profiles import paper_profile
from spotserve.core.roofline import roofline_profile
from spotserve.core.spec import Limits
from spotserve.errors import SpecError
from spotserve.sim.scenario import ONDEMAND

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "scenarios"
TINY = (EXAMPLES / "tiny.toml").read_text(encoding="utf-8")

ZONE = "[[trace.hazards]]\nzone = 'a'\ninstances = 2"
ZONES = "hazards = [{zone = 'a', instances = 2, shocks_per_day = 5000}]"
L4 = """[hardware.types.l4]
gpus_per_instance = 2
gpu_memory_bytes = 22_000_000_000
spot_usd_per_hour = 1.0
ondemand_usd_per_hour = 2.3
"""

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
        ("rate_rps = 0.5", "", "workload", "a workload has a file or a rate_rps or a curve"),
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
        ("instances = 2", "", "trace", "a trace is one of instances, file, zones and hazards"),
        ("instances = 2", 'instances = 2\nfile = "x"', "trace", "a trace is one of instances, file, zones and hazards"),
        ("instances = 2", 'zones = ["a"]\nfile = "x"', "trace", "a trace is one of instances, file, zones and hazards"),
        ("instances = 2", 'instances = 2\nvictims = "newest"', "trace", "victims has no meaning without zones"),
        ("instances = 2", 'zones = ["a"]\nvictims = "best"', "trace.victims", "input should be 'oldest', 'newest'"),
        ("instances = 2", 'zones = ["a"]\ngpu_types = ["own", "t4"]', "trace", "2 gpu_types for 1 zones"),
        ("instances = 2", 'file = "a"\ngpu_types = ["t4"]', "trace", "gpu_types has no meaning with a file"),
        ("instances = 2", f"{ZONES}\ngpu_types = ['t4']", "trace", "gpu_types has no meaning with hazards"),
        ("instances = 2", f"{ZONES}\nstop_s = 9", "trace", "stop_s has no meaning with hazards"),
        ("instances = 2", f"{ZONES}\nready_after_s = 9", "trace", "ready_after_s has no meaning with hazards"),
        ("instances = 2", f"{ZONE}\nshock_share = 1.5", "trace.hazards[0].shock_share", "less than or equal to 1"),
        ("instances = 2", f"{ZONE}\nshocks_a_day = 1", "trace.hazards[0].shocks_a_day", "extra inputs"),
        (
            "instances = 2",
            "instances = 2\nunnoticed_share = 1",
            "trace",
            "unnoticed_share has no meaning without hazards",
        ),
        ("cv = 1.0", "period_s = 60", "workload", "period_s has no meaning without a swing"),
        ("cv = 1.0", "share = 0.5", "workload", "share has no meaning without a file"),
        ("cv = 1.0", "swing = 0.5\ncurve = {steps_rps = [1]}", "workload", "swing has no meaning with a curve"),
        ("cv = 1.0", "curve = {}", "workload.curve", "a curve is one of points, steps_rps and file"),
        ("cv = 1.0", "curve = {points = [[0, 1]], step_s = 5}", "workload.curve", "step_s has no meaning with points"),
        ("cv = 1.0", "curve = {points = [[0, -1]]}", "workload.curve.points[0][1]", "greater than or equal to 0"),
        ("cv = 1.0", "curve = {points = [[0]]}", "workload.curve.points[0]", "required"),
        (
            "rate_rps = 0.5\ncv = 1.0",
            'file = "x"\ncurve = {steps_rps = [1]}',
            "workload",
            "curve has no meaning with a",
        ),
        ("prompt_tokens = 512", 'file = "x"', "workload.lengths", "file has no meaning with fixed"),
        ("prompt_tokens = 512", 'kind = "file"', "workload.lengths", "lengths of a file need file"),
        (
            "prompt_tokens = 512",
            'kind = "file"\nfile = "x"',
            "workload.lengths",
            "output_tokens has no meaning with leng",
        ),
        ("max_running = 8", "roofline = {memory_efficiency = 1.1}", "model.roofline.memory_efficiency", "less than or"),
        ("[trace]", "[hardware.types.l4]\n[trace]", "hardware.types.l4.gpu_memory_bytes", "required"),
        ("[trace]", f"{L4}start_s = 1\n[trace]", "hardware.types.l4.start_s", "extra inputs are not permitted"),
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
        ("max_running = 8", "roofline = {decode_rows = 4}", "model.roofline has no meaning with profile 'paper'", "t4"),
        ("instances = 2", "instances = 2\ngpu_types = ['l4']", "there is no hardware.types.l4", "[hardware.types.l4]"),
        ("[trace]", f"{L4.replace('l4', 'v100')}[trace]", "GPU type 'v100' of hardware.types has no times", "t4, l4"),
        ("[trace]", f"{L4.replace('l4', 'own')}[trace]", "hardware.types.own is the profile's own type", "cuda"),
        ("[trace]", f"{L4.replace('l4', 'cuda')}[trace]", "hardware.types.cuda is the profile's own type", "cuda"),
        ("[trace]", f"{L4}profile = 'x.json'\n[trace]", "profile 'x.json' is neither a file nor known", "known: paper"),
        ("instances = 2", f"{ZONE}\n{ZONE}", "zones ['a', 'a'] are not one or more, each named once", None),
        ("cv = 1.0", 'curve = {file = "none.csv"}', "workload", None),
        ("cv = 1.0", "curve = {points = [[9, 1], [0, 1]]}", "the rate at 0 s stands after that at 9 s", "sort them"),
        ("cv = 1.0", "curve = {steps_rps = [0, 0]}", "no request within 60 s, so no mean of 0.5", None),
        ("cv = 1.0", "swing = 0.5\nperiod_s = 0.01", "6000 periods of 0.01 s are not 1 to 1040", "a longer period_s"),
        ("prompt_tokens = 512\noutput_tokens = 64", 'kind = "file"\nfile = "none.csv"', "none.csv", None),
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


def test_a_window_ends_with_its_trace(tmp_path: Path) -> None:
    """Tests that a window beyond the end of a trace is refused: nobody knows what capacity was like then."""
    shutil.copy(EXAMPLES / "a_s.json", tmp_path / "a_s.json")
    path = tmp_path / "scenario.toml"
    path.write_text(TINY.replace("instances = 2", 'file = "a_s.json"\nstop_s = 1321'), encoding="utf-8")
    assert "trace.stop_s 1321 is after the end of trace a_s at 1320 s" in refusal(path).message


def test_a_roofline_knows_the_instances_of_the_scenario(spoiled: Spoiled) -> None:
    """Tests that a profile of the catalogue is made for the GPUs of an instance and the dtype that are asked for."""
    text = 'profile = "a10g"\ndtype = "float16"'
    alone = scenario_of(spoiled('profile = "paper"', text)).spec
    assert "float16" == alone.model.dtype
    assert "a10g" == alone.profile.device
    other = spoiled('profile = "paper"', text)
    other.write_text(other.read_text().replace("gpus_per_instance = 4", "gpus_per_instance = 1"), encoding="utf-8")
    assert scenario_of(other).spec.profile.latencies != alone.profile.latencies


def test_a_type_without_a_table_is_refused(tmp_path: Path) -> None:
    """Tests that a trace of GPUs of which nobody says memory and price is refused, and one of the own type is not."""
    for name in ("h100", "cuda"):
        entry = {"at_s": 0, "kind": "add", "count": 2, "gpu_type": name}
        trace = {"format_version": "0.1", "end_s": 60, "events": [entry]}
        (tmp_path / "typed.json").write_text(json.dumps(trace), encoding="utf-8")
        path = tmp_path / "scenario.toml"
        path.write_text(TINY.replace("instances = 2", 'file = "typed.json"'), encoding="utf-8")
        if name == "cuda":
            assert [""] == [event.gpu_type for event in scenario_of(path).trace.events]
        else:
            assert "instances of GPU type h100, and there is no hardware.types.h100" in refusal(path).message


def test_types_have_times_memory_and_prices(spoiled: Spoiled) -> None:
    """Tests that another type has a roofline of its own, the scenario's prices, and the slowest network for all."""
    path = spoiled("[trace]\ninstances = 2", f"{L4}[trace]\ninstances = 3\ngpu_types = ['own', 'l4']")
    scenario = scenario_of(path)
    assert ["", "l4", ""] == [event.gpu_type for event in scenario.trace.events]
    profile = scenario.spec.profile
    (device,) = profile.devices
    assert ("l4", 0.5, 1.9046 / 4) == (device.type, device.price_per_hour, profile.price_per_hour)
    assert device.latencies == roofline_profile(model_table("opt-6.7b"), gpu_type("l4"), gpus_per_instance=2).latencies
    # 0.9 of the L4's 40 Gbit/s is less than the paper's 50 Gbit/s; the paper's storage is the slower one.
    assert (0.9 * 5e9, 1e8) == (profile.link_bytes_per_s, profile.storage_bytes_per_s)
    assert 22_000_000_000 == scenario.hardware.of("l4").gpu_memory_bytes
    assert scenario.hardware == scenario.hardware.of("")


def test_a_type_may_have_a_measured_profile(spoiled: Spoiled, tmp_path: Path) -> None:
    """Tests that the times of a type come from the profile file that it names, whatever the type is called."""
    path = spoiled("[trace]", f"{L4.replace('l4', 'ours')}profile = 'measured.json'\n[trace]")
    measured = paper_profile("gpt-20b")
    (tmp_path / "measured.json").write_text(canonical_json(measured), encoding="utf-8")
    (device,) = scenario_of(path).spec.profile.devices
    assert ("ours", measured.latencies) == (device.type, device.latencies)


def test_the_seed_draws_losses(spoiled: Spoiled) -> None:
    """Tests that zones lose instances by the seed until duration_s, under which nothing else is drawn anew."""
    path = spoiled("instances = 2", f"{ZONES}\nshared_shocks_per_day = 2000\nunnoticed_share = 1\ngrace_s = 9")
    first, again, other = (scenario_of(path, seed=seed).trace for seed in (1, 1, 2))
    assert first == again
    assert first.events != other.events
    assert {"add", "kill"} == {event.kind for event in first.events}
    assert 60.0 == first.end_s
    assert scenario_of(path).workload == scenario_of(EXAMPLES / "tiny.toml").workload
    text = path.read_text(encoding="utf-8").replace("duration_s = 60\n", "")
    path.write_text(text, encoding="utf-8")
    assert "trace.hazards are drawn without an end" in refusal(path).message


def test_victims_of_a_zone(spoiled: Spoiled, tmp_path: Path) -> None:
    """Tests that the oldest, the newest or random ones of a zone go, random ones by the seed, of the type it has."""
    counts = {"metadata": {"gap_seconds": 60}, "data": [6, 4, 1]}
    (tmp_path / "zone.json").write_text(json.dumps(counts), encoding="utf-8")

    def gone(victims: str, seed: int) -> list[tuple[str, ...]]:
        old, new = "instances = 2", f"zones = ['zone.json']\ngpu_types = ['l4']\nvictims = '{victims}'"
        trace = scenario_of(spoiled(f"[trace]\n{old}", f"{L4}[trace]\n{new}"), seed=seed).trace
        assert ["l4"] == [event.gpu_type for event in trace.events if event.kind == "add"]
        return [event.instances for event in trace.events if event.kind == "notice"]

    assert [("i0", "i1"), ("i2", "i3", "i4")] == gone("oldest", 0)
    assert [("i4", "i5"), ("i1", "i2", "i3")] == gone("newest", 0)
    assert gone("random", 3) == gone("random", 3)
    assert 1 < len({str(gone("random", seed)) for seed in range(5)})


@pytest.mark.parametrize(
    ("curve", "means"),
    [
        ("points = [[0, 2.0], [30, 10.0], [30, 0.0]]", (6.0, 0.0)),
        ("steps_rps = [8, 4]\nstep_s = 30", (8.0, 4.0)),
        ("file = 'rates.csv'\nstep_s = 30", (3.0, 9.0)),
    ],
)
def test_rates_move(spoiled: Spoiled, tmp_path: Path, curve: str, means: tuple[float, float]) -> None:
    """Tests that arrivals follow a ramp, a step and a file of rates, and that rate_rps scales the whole curve."""
    (tmp_path / "rates.csv").write_text("3,9\n", encoding="utf-8")
    path = spoiled("rate_rps = 0.5\ncv = 1.0", f"cv = 0.0\n[workload.curve]\n{curve}")

    def rates() -> list[float]:
        arrivals = scenario_of(path).workload.arrivals
        return [sum(begin <= one.at_s < begin + 30 for one in arrivals) / 30 for begin in (0, 30)]

    assert pytest.approx(means, abs=0.05) == rates()
    text = path.read_text(encoding="utf-8").replace("cv = 0.0", "cv = 0.0\nrate_rps = 12")
    path.write_text(text, encoding="utf-8")
    factor = 12 / (sum(means) / 2)
    assert pytest.approx([factor * mean for mean in means], abs=0.05) == rates()


def test_a_swing_of_any_period(spoiled: Spoiled) -> None:
    """Tests that a rate swings through its periods with the peak where it is said to be, to the very end."""
    path = spoiled("rate_rps = 0.5\ncv = 1.0", "rate_rps = 50\ncv = 0.0\nswing = 0.9\nperiod_s = 1.5\npeak_s = 0")
    late = [one.at_s % 1.5 for one in scenario_of(path).workload.arrivals if one.at_s >= 45]
    near = sum(at_s < 0.375 or at_s >= 1.125 for at_s in late)
    assert near > 3 * (len(late) - near)


def test_lengths_of_a_file(spoiled: Spoiled, tmp_path: Path) -> None:
    """Tests that drawn arrivals take pairs of an Azure file as they stand together, and a share of a file is kept."""
    rows = [
        f"2023-11-16 18:{15 + second // 60}:{second % 60:02}.0000000,{100 + second},{200 - second}"
        for second in range(120)
    ]
    (tmp_path / "azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows), encoding="utf-8")
    path = spoiled("prompt_tokens = 512\noutput_tokens = 64", "kind = 'file'\nfile = 'azure.csv'")
    arrivals = scenario_of(path).workload.arrivals
    assert {300} == {one.prompt_tokens + one.output_tokens for one in arrivals}
    assert 1 < len({one.prompt_tokens for one in arrivals})
    part = spoiled("rate_rps = 0.5\ncv = 1.0", "file = 'azure.csv'\nshare = 0.5")
    workload = scenario_of(part).workload
    assert 40 < len(workload.arrivals) < 80
    assert workload.arrivals != scenario_of(part, seed=2).workload.arrivals


def test_a_roofline_of_other_efficiencies(spoiled: Spoiled) -> None:
    """Tests that what a person knows of a GPU's efficiency changes its times, and the profile says so."""
    a10g = 'profile = "a10g"\ndtype = "float16"\nroofline = {{{}}}'
    worse = scenario_of(spoiled('profile = "paper"', a10g.format("memory_efficiency = 0.4"))).spec.profile
    usual = scenario_of(spoiled('profile = "paper"', a10g.format("memory_efficiency = 0.8"))).spec.profile
    one = [next(p.layer_ms for p in each.latencies if p.tokens == p.tensor == 1) for each in (worse, usual)]
    # All but the launch of a layer's kernels takes twice as long.
    assert pytest.approx(2 * (one[1] - 0.02)) == one[0] - 0.02
    assert "0.4 of the memory bandwidth" in worse.source
    assert usual == scenario_of(spoiled('profile = "paper"', a10g.format("decode_rows = 32"))).spec.profile


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
    static = {name: scenario.of_policy(f"{name}+static").spec.limits for name in ("paper", "reroute")}
    assert {"static"} == {limits.batching for limits in static.values()}
    assert (1, 2) == (static["paper"].static_batches, static["reroute"].static_batches)
    spec = scenario.spec.model_copy(update={"limits": Limits(max_model_len=64, static_batches=0)})
    assert 0 == replace(scenario, spec=spec).of_policy("paper+static").spec.limits.static_batches
