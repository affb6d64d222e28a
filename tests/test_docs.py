"""The documents keep up with the code: pictures, error codes, links, flags."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from spotserve.cli.config import SETTINGS, flag_of

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(CHECKOUT.glob("*.md")), *sorted((CHECKOUT / "docs").rglob("*.md"))]


def script(name: str) -> ModuleType:
    """A script of the docs folder, imported."""
    specification = importlib.util.spec_from_file_location(name, CHECKOUT / "docs" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_lifecycles_are_drawn_from_the_tables() -> None:
    """Tests that docs/lifecycles.md is what `make docs` writes."""
    drawing = script("draw_lifecycles")
    assert drawing.page() == drawing.PAGE.read_text(encoding="utf-8")


def test_every_error_code_is_in_the_troubleshooting_table() -> None:
    """Tests that the README's table lists each code of the source, that no two errors share one."""
    sources = [path.read_text(encoding="utf-8") for path in (CHECKOUT / "spotserve").rglob("*.py")]
    codes = [code for source in sources for code in re.findall(r'^\s+code = "(SPS-\d+)"', source, re.MULTILINE)]
    assert sorted(codes) == re.findall(r"^\| (SPS-\d+) \|", README, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    """Tests that every relative link of the documents names a file or folder that exists."""
    dead = [
        f"{page.relative_to(CHECKOUT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert [] == dead


def test_flags_that_documents_name_exist() -> None:
    """Tests that the README names no flag of `run` that there is not, for every flag in backquotes."""
    others = {"--config", "--fresh", "--no-deterministic", "--json", "--help", "--exit-code", "--url", "--grace"}
    known = {flag_of(setting.key) for setting in SETTINGS} | others
    assert set() == set(re.findall(r"`(--[a-z-]+)[ `]", README)) - known


def test_decisions_are_numbered() -> None:
    """Tests that decision notes count from 1 without a gap and say context, choice and consequences."""
    notes = sorted((CHECKOUT / "docs/decisions").glob("*.md"))
    assert list(range(1, len(notes) + 1)) == [int(note.name[:4]) for note in notes]
    for note in notes:
        text = note.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(note.name[:4])}. "), note.name
        assert [] == [word for word in ("Context", "Choice", "Consequences") if f"**{word}.**" not in text], note.name
