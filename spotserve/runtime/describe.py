"""`python -m spotserve.runtime.describe FOLDER [--dtype X]`: prints a model's ModelSpec as JSON.

A process of its own, because it imports transformers and its caller, the coordinator, must not. The caller caches the
answer by digest. A refused model is one line on stderr (a hint may follow) and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spotserve.core.spec import DTYPE_BYTES
from spotserve.errors import SpotServeError
from spotserve.runtime.model_table import describe_model


def main(arguments: list[str] | None = None) -> int:
    """Print the description; returns the exit code."""
    parser = argparse.ArgumentParser(prog="spotserve-describe", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES))
    options = parser.parse_args(arguments)
    try:
        model = describe_model(options.folder, options.dtype)
    except SpotServeError as error:
        lines = [error.message] if error.hint is None else [error.message, f"hint: {error.hint}"]
        sys.stderr.write("\n".join(lines) + "\n")
        return error.exit_code
    sys.stdout.write(model.model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
