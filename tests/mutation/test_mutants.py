"""The mutants themselves, and (slow) that the checker's tests notice them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutation.mutants import mutants, run_in

CHECKOUT = Path(__file__).resolve().parents[2]

SOURCE = '''
def judged(left: int, right: int) -> bool:
    """Says `left < right`."""
    message = f"{left} + 1"
    if left < right and not message:
        return left == 0
    for one in [x for x in range(right) if x]:
        print(one)
    return True
'''


def test_one_fault_at_a_time(tmp_path: Path) -> None:
    """Tests that each mutant differs from the source in one place, and that messages and annotations stay."""
    path = tmp_path / "judged.py"
    path.write_text(SOURCE)
    found = [(one.before, one.after) for one in mutants("judged", path)]
    assert ("left < right", "left <= right") in found
    assert ("left < right and (not message)", "left < right or not message") in found
    assert ("not message", "message") in found
    assert ("return left == 0", "return None") in found
    assert ("print(one)", "pass") in found
    assert ("True", "False") in found
    assert not [one for one in found if "+ 1" in one[0] or "Says" in one[0]]


def test_a_mutant_is_another_program(tmp_path: Path) -> None:
    """Tests that the code of a mutant does what its text says, and that making it leaves the next ones alone."""
    path = tmp_path / "judged.py"
    path.write_text("def judged(left, right):\n    return left < right\n")
    answers = {}
    for mutant in mutants("judged", path):
        module = ModuleType("judged")
        run_in(module, mutant.code)
        answers[mutant.after] = module.judged(1, 1)
    assert {"left <= right": True, "return None": None} == answers


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nine_of_ten_faults_of_the_checker_are_noticed() -> None:
    """Tests that at least 90 % of all mutants of core/check*.py fail a test of the checker."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutation.checker"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
