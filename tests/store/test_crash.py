"""kill -9 in the middle of appends: what was acknowledged is there, and what is there is a prefix."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from spotserve.core.ids import RequestId
from spotserve.store.journal import Journal
from spotserve.store.ledger import Ledger
from tests.store.conftest import R1, TIMEOUT_S, run_of

NUM_REQUESTS = 3
KILLS = 6

WRITER = """
import itertools, sys, threading
from pathlib import Path
from spotserve.store.journal import Journal, JournalRecord
from spotserve.store.ledger import Ledger, Owner
from tests.store.conftest import R1, identity, new_request, records, run_of

folder, num_requests = Path(sys.argv[1]), int(sys.argv[2])
journal = Journal.create(folder / "journal.db", identity())
ledger = Ledger(folder / "ledger.db")
names = [f"q{index}" for index in range(num_requests)]
ledger.accept([new_request(name) for name in names])
ledger.set_owners({new_request(name).request: Owner(R1, 1) for name in names}).result()
say = threading.Lock()

def acknowledge(line):
    with say:
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()

def stream(index):
    position = 0
    for size in itertools.cycle([1, 3, 2, 7]):
        ids = [index * 1_000_000 + position + offset for offset in range(size)]
        ledger.append(R1, 1, [run_of(names[index], position, *ids)]).result()
        position += size
        acknowledge(f"tokens {names[index]} {position}")

def log():
    for number in itertools.count(1):
        journal.append(records(number, number)).result()
        acknowledge(f"entry {number}")

threads = [threading.Thread(target=stream, args=(index,)) for index in range(num_requests)]
for thread in [*threads, threading.Thread(target=log)]:
    thread.start()
"""


def kill_after(folder: Path, num_lines: int) -> dict[str, int]:
    """Run the writer, kill it after that many acknowledgements; returns the last of each kind that it gave."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(NUM_REQUESTS)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    with process, process.stdout as stdout:
        lines = [stdout.readline() for _ in range(num_lines)]
        process.kill()
        # What was said before the kill counts, also what lay in the pipe; a torn last line says nothing.
        lines += [line for line in stdout if line.endswith("\n")]
    acknowledged: dict[str, int] = {}
    for line in lines:
        *key, number = line.split()
        acknowledged[" ".join(key)] = int(number)
    return acknowledged


@pytest.mark.e2e
@pytest.mark.parametrize("kill", range(KILLS))
def test_every_acknowledged_token_and_entry_survives_a_kill(tmp_path: Path, seed: int, kill: int) -> None:
    """Tests that after SIGKILL all acknowledged runs and entries are found, gap-free, and appending goes on."""
    acknowledged = kill_after(tmp_path, random.Random(f"{seed}:{kill}").randrange(1, 4 + 80 * kill))
    ledger = Ledger(tmp_path / "ledger.db")
    assert tuple(RequestId(f"q{index}") for index in range(NUM_REQUESTS)) == ledger.open_requests()
    for index in range(NUM_REQUESTS):
        request = RequestId(f"q{index}")
        tokens = ledger.content(request).choices[0].token_ids
        assert len(tokens) >= acknowledged.get(f"tokens {request}", 0)
        assert tuple(range(index * 1_000_000, index * 1_000_000 + len(tokens))) == tokens
        resent = run_of(request, max(0, len(tokens) - 2), *tokens[-2:], 5)
        assert ((request, 0, len(tokens) + 1),) == ledger.append(R1, 1, [resent]).result(TIMEOUT_S).durable
    ledger.shutdown()
    with closing(Journal.open(tmp_path / "journal.db")) as journal:
        sequences = [record.sequence for record in journal.read()]
        assert list(range(1, journal.next_sequence)) == sequences
        assert len(sequences) >= acknowledged.get("entry", 0)
