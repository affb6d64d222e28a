"""What every CP-SAT model here shares."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal
from ortools.sat.python import cp_model
from spotserve.solvers.cp_sat import new_solver

model = cp_model.CpModel()
model.maximize(model.new_int_var(0, 10, "x"))
assert new_solver(1.0).solve(model) == cp_model.OPTIMAL
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_reaches_python_after_a_solve() -> None:
    """Tests that a solve leaves SIGINT to Python, so that a verb can clean up and end with 130."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (0, "interrupted\n") == (done.returncode, done.stdout), done.stderr
