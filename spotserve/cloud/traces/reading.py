"""Reads a trace from a file, whatever format of ours or of the paper it has."""

from __future__ import annotations

from pathlib import Path

from spotserve.cloud.traces.fleet import Fleet
from spotserve.cloud.traces.ours import our_trace
from spotserve.cloud.traces.paper import is_day_csv, paper_day_events, paper_events
from spotserve.core.trace import Trace
from spotserve.errors import SpecError

MAX_TRACE_BYTES = 64 * 2**20


def read_trace(path: Path, *, living: int = 0) -> Trace:
    """The trace in a file of ours or of the paper's.

    Args:
        path: the file.
        living: instances that live when the trace begins; they are `i0 … i(living - 1)`.

    Raises SpecError with file and line for what is no trace or cannot happen.
    """
    text = trace_text(path)
    fleet = Fleet(where=str(path))
    fleet.add_count(living, line=0)
    if '"gap_seconds"' in text[:1000]:
        raise SpecError(f"trace {path} has the counts of a zone, not events", hint="zones make a trace together")
    if text.lstrip().startswith("{"):
        trace = our_trace(text, fleet, name=path.stem)
    elif is_day_csv(text):
        trace = Trace(name=path.stem, events=tuple(paper_day_events(text, fleet)))
    else:
        events, end_s = paper_events(text, fleet)
        trace = Trace(name=path.stem, events=tuple(events), end_s=end_s)
    if not trace.events:
        raise SpecError(f"trace {path} has no event")
    return trace


def trace_text(path: Path) -> str:
    """The text of a trace file. Raises SpecError if it is too large, no text, or cannot be read."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise SpecError(f"trace {path} has {path.stat().st_size} bytes, more than {MAX_TRACE_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"trace {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"trace {path} is not UTF-8 text at byte {error.start}") from error
