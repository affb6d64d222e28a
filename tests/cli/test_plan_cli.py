"""The plan-file verbs: plan, show, verify, diff - output, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spotserve.cli.main import run_verb

PLANS = Path(__file__).resolve().parents[2] / "plans"
NOTICE = PLANS / "notice"
EXPECTED = NOTICE / "expected-plan.json"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a verb; gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_verb([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def planned(said: Any, *arguments: object) -> dict[str, Any]:
    """The plan that a command line makes."""
    _, out, _ = said("plan", *arguments, "--json")
    plan: dict[str, Any] = json.loads(out)
    return plan


def test_plan_writes_a_file_and_changes_nothing(said: Any, tmp_path: Path) -> None:
    """Tests that --out gets the plan, stdout the table, stderr nothing."""
    out = tmp_path / "plan.json"
    code, text, err = said("plan", NOTICE, "--out", out)
    assert (0, "") == (code, err)
    assert out.read_bytes() == EXPECTED.read_bytes()
    assert text.startswith("epoch 3 -> 4  notice i2, 30.00 s left\n")


def test_plan_from_spec_and_snapshot(said: Any) -> None:
    """Tests that --spec and --snapshot with --lose give the plan of the case with the same event."""
    code, out, _ = said(
        "plan", "--spec", NOTICE / "spec.toml", "--snapshot", NOTICE / "snapshot.json", "--lose", "i2", "--json"
    )
    assert (0, EXPECTED.read_text()) == (code, out)


def test_json_spec_is_read_as_well(said: Any, tmp_path: Path) -> None:
    """Tests that a spec as a running daemon prints it (JSON) gives the same plan as the TOML file."""
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(json.loads(EXPECTED.read_text())["spec"]))
    code, out, _ = said("plan", "--spec", spec, "--snapshot", NOTICE / "snapshot.json", "--lose", "i2", "--json")
    assert (0, EXPECTED.read_text()) == (code, out)


def test_exit_code_tells_changes(said: Any) -> None:
    """Tests that --exit-code makes a plan with steps exit 3 and one without exit 0."""
    assert said("plan", NOTICE, "--exit-code")[0] == 3
    assert said("plan", NOTICE, "--load", "0", "--exit-code")[0] == 0


def test_cannot_be_met(said: Any, tmp_path: Path) -> None:
    """Tests that a notice that leaves too little exits 4 and still writes the plan."""
    out = tmp_path / "plan.json"
    code, _, err = said("plan", NOTICE, "--lose", "i0,i1,i2", "--out", out)
    assert (4, "the notice cannot be met: what is left cannot serve\n") == (code, err)
    assert json.loads(out.read_text())["complete"] is False


def test_lose_with_and_without_grace(said: Any) -> None:
    """Tests that --lose is a notice of 30 s, --grace shortens it, and --grace 0 is a loss."""
    triggers = [
        planned(said, NOTICE, "--lose", "i1,i2", *grace)["trigger"] for grace in ((), ("--grace", "5"), ("--grace", 0))
    ]
    assert [("notice", 30.0), ("notice", 5.0), ("lost", None)] == [(t["kind"], t["remaining_s"]) for t in triggers]
    assert all(t["instances"] == ["i1", "i2"] for t in triggers)


def test_lose_leaves_the_world_as_it_is(said: Any) -> None:
    """Tests that a dry run plans on the snapshot that it was given, so that apply can still be current."""
    assert planned(said, NOTICE, "--lose", "i1")["snapshot_digest"] == planned(said, NOTICE)["snapshot_digest"]


def test_join_adds_new_ids(said: Any) -> None:
    """Tests that --join N adds N instances under ids that were never used."""
    plan = planned(said, NOTICE, "--join", "2")
    assert ["i4", "i5"] == plan["trigger"]["instances"]
    assert {"i4/0", "i5/0"} == {gpu for stage in plan["target"]["replicas"][-1]["stages"] for gpu in stage["gpus"]}


def test_load_counts(said: Any) -> None:
    """Tests that --load is the load the plan is made for."""
    plan = planned(said, NOTICE, "--load", "2.5")
    assert ("load", 2.5) == (plan["trigger"]["kind"], plan["snapshot"]["load_rps"])


def test_solver_and_policy(said: Any) -> None:
    """Tests that --solver and --policy override the spec's."""
    plan = planned(said, NOTICE, "--solver", "configure=enumerate", "--policy", "reroute")
    assert ("reroute", "reroute") == (plan["policy"], plan["spec"]["policy"])
    plan = planned(said, NOTICE, "--solver", "configure=enumerate", "--solver", "place=reuse")
    assert ("enumerate", "reuse") == (plan["solver"]["configure"]["name"], plan["solver"]["place"]["name"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "neither a CASE nor both --spec and --snapshot are given"),
        ([NOTICE, "--spec", NOTICE / "spec.toml"], "exclude each other"),
        ([PLANS / "nowhere"], "is not a folder"),
        ([PLANS], "cannot be read"),
        ([NOTICE, "--lose", "i2", "--grace", "nan"], "is not a number of seconds"),
        ([NOTICE, "--lose", "i2", "--grace", "-1"], "is not between"),
        ([NOTICE, "--grace", "5"], "has no meaning without --lose"),
        ([NOTICE, "--lose", ","], "names no instance"),
        ([NOTICE, "--join", "0"], "is not between 1 and 1024"),
        ([NOTICE, "--load", "nan"], "is not between 0"),
        ([NOTICE, "--policy", "alive"], "policy 'alive' is not known"),
        ([NOTICE, "--solver", "place=hungary"], "hungary is not"),
        ([NOTICE, "--solver", "place"], "is not kind=name"),
        ([NOTICE, "--format", "yaml"], "is not one of table, json"),
        ([NOTICE, "--out", "/nowhere/plan.json"], "cannot be written"),
    ],
)
def test_usage_errors(said: Any, arguments: list[object], told: str) -> None:
    """Tests that each wrong value exits 2 with one line that names it, and prints no data."""
    code, out, err = said("plan", *arguments)
    assert (2, "") == (code, out)
    assert told in err.splitlines()[0]


