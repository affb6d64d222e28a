"""`spotserve report`: the pictures are whole, in order, self-contained, and nothing in a plan gets out of its text."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spotserve.cli.drawing.gantt import MOST_PORTS
from spotserve.cli.drawing.layout import MOST_INSTANCES
from spotserve.cli.drawing.report import plan_html, plan_svg
from spotserve.cli.main import run_verb

PLANS = Path(__file__).resolve().parents[2] / "plans"
CASES = sorted(folder.name for folder in PLANS.iterdir() if (folder / "expected-plan.json").is_file())
SVG = "{http://www.w3.org/2000/svg}"


def plan_json(case: str) -> dict[str, Any]:
    """The plan of a case, free to be changed."""
    plan: dict[str, Any] = json.loads((PLANS / case / "expected-plan.json").read_text())
    return plan


def many_instances(count: int) -> dict[str, Any]:
    """The OPT-6.7B plan so many times beside itself, with instances, replicas and steps of its own each time."""
    whole = plan_json("opt-6.7b-t4")
    world = whole["snapshot"]["world"]
    parts = (whole["steps"], whole["target"]["replicas"], world["instances"], world["replicas"])
    text = json.dumps(parts)
    for part in parts:
        part.clear()
    for number in range(count):
        # Ids of instances, replicas and steps are the only strings of a letter and a digit.
        for part, more in zip(parts, json.loads(re.sub(r'"([irs])(?=\d)', rf'"\g<1>{number + 1}0', text)), strict=True):
            part += more
    return whole


def tree_of(picture: str) -> ElementTree.Element:
    """The elements of an SVG file; it is our own, whatever is in its texts."""
    return ElementTree.fromstring(picture)  # noqa: S314


def panel(picture: str, name: str) -> ElementTree.Element | None:
    """A panel of the Gantt chart."""
    tree = tree_of(picture)
    return next((one for one in tree.iter(f"{SVG}g") if one.get("class") == f"panel {name}"), None)


def bars(picture: str) -> Iterator[tuple[str, str, float, float]]:
    """(step, row, left, right) of every bar of the whole chart."""
    whole = panel(picture, "whole")
    assert whole is not None
    for box in whole.iter(f"{SVG}rect"):
        if (box.get("class") or "").startswith("bar "):
            left, width = float(box.get("x", "")), float(box.get("width", ""))
            yield box.get("data-step", ""), box.get("data-row", ""), left, left + width


@pytest.mark.parametrize("case", CASES)
def test_each_copy_has_its_bars(case: str) -> None:
    """Tests that each copy has one bar in each port that it passes, or one inside its instance, and no other."""
    plan = plan_json(case)
    if not plan["steps"]:
        assert "There is nothing to do." in plan_svg(plan)
        return
    rows: dict[str, list[str]] = defaultdict(list)
    for step, row, _, _ in bars(plan_svg(plan)):
        rows[step].append(row)
    for step in plan["steps"]:
        if step["kind"].startswith("copy"):
            source, destination = step["source"].split("/")[0], step["destination"].split("/")[0]
            inside = [f"{source} inside"]
            expected = inside if source == destination else sorted([f"{source} out", f"{destination} in"])
            assert sorted(rows[step["id"]]) == expected
        elif step["kind"] == "load_weights":
            assert rows[step["id"]] == [f"{step['workers'][0].split('/')[0]} storage"]
        else:
            assert rows[step["id"]] == [step["kind"]]


@pytest.mark.parametrize("case", CASES)
def test_time_goes_to_the_right(case: str) -> None:
    """Tests that no step is drawn before what it waits for, no network port has two bars at once, none sticks out."""
    plan = plan_json(case)
    if not plan["steps"]:
        return
    drawn = list(bars(plan_svg(plan)))
    left = {step: x for step, _, x, _ in drawn}
    for step in plan["steps"]:
        assert all(left[step["id"]] >= left[before] for before in step["depends_on"])
    ports: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _, row, begin, end in drawn:
        assert 110 <= begin <= end <= 1201.5
        if row.endswith((" in", " out")):
            ports[row].append((begin, end))
    for times in ports.values():
        times.sort()
        # Bars are at least 1.5 wide, so that none is invisible.
        assert all(after[0] >= before[1] - 1.51 for before, after in itertools.pairwise(times))


def test_deadline_and_commit_are_marked() -> None:
    """Tests that a notice has its deadline marked beyond the end, a loss has none, and both have the commit."""
    marks = {}
    for case in ("opt-6.7b-t4", "loss"):
        whole = panel(plan_svg(plan_json(case)), "whole")
        assert whole is not None
        lines = [one for one in whole.iter(f"{SVG}line") if (one.get("class") or "").startswith("mark ")]
        marks[case] = {str(one.get("class")).split(" ")[1]: float(one.get("x1", "")) for one in lines}
    assert {"stop", "commit", "activate", "estimated", "deadline"} == set(marks["opt-6.7b-t4"])
    assert marks["opt-6.7b-t4"]["deadline"] > marks["opt-6.7b-t4"]["activate"] > marks["opt-6.7b-t4"]["commit"]
    assert {"commit", "estimated"} == set(marks["loss"])


def test_deadline_that_is_missed_is_drawn_to_scale() -> None:
    """Tests that a deadline before the plan's end stands before it."""
    plan = plan_json("opt-6.7b-t4")
    plan["trigger"]["remaining_s"] = 2.0
    picture = plan_svg(plan)
    whole = panel(picture, "whole")
    assert whole is not None
    (deadline,) = [one for one in whole.iter(f"{SVG}line") if one.get("class") == "mark deadline"]
    assert float(deadline.get("x1", "")) < max(right for _, _, _, right in bars(picture))
    assert "not to scale" not in picture


