"""The text views of plans: what they must name, that times add up, and that no file can break or forge them."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from spotserve.core.plan_text import certificate_text, plan_changes, plan_text
from spotserve.core.plan_text.changes import changes_text
from spotserve.core.plan_text.money import usd_text
from spotserve.core.plan_text.schedule import critical_path, port_spans
from spotserve.core.plan_text.table import count_text, runs_text, size_text
from spotserve.core.plan_text.transfers import links, ports

PLANS = Path(__file__).resolve().parents[2] / "plans"
CASES = sorted(folder.name for folder in PLANS.iterdir() if (folder / "expected-plan.json").is_file())
WIDTH = 132


def plan_json(case: str) -> dict[str, Any]:
    """The plan of a case, free to be changed."""
    plan: dict[str, Any] = json.loads((PLANS / case / "expected-plan.json").read_text())
    return plan


@pytest.mark.parametrize("case", CASES)
def test_critical_path_sums_up(case: str) -> None:
    """Tests that the lines of the critical path follow one another and end when the plan is estimated to be done."""
    plan = plan_json(case)
    lines = critical_path(plan)
    assert bool(lines) == bool(plan["steps"])
    for before, after in itertools.pairwise(lines):
        assert after.begin_s >= before.begin_s + before.takes_s - 1e-9
        waits = after.step is not None and after.step.get("not_before_s", 0.0) > 0
        assert waits or after.begin_s == pytest.approx(before.begin_s + before.takes_s, abs=1e-9)
    if lines:
        assert lines[-1].begin_s + lines[-1].takes_s == pytest.approx(plan["estimates"]["done_s"], abs=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_page_names_what_a_person_needs(case: str) -> None:
    """Tests that every section is there, every solver has its certificate in words, and no line is too wide."""
    plan = plan_json(case)
    text = plan_text(plan)
    wanted = ["Before: ", "After: ", "Instances", "Critical path", "Steps", "Decided"] if plan["steps"] else []
    assert [title for title in wanted if f"\n\n{title}" not in text] == []
    for kind, report in plan["solver"].items():
        words = certificate_text(plan, kind)
        assert f"{kind} by {report['name']}: {report['status']}" in text
        assert bool(words) == bool(report["certificate"])
        assert not words.startswith("certificate:"), "a kind of certificate that has no words yet"
        assert " ".join(words.split()) in " ".join(text.split())
    assert [line for line in text.split("\n") if len(line) > WIDTH] == []


def test_certificate_with_figures() -> None:
    """Tests that the certificate of a full in-port says bytes, rate and seconds, as one would work them out."""
    plan = plan_json("opt-6.7b-t4")
    report = {"status": "optimal", "objective": 12.4e9, "bound": 12.4e9, "gap": 0.0}
    plan["solver"]["migrate"] |= {**report, "certificate": {"kind": "in_port", "port": "i2", "bytes": 12_400_000_000}}
    expected = "i2 must receive 12.4 GB at 6.25 GB/s = 1.98 s: no choice of senders is faster"
    assert certificate_text(plan, "migrate") == expected
    proof = {"kind": "out_ports", "ports": "i1,i3", "bytes": 12_500_000_000}
    plan["solver"]["migrate"] |= {"objective": 6.25e9, "bound": 6.25e9, "certificate": proof}
    expected = "12.5 GB are only on i1, i3: 2 ports at 12.5 GB/s together need 1.00 s, no choice of senders is faster"
    assert certificate_text(plan, "migrate") == expected


def test_certificate_of_an_answer_is_no_bound() -> None:
    """Tests that an unproven placement does not claim that nothing is faster, and names the bound."""
    plan = plan_json("opt-6.7b-t4")
    report = {"status": "feasible", "objective": 12.5e9, "bound": 6.25e9, "gap": 0.5}
    plan["solver"]["place"] |= {**report, "certificate": {"kind": "in_port", "port": "i2", "bytes": 12_500_000_000}}
    expected = "i2 receives 12.5 GB at 6.25 GB/s = 2.00 s: that is this answer, nothing is faster than 1.00 s"
    assert certificate_text(plan, "place") == expected


def test_bound_of_a_placement_says_what_it_holds_for() -> None:
    """Tests that a placement which keeps tensor groups together first claims no more than that."""
    plan = plan_json("opt-6.7b-t4")
    report = {"status": "optimal", "objective": 12.5e9, "bound": 12.5e9, "statistics": {"group_parts": 2}}
    plan["solver"]["place"] |= {**report, "certificate": {"kind": "in_port", "port": "i2", "bytes": 12_500_000_000}}
    assert certificate_text(plan, "place").endswith(
        "no placement that splits tensor groups no more than this is faster"
    )
    plan["solver"]["place"]["statistics"] = None
    assert certificate_text(plan, "place").endswith(": no placement is faster")


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("latency_us", "least request latency"),
        ("execution_us", "least execution time"),
        ("throughput_urps", "most thro"),
    ],
)
def test_what_algorithm_1_measures_has_words(measure: str, words: str) -> None:
    """Tests that the paper's choice is told in words, whatever it went by."""
    plan = plan_json("notice")
    plan["solver"]["configure"]["certificate"] |= {"kind": "algorithm_1", "measure": measure}
    assert certificate_text(plan, "configure").startswith(f"by Algorithm 1 of the paper, {words}")


