"""The state dir lets one process write, and never mixes two runs or two models."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from spotserve.errors import StateDirError
from spotserve.store import state_dir as state_dir_module
from spotserve.store.journal import Journal
from spotserve.store.ledger import Ledger
from spotserve.store.state_dir import OpenedJournal, StateDir, default_state_dir
from tests.store.conftest import TIMEOUT_S, new_request, records


def opened(state_dir: StateDir, *, model_digest: str = "sha256:aa", dtype: str = "float32") -> OpenedJournal:
    return state_dir.open_journal(model_digest=model_digest, dtype=dtype, now_unix_s=1_000.5)


def leave(path: Path, *, entries: int, clean: bool) -> None:
    """An earlier run: that many entries and one request's content."""
    with StateDir(path) as state_dir:
        journal = opened(state_dir).journal
        journal.append(records(1, entries)).result(TIMEOUT_S)
        if clean:
            journal.mark_clean_stop().result(TIMEOUT_S)
        journal.close()
        with closing_ledger(state_dir) as ledger:
            ledger.accept([new_request("a")])
            ledger.end(new_request("a").request, "finished").result(TIMEOUT_S)


class closing_ledger:  # noqa: N801  (reads as a clause of `with`)
    """Shuts a ledger down at the end of a block."""

    def __init__(self, state_dir: StateDir) -> None:
        self._ledger = Ledger(state_dir.ledger_path)

    def __enter__(self) -> Ledger:
        return self._ledger

    def __exit__(self, *_: object) -> None:
        self._ledger.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state"


def test_the_default_place_follows_xdg() -> None:
    """Tests that the default is per port below XDG_STATE_HOME, which counts only when absolute."""
    assert Path("/x/spotserve/8000") == default_state_dir(8000, {"XDG_STATE_HOME": "/x"})
    fallback = Path.home() / ".local" / "state" / "spotserve" / "8001"
    assert [fallback, fallback] == [default_state_dir(8001, {}), default_state_dir(8001, {"XDG_STATE_HOME": "x"})]


def test_everything_in_it_is_private(path: Path) -> None:
    """Tests that the dir is 0700, also when it lay open before, and that the secret is 0600."""
    path.mkdir(parents=True, mode=0o755)
    with StateDir(path) as state_dir:
        state_dir.secret()
        assert 0o700 == stat.S_IMODE(path.stat().st_mode)
        assert 0o600 == stat.S_IMODE(state_dir.secret_path.stat().st_mode)


def test_a_second_daemon_is_refused_by_the_pid_of_the_first(path: Path) -> None:
    """Tests that another process cannot open a held dir, learns who holds it, and changes nothing."""
    code = (
        "import sys; from pathlib import Path; from spotserve.store.state_dir import StateDir\n"
        "StateDir(Path(sys.argv[1]), fresh=True); print('opened')"
    )
    with StateDir(path) as state_dir:
        opened(state_dir).journal.close()
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
        assert f"held by process {os.getpid()}" in other.stderr
        assert (1, "1\n") == (other.returncode, (path / "term").read_text())
        assert state_dir.journal_path.exists()
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_the_lock_is_free_after_close_and_the_pid_is_gone(path: Path) -> None:
    """Tests that the pid stands in its file while the dir is held, and no longer."""
    with StateDir(path):
        assert f"{os.getpid()}\n" == (path / "pid").read_text()
    assert "" == (path / "pid").read_text()
    StateDir(path).close()


def test_the_term_rises_at_each_start(path: Path) -> None:
    """Tests that each start, a fresh one too, has a higher term."""
    terms = []
    for fresh in (False, False, True):
        with StateDir(path, fresh=fresh) as state_dir:
            terms.append(state_dir.term)
    assert [1, 2, 3] == terms


@pytest.mark.parametrize("text", ["", "zero", "-1", "0", "1.5", "9" * 40])
def test_a_damaged_term_stops_the_start(path: Path, text: str) -> None:
    """Tests that a term that is no number is never taken for a low one, and that the lock is given back."""
    StateDir(path).close()
    (path / "term").write_text(text)
    for _ in range(2):
        with pytest.raises(StateDirError, match="term holds"):
            StateDir(path)


def test_secret_and_port_stay(path: Path) -> None:
    """Tests that secret and worker port are chosen once and kept over a fresh start."""
    with StateDir(path) as state_dir:
        first = (state_dir.secret(), state_dir.worker_port())
    with StateDir(path, fresh=True) as state_dir:
        assert first == (state_dir.secret(), state_dir.worker_port())
    assert 64 == len(first[0])
    assert 1024 <= first[1] <= 65535


def test_worker_port_is_nobodys_outgoing_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the worker port lies below the system's range for outgoing connections, or anywhere if that is low."""
    ranges = tmp_path / "ranges"
    monkeypatch.setattr(state_dir_module, "OUTGOING_PORTS", ranges)
    for number, (text, highest) in enumerate([("20010\t60999\n", 20010), ("1024 65535", 65536), ("", 65536)]):
        ranges.write_text(text)
        with StateDir(tmp_path / f"state{number}") as state_dir:
            assert 1024 <= state_dir.worker_port() < highest


