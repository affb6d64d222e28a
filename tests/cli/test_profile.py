"""`spotserve profile`: what is measured, what is derived, what is kept, and how a refusal reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import spotserve
from spotserve.cli.main import run_verb
from spotserve.core.batching import SequenceKey
from spotserve.core.ids import RequestId
from spotserve.core.spec import LatencyPoint, Profile
from spotserve.errors import ModelError, SpotServeError
from spotserve.runtime import profiles
from spotserve.runtime.measure import EXCHANGE_S, batch_of, latency_points, stage_overhead_ms
from spotserve.runtime.model_table import describe_model
from tests.runtime.models import write_llama

BUILTIN = Path(spotserve.__file__).parent / "builtin"
PROFILE = Profile(
    name="paper",
    source="a test",
    device="cpu",
    latencies=(LatencyPoint(tokens=1, tensor=1, layer_ms=1.5), LatencyPoint(tokens=8, tensor=1, layer_ms=2)),
    link_bytes_per_s=2**30,
    storage_bytes_per_s=2**29,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, str | None]]:
    """Every measurement that was asked for; none is made."""
    asked: list[tuple[str, str, str | None]] = []

    def paper_measurement(folder: Path, *, device: str, dtype: str | None, linear: str) -> Profile:
        asked.append((folder.name, device, dtype))
        return PROFILE

    monkeypatch.setattr(profiles, "measured_profile", paper_measurement)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SPOTSERVE_PROFILE_CACHE", raising=False)
    return asked


def test_a_model_is_measured_once(measurements: list[tuple[str, str, str | None]], capsys: Capture) -> None:
    """Tests that a kept profile is used again, another dtype is another profile, and --again measures anew."""
    for flags in ([], [], ["--dtype", "bfloat16"], ["--again"]):
        assert 0 == run_verb(["profile", str(BUILTIN), "--json", *flags])
    assert [("builtin", "cpu", None), ("builtin", "cpu", "bfloat16"), ("builtin", "cpu", None)] == measurements
    assert [PROFILE] * 4 == [Profile.model_validate_json(line) for line in capsys.readouterr().out.splitlines()]


def test_a_broken_entry_is_measured_again(
    measurements: list[tuple[str, str, str | None]], tmp_path: Path, capsys: Capture
) -> None:
    """Tests that a torn or older file in the cache is replaced, never believed."""
    assert 0 == run_verb(["profile", str(BUILTIN)])
    (kept,) = (tmp_path / "state/spotserve/8000/profiles").glob("*.json")
    kept.write_text("{", encoding="utf-8")
    assert 0 == run_verb(["profile", str(BUILTIN)])
    assert 2 == len(measurements)
    assert PROFILE == Profile.model_validate_json(kept.read_text(encoding="utf-8"))


def test_the_state_dir_is_the_daemons(
    measurements: list[tuple[str, str, str | None]], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that --state-dir and SPOTSERVE_PROFILE_CACHE say where the result is kept, privately."""
    assert 0 == run_verb(["profile", str(BUILTIN), "--state-dir", str(tmp_path / "mine")])
    monkeypatch.setenv("SPOTSERVE_PROFILE_CACHE", str(tmp_path / "cache"))
    assert 0 == run_verb(["profile", str(BUILTIN)])
    assert [1, 1] == [len(list((tmp_path / place).glob("*.json"))) for place in ("mine/profiles", "cache")]
    assert 0o700 == (tmp_path / "mine").stat().st_mode & 0o777


def test_out_writes_the_profile(
    measurements: list[tuple[str, str, str | None]], tmp_path: Path, capsys: Capture
) -> None:
    """Tests that --out writes the JSON and leaves stdout to --json."""
    out = tmp_path / "profile.json"
    assert 0 == run_verb(["profile", str(BUILTIN), "--out", str(out)])
    assert "" == capsys.readouterr().out
    assert PROFILE == Profile.model_validate_json(out.read_text(encoding="utf-8"))


def test_table(measurements: list[tuple[str, str, str | None]], capsys: Capture) -> None:
    """Tests that the table shows a row per token count and the rates."""
    assert 0 == run_verb(["profile", str(BUILTIN)])
    out = capsys.readouterr().out
    assert "TOKENS  TENSOR 1 (ms)\n1       1.500\n8       2.000\n" in out
    assert "link     1024 MiB/s" in out


def test_refusals_keep_their_words() -> None:
    """Tests that a refused model is a ModelError with its hint, and anything else a failure with its last words."""
    refused = profiles.process_error(
        "spotserve.runtime.measure", Path("m"), 2, "Warning: noise\nm has no config.json\nhint: give a folder\n"
    )
    assert (ModelError, "m has no config.json", "give a folder") == (type(refused), refused.message, refused.hint)
    crashed = profiles.process_error("spotserve.runtime.measure", Path("m"), -9, "")
    assert (SpotServeError, "spotserve.runtime.measure ended with -9 on m: no word") == (type(crashed), crashed.message)


def test_derived_degrees(tmp_path: Path) -> None:
    """Tests that a tensor degree takes its share of the work plus two exchanges, up to the model's largest."""
    model = describe_model(write_llama(tmp_path))
    points = {
        (point.tokens, point.tensor): point.layer_ms
        for point in latency_points(model, {1: 8.0, 32: 16.0}, link_bytes_per_s=1e9, round_trip_s=0.002)
    }
    assert {1, 2, 4, 8} == {degree for _, degree in points}
    assert 8.0 == points[1, 1]
    exchange_s = EXCHANGE_S + 0.001 + 32 * model.hidden_size * 4 * 3 / 1e9
    assert points[32, 4] == pytest.approx(16.0 / 4 + 2000 * exchange_s)


def test_measured_rows_differ(tmp_path: Path) -> None:
    """Tests that no two rows of a measured batch begin alike: equal rows would choose the same experts."""
    model = describe_model(write_llama(tmp_path))
    decode = batch_of(model, [SequenceKey(RequestId(str(index)), 0, 0) for index in range(8)], start=64, count=1)
    assert 8 == len({sequence.token_ids for sequence in decode.sequences})
    prefill = batch_of(model, [SequenceKey(RequestId("0"), 0, 0)], start=0, count=128)
    assert 128 == len(set(prefill.sequences[0].token_ids))


def test_overhead_is_the_intercept() -> None:
    """Tests that what a forward costs beside its layers is found from one layer and three, and is never negative."""
    assert 1.0 == stage_overhead_ms(3.0, 7.0, 3)
    assert 0.0 == stage_overhead_ms(3.0, 10.0, 3)


@pytest.mark.e2e
def test_measures_a_real_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    """Tests that a measurement of real layers gives a profile with every row count and positive rates."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert 0 == run_verb(["profile", str(BUILTIN), "--json"])
    measured = Profile.model_validate(json.loads(capsys.readouterr().out))
    assert {1, 8, 32, 128} == {point.tokens for point in measured.latencies}
    assert measured.source == "measured by spotserve profile"


@pytest.mark.e2e
def test_refuses_a_real_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    """Tests that a folder whose model cannot be served exits 2 with one line."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "model"
    folder.mkdir()
    assert 2 == run_verb(["profile", str(folder)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(folder) in line