@pytest.mark.parametrize("certificate", [{"kind": "oracle", "b": 2, "a": 1}, {"kind": "in_port"}])
def test_unknown_certificate_is_printed(certificate: dict[str, Any]) -> None:
    """Tests that a certificate of an unknown kind, or one that lacks what its kind has, is printed as it is."""
    plan = plan_json("notice")
    plan["solver"]["migrate"]["certificate"] = certificate
    pairs = ", ".join(f"{key}={value}" for key, value in sorted(certificate.items()))
    assert certificate_text(plan, "migrate") == f"certificate: {pairs}"


def test_money_is_shown_where_it_is_known() -> None:
    """Tests that a page and a difference say what a plan costs, and that a plan without prices has no such line."""
    plan, dearer = plan_json("opt-6.7b-t4"), plan_json("opt-6.7b-t4")
    figures = {"before_usd_per_h": 5.7138, "after_usd_per_h": 3.8092, "stall_usd": 0.000065}
    tokens = {"before_usd_per_million_tokens": 10.712, "after_usd_per_million_tokens": None}
    plan["cost"], dearer["cost"] = {**figures, **tokens}, {**figures, **tokens, "after_usd_per_h": 4.0}
    expected = "\ncost $5.71 -> $3.81 an hour  $10.71 -> none per million tokens  stall $0.000065\n"
    assert expected in plan_text(plan)
    assert plan_changes(plan, dearer) == [{"path": "cost.after_usd_per_h", "before": "$3.81", "after": "$4.00"}]
    del plan["cost"]
    assert "\ncost " not in plan_text(plan)
    assert {change["before"] for change in plan_changes(plan, dearer)} == {None}
    assert {str(change["path"]).split(".")[0] for change in plan_changes(plan, dearer)} == {"cost"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "$0.00"),
        (0.000441, "$0.000441"),
        (0.4567, "$0.457"),
        (1.0, "$1.00"),
        (12345.678, "$12345.68"),
        (3e9, "$3e+09"),
    ],
)
def test_dollars(value: float, expected: str) -> None:
    """Tests that small sums keep their digits and large ones end."""
    assert usd_text(value) == expected


def test_links_and_ports_have_all_bytes() -> None:
    """Tests that links carry the bytes of all copies, the busiest port has all of it, and shares are of its time."""
    plan = plan_json("opt-6.7b-t4")
    copies = [step for step in plan["steps"] if step["kind"].startswith("copy")]
    found = links(plan)
    assert sum(link.bytes for link in found) == sum(step["bytes"] for step in copies)
    (crossing,) = [link for link in found if link.source != link.destination]
    assert (crossing.source, crossing.destination, crossing.share) == ("i1", "i2", 1.0)
    assert [(port.instance, port.direction) for port in ports(plan)] == [("i2", "in"), ("i1", "out")]
    assert ports(plan)[0].seconds == crossing.bytes / plan["spec"]["profile"]["link_bytes_per_s"]


