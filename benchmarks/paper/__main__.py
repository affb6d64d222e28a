"""The paper's evaluation again, and beyond it.

    python -m benchmarks.paper --data DIR [--part reproduced|beyond|ablation] [--seeds N] [--jobs N] [--models …]
        [--traces …] [--out F]

DIR holds `spotserve-paper/` (the artifact's traces and profiles) and `azure-llm-2023/`. Results of the parts that ran
replace those of the same parts in the results file; the others stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper import beyond, reproduced
from benchmarks.results_file import circumstances, write_results

PARTS = ("reproduced", "beyond", "ablation")
AZURE = "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
ASSUMED = (
    "Assumed, as the paper does not say: an instance reloads weights from its disk at 1 GB/s (25 s for GPT-20B at "
    "(2,8)), and Rerouting, which waits for an engine's start-up twice, at half of that; a T4 has 14 GB for an engine, "
    "12 288 tokens' KV and workspace included; GPUs of an instance exchange 10 GB/s. The first placement finds its "
    "weights loaded. Static batches last as the artifact's profile says, with its factor of 1.1. Interrupted requests "
    "are never dropped."
)


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--models", default=",".join(beyond.MODELS))
    parser.add_argument("--traces", default=",".join(beyond.TRACE_NAMES))
    parser.add_argument("--workloads", default=",".join(beyond.WORKLOADS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paper"))
    options = parser.parse_args()
    measured: dict[str, Any] = {}
    data = options.data / "spotserve-paper"
    for part in options.part or PARTS:
        rows: Any
        if part == "reproduced":
            rows = reproduced.measure(data)
        else:
            rows = beyond.measure(
                data,
                options.data / AZURE,
                models=options.models.split(","),
                traces=options.traces.split(","),
                workloads=options.workloads.split(","),
                seeds=options.seeds,
                jobs=options.jobs,
                contenders=beyond.OURS if part == "beyond" else beyond.ABLATED,
                with_published=part == "beyond",
            )
        measured[part] = {"circumstances": circumstances("benchmarks.paper"), "rows": rows}
    # Read as late as this: another part may have been measured meanwhile.
    known = options.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {"parts": {}}
    results["parts"] |= measured
    write_results(options.out, results, lambda saved: "\n".join(page(saved)) + "\n")


def page(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as markdown."""
    yield "# The SpotServe paper's evaluation on our simulator"
    yield ""
    yield ASSUMED
    renders: tuple[Callable[[Any], Iterator[str]], ...] = (reproduced.render, beyond.render, beyond.render_ablation)
    for part, render in zip(PARTS, renders, strict=True):
        saved = results["parts"].get(part)
        if saved is None:
            continue
        facts = saved["circumstances"]
        yield ""
        state = f"commit {facts['commit'][:9]}, {facts['uncommitted_files']} uncommitted files"
        yield f"`{facts['command']}`, {state}, {facts['processor']}, seeds from 0."
        yield ""
        yield from render(saved["rows"])


if __name__ == "__main__":
    main()