def test_absurd_times_are_not_drawn() -> None:
    """Tests that a plan whose times no axis can hold says so, and the rest of the picture is there."""
    plan = plan_json("notice")
    for step in plan["steps"]:
        step["estimated_s"] = 1e308
    assert "Times beyond 1e+09 s are not drawn." in plan_svg(plan)
    assert panel(plan_svg(plan), "whole") is None


def test_short_cut_over_is_enlarged() -> None:
    """Tests that a cut-over too narrow to see has a panel of its own, and a wide one has none."""
    assert panel(plan_svg(plan_json("opt-6.7b-t4")), "cut-over") is not None
    assert panel(plan_svg(plan_json("notice")), "cut-over") is None


class Page(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_page_stands_alone() -> None:
    """Tests that the page is well formed, has picture and tables, no script and no outside resource."""
    page = Page(plan_html(plan_json("opt-6.7b-t4")))
    assert page.open == []
    assert {"svg", "pre", "h1", "details"} <= set(page.tags)
    assert {"script", "link", "img", "iframe", "object", "foreignobject", "use"} & set(page.tags) == set()
    assert [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "xlink:href")] == []
    assert "url(" not in page.words
    assert "@import" not in page.words
    assert "must receive" in page.words
    assert "Critical path" in page.words


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><svg onload=alert(1)>', "]]><b>&amp;'"])
def test_nothing_gets_out_of_its_text(evil: str) -> None:
    """Tests that ids full of markup change no tag and no attribute of the page or the picture."""
    plan = plan_json("notice")
    good = Page(plan_html(plan))
    text = json.dumps(plan)
    for name in ("i2", "r3.2", "s4"):
        text = text.replace(f'"{name}', json.dumps(name + evil.replace("/", "|"))[:-1])
    bad = json.loads(text)
    page = Page(plan_html(bad))
    assert evil.replace("/", "|") in page.words
    assert set(page.tags) == set(good.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in good.attributes}
    tree_of(plan_svg(bad))


def test_many_instances_are_capped() -> None:
    """Tests that 96 instances give a picture of bounded height that says what it leaves out."""
    plan = many_instances(32)
    assert len(plan["snapshot"]["world"]["instances"]) == 96
    picture = plan_svg(plan)
    tree = tree_of(picture)
    assert float(tree.get("height", "")) < 3000
    assert len([one for one in tree.iter(f"{SVG}g") if one.get("class") == "instance"]) == 2 * MOST_INSTANCES
    assert "32 more instances not drawn" in picture
    rows = {row for _, row, _, _ in bars(picture) if row.endswith((" in", " out", " inside"))}
    assert (len(rows), {row.split(" ")[1] for row in rows}) == (MOST_PORTS, {"in", "out"})
    assert "48 more ports not drawn" in picture


@pytest.mark.parametrize(("suffix", "begins"), [("html", "<!DOCTYPE html>"), ("svg", "<svg "), ("SVG", "<svg ")])
def test_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, begins: str) -> None:
    """Tests that the verb writes what the suffix says, and prints nothing."""
    out = tmp_path / f"plan.{suffix}"
    assert run_verb(["report", str(PLANS / "notice" / "expected-plan.json"), "--out", str(out)]) == 0
    assert out.read_text().startswith(begins)
    assert capsys.readouterr() == ("", "")


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that another suffix, a folder that is not there and a missing file exit 2, and no plan exits 5."""
    plan = str(PLANS / "notice" / "expected-plan.json")
    garbage = tmp_path / "garbage.json"
    garbage.write_bytes(b"{}")
    codes = [
        run_verb(["report", plan, "--out", str(tmp_path / "plan.png")]),
        run_verb(["report", plan, "--out", str(tmp_path / "nowhere" / "plan.svg")]),
        run_verb(["report", str(tmp_path / "none.json"), "--out", str(tmp_path / "plan.svg")]),
        run_verb(["report", plan]),
        run_verb(["report", str(garbage), "--out", str(tmp_path / "plan.svg")]),
    ]
    assert codes == [2, 2, 2, 2, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garbage.json"]
    assert "ends in neither .html nor .svg" in capsys.readouterr().err