@pytest.mark.parametrize("case", CASES)
def test_ports_carry_one_copy_at_a_time(case: str) -> None:
    """Tests that the drawn schedule keeps to the dependencies and never has two copies in one port."""
    plan = plan_json(case)
    spans = port_spans(plan["steps"], link_bytes_per_s=plan["spec"]["profile"]["link_bytes_per_s"])
    ends = {span.step["id"]: span.end_s for span in spans}
    busy: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for span in spans:
        assert all(span.begin_s >= ends[name] - 1e-9 for name in span.step["depends_on"])
        if "source" in span.step and span.step["bytes"]:
            source, destination = (span.step[end].split("/")[0] for end in ("source", "destination"))
            if source != destination:
                for port in ((source, "out"), (destination, "in")):
                    busy.setdefault(port, []).append((span.begin_s, span.busy_until_s))
    for times in busy.values():
        times.sort()
        assert all(after[0] >= before[1] - 1e-9 for before, after in itertools.pairwise(times))


def test_bad_graph_is_still_shown() -> None:
    """Tests that a cycle, an unknown dependency and a doubled id end in a text, not in an error or a hang."""
    plan = plan_json("notice")
    plan["steps"][0]["depends_on"] = [plan["steps"][-1]["id"]]
    plan["steps"][1]["depends_on"] = ["nowhere"]
    plan["steps"].append(copy.deepcopy(plan["steps"][2]))
    assert "Critical path" in plan_text(plan)


def test_absurd_figures_are_still_shown() -> None:
    """Tests that times and rates at the ends of what a number can be neither fail nor fill pages."""
    plan = plan_json("opt-6.7b-t4")
    for step in plan["steps"]:
        step["estimated_s"] = 1e308
    plan["spec"]["profile"]["link_bytes_per_s"] = 1e-300
    assert max(len(line) for line in plan_text(plan).split("\n")) <= 2 * WIDTH


def test_terminal_cannot_be_steered() -> None:
    """Tests that control characters in ids reach neither the page nor the differences."""
    evil = "i2\x1b[2J\nerror: forged\r\x07"
    plan = json.loads(json.dumps(plan_json("notice")).replace('"i2', json.dumps(evil)[:-1]))
    text = plan_text(plan) + changes_text(plan_changes(plan_json("notice"), plan))
    assert [character for character in text if not character.isprintable() and character != "\n"] == []
    assert not any(line.startswith("error: forged") for line in text.split("\n"))


def test_long_tables_say_what_they_leave_out() -> None:
    """Tests that tables end after the given number of rows with a count of the rest."""
    text = plan_text(plan_json("opt-6.7b-t4"), most_rows=3)
    assert "… and 40 more steps" in text
    assert "… and 6 more steps" in text
    assert "more step" not in plan_text(plan_json("opt-6.7b-t4"), most_rows=1000)


def test_differences_are_decisions() -> None:
    """Tests that another order and other ids of steps are no difference, and another link, figure or layout is."""
    plan = plan_json("opt-6.7b-t4")
    renamed = json.loads(json.dumps(plan).replace('"s1', '"t1'))
    renamed["steps"].reverse()
    assert plan_changes(plan, renamed) == []
    other = copy.deepcopy(plan)
    other["solver"]["place"] |= {"objective": 5.0, "status": "feasible"}
    other["estimates"]["done_s"] += 1
    other["target"]["replicas"][0]["stages"][0]["gpus"].reverse()
    copies = [step["id"] for step in other["steps"] if step["kind"] == "copy_weights"]
    other["steps"] = [step for step in other["steps"] if step["id"] != copies[0]]
    changes = [change["path"] for change in plan_changes(plan, other)]
    assert changes == ["estimates.done_s", "target.r4", "steps.copy_weights", "link.i1 -> i2", "solver.place"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (runs_text(["i0/0", "i0/1", "i0/2", "i1/0", "i3/5", "i3/4"]), "i0/0-2 i1/0 i3/5 i3/4"),
        (runs_text(["s9", "s10", "s11", "x"]), "s9-11 x"),
        (size_text(0), "0 B"),
        (size_text(999), "999 B"),
        (size_text(999_999), "1 MB"),
        (size_text(12_400_000_000), "12.4 GB"),
        (count_text(1, "copy"), "1 copy"),
        (count_text(2, "copy"), "2 copies"),
    ],
)
def test_words(made: str, expected: str) -> None:
    """Tests how runs of names, sizes and counts are written."""
    assert made == expected
