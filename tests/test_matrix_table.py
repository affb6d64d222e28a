"""The README's family table and the matrix's log are what the committed results give; the matrix itself is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotserve.runtime.architecture import ARCHITECTURES
from tests.matrix import table
from tests.matrix.cells import DTYPES, EVERYTHING, HALVES, SERVICE_DEGREES, Cell, all_cells
from tests.matrix.results import Case, Journal, new_result, path_of, read_result
from tests.runtime.families import FAMILIES

CELLS = all_cells(list(FAMILIES), seed=0)


def test_readme_table_is_written_from_the_results() -> None:
    """Tests that the README has the table, and the log the text, that docs/matrix/matrix.json gives."""
    content = table.read_summary()
    readme = table.README.read_text(encoding="utf-8")
    assert table.with_table(readme, content) == readme, "run python -m tests.matrix table --write"
    assert table.log_text(content) == table.LOG.read_text(encoding="utf-8")
    assert table.json_text(content) == table.SUMMARY.read_text(encoding="utf-8")


def test_every_architecture_has_a_row() -> None:
    """Tests that no architecture is served that the table, or the registry of test models, does not have."""
    families = dict(table.read_summary()["families"])
    assert set(ARCHITECTURES) == set(families.values())
    assert list(FAMILIES) == list(families)


def test_every_degree_and_disturbance_meets_several_families() -> None:
    """Tests that the rotation leaves out no degrees, no disturbance and no dtype of any family."""
    services = [cell for cell in CELLS if cell.degrees is not None]
    for degrees in SERVICE_DEGREES:
        own = [cell for cell in services if cell.degrees == degrees]
        assert len({cell.family for cell in own}) >= 3
        assert set(DTYPES) == {cell.dtype for cell in own}
    for family in FAMILIES:
        own = [cell for cell in CELLS if cell.family == family]
        assert {name for half in HALVES for name in half} == {name for cell in own for name in cell.disturbances}
        assert {(dtype, part) for dtype in DTYPES for part in ("engine", "service")} == {
            (cell.dtype, cell.part) for cell in own
        }
    assert set(EVERYTHING) <= set(FAMILIES)
    assert len(CELLS) == len({cell.name for cell in CELLS})


def test_a_failed_case_is_a_failed_cell(tmp_path: Path) -> None:
    """Tests that a case that raises is recorded with its error, and the next one runs all the same."""
    cell = CELLS[0]
    result = new_result(cell, "digest")
    journal = Journal(result, path_of(tmp_path, cell))

    def wrong(case: Case) -> None:
        case.tokens = 3
        raise AssertionError("position 4: 5, expected 6")

    def right(case: Case) -> None:
        case.tokens = 10

    assert not journal.take("first", wrong)
    kept = read_result(path_of(tmp_path, cell))
    assert kept is not None
    assert ("running", "ended during first") == (kept.status, kept.error)
    assert journal.take("second", right)
    journal.leave_out("third", "too many ranks")
    journal.finish()
    kept = read_result(path_of(tmp_path, cell))
    assert kept == result
    assert ("failed", 1, 10) == (result.status, result.num_passed(), result.tokens)
    assert "position 4: 5, expected 6" in str(result.error)


@pytest.mark.parametrize("status", ["passed", "failed", "timeout"])
def test_the_table_shows_what_does_not_pass(status: str) -> None:
    """Tests that a cell that did not pass is named in its family's row and among the log's failures."""
    case = Case("churn p1m2", "failed" if status == "failed" else "passed", tokens=488, error="other bits")
    wrong = new_result(Cell("llama", "bfloat16", "engine"), "digest")
    wrong.status, wrong.cases, wrong.error = status, [case], "slow"
    content = table.summary([wrong], FAMILIES, seed=0)
    row = next(line for line in table.family_table(content).splitlines() if line.startswith("| llama |"))
    expected = {"passed": "–", "failed": "bfloat16 engine: churn p1m2", "timeout": "bfloat16 engine: timeout"}
    assert row.endswith(f"| {expected[status]} |")
    assert ("None." in table.log_text(content).split("## Failures")[1].split("##")[0]) == (status == "passed")
