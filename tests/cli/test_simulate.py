"""`spotserve simulate`: one table, one JSON, pictures that stand alone; nothing half-written or silently taken."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spotserve.cli import simulate_command
from spotserve.cli.drawing.availability import LEFT, RIGHT, spans_of
from spotserve.cli.drawing.axes import Scale, scale_for, time_words
from spotserve.cli.drawing.simulation import PICTURES, simulation_files
from spotserve.cli.main import run_verb
from spotserve.cli.simulation_progress import simulation_progress
from spotserve.cli.simulation_text import MOST_MIGRATIONS, simulation_text, span_text
from spotserve.core.canonical import canonical_json
from spotserve.errors import SpecError
from spotserve.sim.comparison import compared
from spotserve.sim.simulation import simulate
from spotserve.solvers.planner import make_plan
from tests.sim.scenes import event, four_instances, small_scenario

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLES = CHECKOUT / "examples" / "scenarios"
TINY = EXAMPLES / "tiny.toml"
SVG = "{http://www.w3.org/2000/svg}"
FILES = {"result.json", "report.html", "trace.json", "workload.json", *(f"{name}.svg" for name in PICTURES)}

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a verb; gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_verb([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    """Three policies, two seeds, a notice and a loss: a comparison with something of everything."""
    trace = four_instances(event(10, "notice", "i1", grace_s=5.0), event(32, "kill", "i0"), end_s=45.0)
    scenarios = [small_scenario(trace, seed=seed) for seed in (0, 1)]
    policies = ("live", "reparallelize", "ondemand")
    runs = [simulate(scenario, policy, make_plan) for scenario in scenarios for policy in policies]
    told: dict[str, Any] = compared(scenarios[0], runs).model_dump(mode="json")
    return told


def copied(comparison: dict[str, Any]) -> dict[str, Any]:
    """The same JSON, free to be changed."""
    answer: dict[str, Any] = json.loads(json.dumps(comparison))
    return answer


# The verb


def test_table_and_json_say_the_same(said: Said) -> None:
    """Tests that stdout has the table, rendered from what --json prints, with the seed and every scaling; no talk."""
    code, table, talk = said("simulate", TINY)
    assert (0, "") == (code, talk)
    code, text, _ = said("simulate", TINY, "--json")
    assert 0 == code
    assert table == simulation_text(json.loads(text))
    assert "tiny: 1 min, seed 1" in table
    assert "Gamma gaps of CV 1, seed 1" in table
    assert re.search(r"^live +\d", table, re.MULTILINE)


def test_files_are_written_and_are_what_was_printed(said: Said, tmp_path: Path) -> None:
    """Tests that --out writes the JSON, the page and its pictures, twice the same bytes, and nothing else."""
    first, second = tmp_path / "new" / "first", tmp_path / "second"
    code, text, _ = said("simulate", TINY, "--out", first, "--format", "json")
    assert 0 == code
    assert {path.name for path in first.iterdir()} == FILES
    assert text == (first / "result.json").read_text(encoding="utf-8")
    assert 0 == said("simulate", TINY, "--out", second)[0]
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_what_was_played_can_be_played_again(said: Said, tmp_path: Path) -> None:
    """Tests that the trace and the requests that --out writes are files of ours, and give the same run again."""
    text = TINY.read_text(encoding="utf-8").replace("instances = 2", "hazards = [{zone = 'a', instances = 3}]")
    text = text.replace("[trace]", "[trace]\nshared_shocks_per_day = 5000\ngrace_s = 5").replace("cv = 1.0", "cv = 3.0")
    drawn, again = tmp_path / "drawn.toml", tmp_path / "again.toml"
    drawn.write_text(text, encoding="utf-8")
    code, first, _ = said("simulate", drawn, "--out", tmp_path, "--json")
    assert 0 == code
    kept, _, _ = TINY.read_text(encoding="utf-8").partition("[trace]")
    files = "[trace]\nfile = 'trace.json'\n[workload]\nfile = 'workload.json'\n[slo]\nlatency_s = 10\n"
    again.write_text(kept + files, encoding="utf-8")
    code, second, _ = said("simulate", again, "--json")
    assert 0 == code
    assert json.loads(first)["runs"] == json.loads(second)["runs"]
    assert json.loads(first)["scenario"]["trace_notes"] == json.loads(second)["scenario"]["trace_notes"]


def test_gpus_of_several_types(said: Said, tmp_path: Path) -> None:
    """Tests that the table names each type, that all GPUs are drawn, and that `paper` is refused, as it knows one."""
    table = "[hardware.types.l4]\ngpus_per_instance = 2\ngpu_memory_bytes = 22_000_000_000"
    table += "\nspot_usd_per_hour = 1.0\nondemand_usd_per_hour = 2.3\n[trace]\ngpu_types = ['own', 'l4']"
    path = tmp_path / "mixed.toml"
    path.write_text(TINY.read_text(encoding="utf-8").replace("[trace]", table), encoding="utf-8")
    code, text, _ = said("simulate", path, "--out", tmp_path / "out")
    assert 0 == code
    assert re.search(r"^ +l4: 2 GPUs of 22 GB, 1 USD/h spot, 2.3 on demand$", text, re.MULTILINE)
    run = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["runs"][0]
    assert 6 == max(moment["gpus_there"] for moment in run["timeline"])
    code, _, error = said("simulate", path, "--policy", "live", "--policy", "paper+static")
    assert 2 == code
    assert "--policy paper+static plans for one GPU type only, and trace 2 that stay has several" in error


def test_seeds_are_drawn_anew(said: Said) -> None:
    """Tests that --seeds 2 --seed 5 runs seeds 5 and 6, with other arrivals each, and says so."""
    code, text, _ = said("simulate", TINY, "--seeds", 2, "--seed", 5, "--json")
    assert 0 == code
    answer = json.loads(text)
    assert [5, 6] == [run["seed"] for run in answer["runs"]]
    assert 2 == len({run["journal_digest"] for run in answer["runs"]})
    assert [2] == [line["seeds"] for line in answer["policies"]]
    assert "seeds 5, 6" in simulation_text(answer)


def test_policies_are_chosen_in_order(said: Said) -> None:
    """Tests that --policy replaces the scenario's, the first one is what is compared with, and twice is once."""
    code, text, _ = said("simulate", TINY, "--policy", "reroute", "--policy", "live", "--policy", "reroute", "--json")
    assert 0 == code
    lines = json.loads(text)["policies"]
    assert ["reroute", "live"] == [line["policy"] for line in lines]
    assert 1.0 == lines[0]["p99_ratio"]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ([], "neither SCENARIO nor --swarm is given", "spotserve simulate"),
        ([TINY, "--policy", "life"], "--policy life is not one of live, ", "did you mean live?"),
        ([TINY, "--policy", "ondemand"], "needs a number of instances", "ondemand_instances"),
        ([TINY, "--seeds", "0"], "--seeds 0 is not between 1 and", None),
        ([TINY, "--seeds", "many"], "--seeds many is not a whole number", None),
        ([TINY, "--seed", "-1"], "--seed -1 is not between 0", None),
        ([TINY, "--format", "yaml"], "--format yaml is not one of table, json", None),
        ([TINY, "--swarm", "5"], "--swarm and SCENARIO exclude each other", "--swarm"),
        (["--swarm", "5", "--policy", "live"], "--swarm and --policy exclude each other", "--swarm"),
        (["--swarm", "5", "--seeds", "2"], "--swarm and --seeds exclude each other", "--swarm"),
        (["--swarm", "0"], "--swarm 0 is not between 1", None),
        ([EXAMPLES / "none.toml"], "cannot be read", None),
        ([TINY, "--out", TINY], "cannot be made a folder", None),
        ([TINY, "--out", TINY / "below"], "cannot be made a folder", None),
    ],
)
def test_what_is_wrong_is_told_in_one_line(said: Said, arguments: list[object], error: str, hint: str | None) -> None:
    """Tests that bad usage and bad input end with exit 2, one line of error, and a hint where there is one."""
    code, out, err = said("simulate", *arguments)
    lines = err.splitlines()
    assert (2, "") == (code, out)
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert hint is None or (lines[1].startswith("hint: ") and hint in lines[1])
    assert len(lines) <= 2