def test_a_short_secret_is_refused(path: Path) -> None:
    """Tests that an emptied secret file is not accepted as a secret."""
    with StateDir(path) as state_dir:
        state_dir.secret()
        state_dir.secret_path.write_text("\n")
        with pytest.raises(StateDirError, match="fewer than 32"):
            state_dir.secret()


def test_a_crashed_run_is_continued(path: Path) -> None:
    """Tests that without a clean stop the journal, its incarnation and the content are continued."""
    leave(path, entries=3, clean=False)
    incarnation = (path / "incarnation").read_text()
    with StateDir(path) as state_dir:
        found = opened(state_dir)
        with closing(found.journal), closing_ledger(state_dir) as ledger:
            assert (True, 4) == (found.continued, found.journal.next_sequence)
            assert incarnation == (path / "incarnation").read_text() == found.journal.identity.incarnation + "\n"
            assert new_request("a").request in ledger


def test_a_clean_stop_begins_a_new_journal(path: Path) -> None:
    """Tests that after a clean stop a new journal begins, the old one is kept for replay and content stays."""
    leave(path, entries=3, clean=True)
    incarnation = (path / "incarnation").read_text()
    with StateDir(path) as state_dir:
        found = opened(state_dir)
        with closing(found.journal), closing_ledger(state_dir) as ledger:
            assert (False, 1) == (found.continued, found.journal.next_sequence)
            assert incarnation != found.journal.identity.incarnation + "\n"
            assert new_request("a").request in ledger
            found.journal.mark_clean_stop().result(TIMEOUT_S)
        archived = state_dir.archived_journals()
        assert [path / "journal-1.db"] == archived
        assert records(1, 3) == list(Journal.read_only(archived[0]).read())
    with StateDir(path) as state_dir:
        opened(state_dir).journal.close()
        assert ["journal-1.db", "journal-2.db"] == [file.name for file in state_dir.archived_journals()]


@pytest.mark.parametrize("other", [{"model_digest": "sha256:bb"}, {"dtype": "bfloat16"}])
def test_a_journal_of_another_model_is_refused(path: Path, other: dict[str, str]) -> None:
    """Tests that an open journal of another model or dtype is refused with the way out, and stays as it was."""
    leave(path, entries=3, clean=False)
    with StateDir(path) as state_dir:
        with pytest.raises(StateDirError, match="belongs to model sha256:aa in float32") as caught:
            opened(state_dir, **other)
        assert caught.value.hint is not None
        assert "--fresh" in caught.value.hint
        found = opened(state_dir)
        assert found.continued
        found.journal.close()


def test_another_model_after_a_clean_stop_gets_no_old_content(path: Path) -> None:
    """Tests that after a clean stop another model begins anew, without content that its tokenizer would misread."""
    leave(path, entries=3, clean=True)
    with StateDir(path) as state_dir:
        found = opened(state_dir, model_digest="sha256:bb")
        found.journal.close()
        with closing_ledger(state_dir) as ledger:
            assert (False, False) == (found.continued, new_request("a").request in ledger)


def test_fresh_destroys_nothing_before_the_journal_is_opened(path: Path) -> None:
    """Tests that a start with --fresh that is refused leaves journal and content to the next one without."""
    leave(path, entries=3, clean=False)
    StateDir(path, fresh=True).close()
    with StateDir(path) as state_dir:
        found = opened(state_dir)
        with closing(found.journal), closing_ledger(state_dir) as ledger:
            assert (True, 4) == (found.continued, found.journal.next_sequence)
            assert [] == state_dir.archived_journals()
            assert new_request("a").request in ledger


@pytest.mark.parametrize("damaged", [False, True])
def test_fresh_archives_the_journal_and_deletes_the_content(path: Path, damaged: bool) -> None:
    """Tests that --fresh begins anew over an open journal of another model, and over one that cannot be read."""
    leave(path, entries=3, clean=False)
    if damaged:
        (path / "journal.db").write_bytes(b"not a database, for sure")
    with StateDir(path, fresh=True) as state_dir:
        found = opened(state_dir, model_digest="sha256:bb")
        with closing(found.journal), closing_ledger(state_dir) as ledger:
            assert (False, 1) == (found.continued, found.journal.next_sequence)
            assert ["journal-1.db"] == [file.name for file in state_dir.archived_journals()]
            assert new_request("a").request not in ledger


def test_a_corrupt_journal_stops_the_start(path: Path) -> None:
    """Tests that a journal that cannot be read is never replaced by a new one unasked."""
    leave(path, entries=3, clean=False)
    (path / "journal.db").write_bytes(b"")
    with StateDir(path) as state_dir, pytest.raises(StateDirError, match=r"journal\.db"):
        opened(state_dir)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Tests that a path below a file is refused with its name and a hint."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StateDirError, match="cannot be written") as caught:
        StateDir(tmp_path / "file" / "state")
    assert caught.value.hint == "choose another with --state-dir"
