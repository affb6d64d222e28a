"""Golden journals as values, for tests that need what a real daemon wrote."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from spotserve.core.controller import Entry
from spotserve.store.recording import read_recording

FOLDER = Path(__file__).parent
GOLDEN = sorted(FOLDER.glob("*.db"))


def entries_of(name: str) -> list[Entry]:
    """All entries of a golden journal, read from a copy: SQLite would put files of its own beside it."""
    with tempfile.TemporaryDirectory() as folder:
        return list(read_recording(Path(shutil.copy(FOLDER / f"{name}.db", folder))).entries)