def test_an_unknown_policy_of_the_scenario(said: Said, tmp_path: Path) -> None:
    """Tests that the scenario's own policies are checked like those of the command line, and name the file."""
    path = tmp_path / "scenario.toml"
    path.write_text(TINY.read_text().replace('["live"]', '["live", "rerout"]'), encoding="utf-8")
    code, _, err = said("simulate", path)
    assert 2 == code
    assert f"SCENARIO {path} at policies: rerout is not one of" in err
    assert "did you mean reroute?" in err


def test_what_is_refused_is_refused_at_once() -> None:
    """Tests that a bad file and an unknown policy are refused before OR-Tools is imported."""
    script = (
        "import sys; from spotserve.cli.main import run_verb;"
        f"codes = [run_verb(['simulate', {str(EXAMPLES / 'none.toml')!r}]),"
        f" run_verb(['simulate', {str(TINY)!r}, '--policy', 'x'])];"
        "assert codes == [2, 2], codes;"
        "assert not [name for name in sys.modules if name.startswith('ortools')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=CHECKOUT)


def test_open_requests_are_no_failure_but_told(
    said: Said, comparison: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that a policy that leaves requests open is a result, exit 0, with a line of talk and a column."""
    open_ones = copied(comparison)
    open_ones["policies"][1]["open"] = 7
    monkeypatch.setattr(simulate_command, "simulated", lambda scenarios: open_ones)
    code, out, err = said("simulate", TINY)
    assert 0 == code
    assert "reparallelize: up to 7 requests were still open at the end\n" == err
    assert "OPEN requests count" in out


def test_a_model_that_never_fits_is_told(said: Said, tmp_path: Path) -> None:
    """Tests that whoever gave too little memory is told that, and not only that requests stayed open."""
    path = tmp_path / "scenario.toml"
    path.write_text(TINY.read_text().replace("14_000_000_000", "1_000_000"), encoding="utf-8")
    code, out, err = said("simulate", path)
    assert 0 == code
    assert "live: never served: at no moment did the model fit what was there\n" == err
    assert "OPEN requests count" in out


def test_lost_requests_are_a_failure(
    said: Said, comparison: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tests that a lost request ends with exit 1 and names the policy, after the result was printed and written."""
    lost = copied(comparison)
    lost["policies"][0]["lost"] = 1
    monkeypatch.setattr(simulate_command, "simulated", lambda scenarios: lost)
    code, out, err = said("simulate", TINY, "--out", tmp_path)
    assert 1 == code
    assert "accepted requests were lost under live" in err
    assert "POLICY" in out
    assert FILES == {path.name for path in tmp_path.iterdir()}


# Interruptions


def test_ctrl_c_ends_a_simulation_and_leaves_nothing(tmp_path: Path) -> None:
    """Tests that SIGINT in the middle ends with 130 at once, with no file and nothing on stdout."""
    long_one = tmp_path / "long.toml"
    text = (EXAMPLES / "tiny.toml").read_text().replace("duration_s = 60", "duration_s = 400_000")
    long_one.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    script = "import sys; from spotserve.cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "simulate", str(long_one), "--out", str(out)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not out.is_dir():  # It is made once the file has been read, just before the simulation.
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (130, b"", b"") == (process.returncode, stdout, stderr)
    assert [] == list(out.iterdir())


def test_files_are_replaced_together(tmp_path: Path) -> None:
    """Tests that a file that cannot be written leaves the older ones as they were, and no scrap."""
    simulate_command.write_files(tmp_path, {"a": "old", "b": "old"})
    (tmp_path / ".b.part").mkdir()
    with pytest.raises(SpecError, match="cannot be written"):
        simulate_command.write_files(tmp_path, {"a": "new", "b": "new"})
    assert "old" == (tmp_path / "a").read_text()
    assert not (tmp_path / ".a.part").exists()


# Progress


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a bar is drawn on a terminal, and nothing at all elsewhere or without colour."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, file, plain = Terminal(), io.StringIO(), Terminal()
    for stderr in (terminal, file):
        with simulation_progress(stderr) as show:
            show("live", 30.0, 60.0)
    monkeypatch.setenv("NO_COLOR", "1")
    with simulation_progress(plain) as show:
        show("live", 30.0, 60.0)
    assert "30 of 60 s" in terminal.getvalue()
    assert ("", "") == (file.getvalue(), plain.getvalue())


# The text


def test_few_migrations_are_listed_and_many_counted(comparison: dict[str, Any]) -> None:
    """Tests that each migration of the first seed has a line while they are few, and a number where they are many."""
    text = simulation_text(comparison)
    run = next(run for run in comparison["runs"] if run["policy"] == "live" and run["seed"] == 0)
    block = text.split("Migrations of live, seed 0\n")[1].split("\n\n")[0].splitlines()
    assert len(run["migrations"]) == len(block) - 1
    assert "Migrations of ondemand" not in text
    assert ", seed 1\n" not in text.split("POLICY")[1]
    many = copied(comparison)
    for one in many["runs"]:
        one["migrations"] = (one["migrations"] * 20)[: MOST_MIGRATIONS + 1]
    assert f"  {MOST_MIGRATIONS + 1}, --format json has all of them" in simulation_text(many)


def test_a_scenario_cannot_steer_a_terminal(comparison: dict[str, Any]) -> None:
    """Tests that control characters of names and notes are replaced in the text and the page."""
    hostile = copied(comparison)
    hostile["scenario"]["name"] = "a\x1b[31m<script>"
    hostile["scenario"]["trace_notes"] = ["b\x1b]0;c\x07</pre><script>"]
    text, page = simulation_text(hostile), simulation_files(hostile)["report.html"]
    assert "\x1b" not in text + page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (60, "1 min"), (5400, "1 h 30 min"), (0.2, "0 s"), (3661, "1 h 1 min 1 s")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    """Tests that a duration has hours, minutes and seconds where it has them."""
    assert words == span_text(seconds)


# The pictures


class Outside(HTMLParser):
    """Finds whatever a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """A tag that loads, or an attribute that does."""
        if tag in ("script", "link", "img", "iframe", "object", "embed", "use", "image"):
            self.found.append(tag)
        self.found += [name for name, _ in attributes if name in ("src", "href", "srcset") or name.startswith("on")]


def test_the_page_stands_alone(comparison: dict[str, Any]) -> None:
    """Tests that the page has every picture inside, and loads and runs nothing."""
    page = simulation_files(comparison)["report.html"]
    outside = Outside()
    outside.feed(page)
    assert [] == outside.found
    assert len(PICTURES) == page.count("<svg ")
    assert "seeds 0, 1" in page


def tree_of(comparison: dict[str, Any], name: str) -> ElementTree.Element:
    """The elements of a picture."""
    return ElementTree.fromstring(simulation_files(comparison)[f"{name}.svg"])  # noqa: S314


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_inside_their_frame(comparison: dict[str, Any], name: str) -> None:
    """Tests that each picture is well-formed, names every policy, and no text begins or ends outside."""
    tree = tree_of(comparison, name)
    width = float(tree.get("width", ""))
    texts = list(tree.iter(f"{SVG}text"))
    shown = [one.text or "" for one in texts]
    for policy in ("live", "reparallelize", "ondemand"):
        assert policy in shown
    for one in texts:
        long = 0.6 * float(one.get("font-size", "")) * len(one.text or "")
        begins = float(one.get("x", "")) - {"middle": long / 2, "end": long}.get(one.get("text-anchor", ""), 0.0)
        assert begins >= -20
        assert begins + long <= width - 20


def test_the_service_is_drawn_to_scale(comparison: dict[str, Any]) -> None:
    """Tests that the bands of SERVICE states are as wide as the states lasted, each at least a visible line."""
    tree = tree_of(comparison, "availability")
    shown = [run for run in comparison["runs"] if run["seed"] == 0]
    end_s = max(45.0, *(moment["at_s"] for run in shown for moment in run["timeline"]))
    expected: dict[str, float] = defaultdict(float)
    for run in shown:
        spans = spans_of(run, "service", end_s=end_s)
        assert pytest.approx(end_s) == sum(end - begin for begin, end, _ in spans)
        for begin, end, state in spans:
            expected[state] += max(1.2, (end - begin) / end_s * (RIGHT - LEFT))
    drawn: dict[str, float] = defaultdict(float)
    for box in tree.iter(f"{SVG}rect"):
        if box.get("data-state"):
            drawn[box.get("data-state", "")] += float(box.get("width", ""))
    assert {"serving", "draining", "migrating"} <= set(drawn)
    assert pytest.approx(dict(expected), abs=0.1) == dict(drawn)


def test_every_migration_has_a_mark(comparison: dict[str, Any]) -> None:
    """Tests that the stalls picture has a mark for each migration of the first seed, hollow if it did not complete."""
    tree = tree_of(comparison, "stalls")
    marks = [one for one in tree.iter(f"{SVG}g") if one.get("class") == "mark"]
    moves = [one for run in comparison["runs"] if run["seed"] == 0 for one in run["migrations"]]
    assert len(moves) == len(marks)
    hollow = [one for one in marks if any(part.get("fill") == "#ffffff" for part in one)]
    assert sum(one["outcome"] != "completed" for one in moves) == len(hollow)


def test_pictures_of_nothing(comparison: dict[str, Any]) -> None:
    """Tests that a comparison without runs, and one without requests or migrations, can still be drawn."""
    empty = copied(comparison)
    empty["runs"], empty["policies"] = [], []
    assert "There were no requests." in simulation_files(empty)["latency-cdf.svg"]
    quiet = copied(comparison)
    for run in quiet["runs"]:
        run["latency_quantiles_s"], run["migrations"] = [], []
    for line in quiet["policies"]:
        line["usd_per_million_tokens"] = line["cost_ratio"] = None
    files = simulation_files(quiet)
    assert "There were no migrations." in files["stalls.svg"]
    assert "no tokens" in files["cost.svg"]
    assert "There were no requests." in files["latency-cdf.svg"]


def test_scales_put_values_where_they_belong() -> None:
    """Tests that a wide range is logarithmic, a narrow one starts at 0, and ticks are round values inside."""
    wide, narrow = scale_for([0.01, 500.0], start=0, stop=100), scale_for([4.0, 9.0], start=0, stop=100)
    assert (True, False) == (wide.is_log, narrow.is_log)
    assert 0.0 == narrow.low
    assert [0.01, 0.1, 1.0, 10.0, 100.0] == pytest.approx(wide.ticks(6))
    assert [0.0, 2.0, 4.0, 6.0, 8.0] == pytest.approx(narrow.ticks(6))
    assert 0 < wide.at(0.01) < wide.at(1.0) < wide.at(500.0) < 100
    assert 100.0 == narrow.at(1e9)
    assert 50.0 == Scale(0.0, 10.0, 100.0, 0.0).at(5.0)
    assert ([(0.0, "0"), (3600.0, "1"), (7200.0, "2")], "time in hours") == (
        time_words(Scale(0.0, 10_900.0, 0, 100), most=4)[0][:3],
        time_words(Scale(0.0, 10_900.0, 0, 100), most=4)[1],
    )


# The examples


def test_example_data_is_what_the_script_writes() -> None:
    """Tests that traces and requests under examples/scenarios are those of examples/write_scenario_data.py."""
    path = CHECKOUT / "examples" / "write_scenario_data.py"
    specification = importlib.util.spec_from_file_location("write_scenario_data", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert set(module.FILES) == {one.name for one in EXAMPLES.glob("*.json")}
    for name, text in module.FILES.items():
        assert text() == (EXAMPLES / name).read_text(encoding="utf-8"), name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_examples_run(said: Said, tmp_path: Path, name: str) -> None:
    """Tests that every example runs under all its policies, and none of them loses a request."""
    shutil.copytree(EXAMPLES, tmp_path / "scenarios")
    code, text, _ = said("simulate", tmp_path / "scenarios" / name, "--json")
    assert 0 == code
    answer = json.loads(text)
    assert canonical_json(answer) == text
    assert 0 == sum(line["lost"] for line in answer["policies"])
