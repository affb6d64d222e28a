"""`python -m tests.matrix`: run the matrix, list its cells, write the log and the README's table.

    python -m tests.matrix [run] [--only family=llama,dtype=bfloat16] [--jobs 2] [--fresh | --retry]
    python -m tests.matrix list
    python -m tests.matrix table [--write]

Results are in MATRIX_OUT (default build/matrix), one file per cell; a run skips cells that the same code has a result
for. Exit code 0: every cell passed or is not possible for its model; 1: at least one did not; 130: interrupted.
"""

from __future__ import annotations

import os

# Before anything imports torch: sums are bit-equal only with one thread, here and in every child.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.matrix.cells import EVERYTHING, MAX_WORKERS, Cell, all_cells
from tests.matrix.results import CHECKOUT, CellResult, code_digest, path_of, read_result
from tests.matrix.schedule import run_cells
from tests.matrix.table import summary, write_pages, write_summary
from tests.runtime.families import FAMILIES

FILTERS = ("family", "dtype", "part", "degrees", "name")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    options = parser().parse_args(arguments)
    cells = chosen(all_cells(list(FAMILIES), seed=options.seed), options.only)
    if options.verb == "list":
        for cell in cells:
            print(cell.name, *cell.disturbances)
        return 0
    if options.verb == "table":
        digest = None if options.any_code else code_digest(seed=options.seed)
        content = summary(results(cells, options.out, digest), FAMILIES, seed=options.seed)
        write_pages(content) if options.write else print(content["totals"])
        return 0
    return run(cells, options)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tests.matrix", description="The matrix of make test-all")
    top.add_argument("verb", nargs="?", choices=("run", "list", "table"), default="run")
    top.add_argument("--only", action="append", default=[], metavar="KEY=VALUE", help=f"KEY is one of {FILTERS}")
    top.add_argument("--jobs", type=int, default=max(1, min(16, os.cpu_count() or 1)), help="cells at a time")
    top.add_argument("--seed", type=int, default=0, help="of the degrees, the models, the prompts and the script")
    top.add_argument("--fresh", action="store_true", help="run everything anew")
    top.add_argument("--retry", action="store_true", help="run what did not pass anew")
    top.add_argument("--any-code", action="store_true", help="table: take results of earlier code as well")
    top.add_argument("--write", action="store_true", help="table: write docs/matrix and the README's table")
    default = os.environ.get("MATRIX_OUT", str(CHECKOUT / "build" / "matrix"))
    top.add_argument("--out", type=Path, default=Path(default), help="folder of the results (MATRIX_OUT)")
    return top


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that all filters let through; a filter's values are alternatives."""
    wanted: dict[str, set[str]] = {}
    for item in ",".join(only).split(","):
        key, _, value = item.partition("=")
        if item and key not in FILTERS:
            raise SystemExit(f"--only {item}: KEY is one of {', '.join(FILTERS)}")
        if item:
            wanted.setdefault(key, set()).add(value)
    kept = [cell for cell in cells if all(_value(cell, key) in values for key, values in wanted.items())]
    if not kept:
        raise SystemExit(f"--only {' '.join(only)}: no cell is left")
    return kept


def _value(cell: Cell, key: str) -> str:
    if key == "degrees":
        return "" if cell.degrees is None else "x".join(map(str, cell.degrees))
    return str(getattr(cell, "name" if key == "name" else key))


def results(cells: Sequence[Cell], out: Path, digest: str | None) -> list[CellResult]:
    """What is known about cells by the code of a digest, or by any."""
    found = [read_result(path_of(out, cell)) for cell in cells]
    ended = [one for one in found if one is not None and one.status != "running"]
    return [one for one in ended if digest in (None, one.digest)]


def run(cells: Sequence[Cell], options: argparse.Namespace) -> int:
    """Run what has no result yet, then say what became of everything."""
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    digest, begun_s = code_digest(seed=options.seed), time.monotonic()
    known = {one.cell: one for one in results(cells, options.out, digest)}
    if options.retry:
        known = {cell: one for cell, one in known.items() if one.status in ("passed", "unsupported")}
    left = [cell for cell in cells if cell not in known]
    print(f"seed {options.seed}, code {digest}: {len(cells)} cells, {len(known)} known, {options.jobs} at a time")
    for line in choice(cells):
        print(line, flush=True)
    try:
        run_cells(left, options.out, seed=options.seed, jobs=options.jobs, digest=digest)
    except KeyboardInterrupt:
        print("interrupted: run it again to go on", file=sys.stderr)
        return 130
    ended = results(cells, options.out, digest)
    write_summary(options.out, summary(ended, FAMILIES, seed=options.seed))
    wrong = [one for one in ended if one.status not in ("passed", "unsupported")]
    num_cases, num_tokens = sum(one.num_passed() for one in ended), sum(one.tokens for one in ended)
    for one in wrong:
        print(f"{one.status}: {one.cell.name}: {one.error}")
    verdict = f"{len(ended) - len(wrong)} of {len(cells)} cells passed: {num_cases} cases, {num_tokens} tokens compared"
    print(f"{verdict}, {time.monotonic() - begun_s:.0f} s; results in {options.out}")
    return 1 if wrong or len(ended) < len(cells) else 0


def choice(cells: Sequence[Cell]) -> list[str]:
    """What was chosen and why."""
    services: dict[str, list[str]] = {}
    for cell in cells:
        if cell.degrees is not None:
            services.setdefault(cell.family, []).append(f"{cell.dtype} {cell.degrees}")
    lines = [f"engine: every (P, M) of up to {MAX_WORKERS} ranks that a model allows"]
    lines += [
        f"served at every degree, by name: {', '.join(EVERYTHING)}; the others by rotation, which the seed shuffles"
    ]
    return lines + [f"  {family}: {', '.join(degrees)}" for family, degrees in services.items()]


if __name__ == "__main__":
    sys.exit(main())