def test_unknown_instance(said: Any) -> None:
    """Tests that losing an instance that is not there exits 1 and names the living ones."""
    code, _, err = said("plan", NOTICE, "--lose", "i7")
    assert (1, "error: instance i7 is not there\nhint: living: i0 i1 i2 i3\n") == (code, err)


def test_malformed_inputs(said: Any, tmp_path: Path) -> None:
    """Tests that a spec or snapshot that is none exits 2 and says where."""
    bad = tmp_path / "bad.toml"
    bad.write_text("[model\n")
    assert said("plan", "--spec", bad, "--snapshot", NOTICE / "snapshot.json")[0] == 2
    bad.write_text("[model]\n")
    code, _, err = said("plan", "--spec", bad, "--snapshot", NOTICE / "snapshot.json")
    assert code == 2
    assert "is malformed at model.name" in err
    code, _, err = said("plan", "--spec", NOTICE / "spec.toml", "--snapshot", bad)
    assert code == 2
    assert "--snapshot" in err


def test_show(said: Any) -> None:
    """Tests that show prints the table view, and with --json the very file."""
    code, text, _ = said("show", EXPECTED)
    assert code == 0
    assert "\n\nRequests\n  3 requests: 3 move\n  of r3.2 -> r3.1: 3 move\n" in text
    assert (0, EXPECTED.read_text(), "") == said("show", EXPECTED, "--json")


def test_verify_ok(said: Any) -> None:
    """Tests that a good plan is ok."""
    assert (0, "ok\n", "") == said("verify", EXPECTED)
    code, out, _ = said("verify", EXPECTED, "--format", "json")
    assert (0, {"valid": True, "findings": []}) == (code, json.loads(out))


def test_verify_findings(said: Any, tmp_path: Path) -> None:
    """Tests that findings are lines of CODE step path: message, or JSON, and exit 5."""
    plan = json.loads(EXPECTED.read_text())
    plan["steps"] = [step for step in plan["steps"] if step["kind"] != "commit"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    code, out, err = said("verify", path)
    assert (5, "") == (code, err)
    assert "missing_step - steps: there is no commit" in out.splitlines()
    code, out, _ = said("verify", path, "--json")
    assert (5, False) == (code, json.loads(out)["valid"])
    assert {"code", "step", "path", "message"} == set(json.loads(out)["findings"][0])


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff", b"[" * 4096])
def test_garbage_is_refused(said: Any, tmp_path: Path, content: bytes) -> None:
    """Tests that verify, show and diff exit 5 for a file that is no plan."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert [5, 5, 5] == [said("verify", path)[0], said("show", path)[0], said("diff", EXPECTED, path)[0]]


def test_missing_file(said: Any, tmp_path: Path) -> None:
    """Tests that a file that is not there is a usage error."""
    assert [2, 2] == [said("verify", tmp_path / "x")[0], said("show", tmp_path / "x")[0]]


def test_diff(said: Any) -> None:
    """Tests that a plan does not differ from itself, and that other plans differ by what they decide."""
    assert (0, "no difference\n", "") == said("diff", EXPECTED, EXPECTED, "--exit-code")
    other = PLANS / "loss" / "expected-plan.json"
    code, text, _ = said("diff", EXPECTED, other)
    assert code == 0
    assert "- route.r3.2: r3.1\n" in text
    assert "+ route.r3.1: r3.2\n" in text
    code, out, _ = said("diff", EXPECTED, other, "--exit-code", "--json")
    assert (3, False) == (code, json.loads(out)["same"])
