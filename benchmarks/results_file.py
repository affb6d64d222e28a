"""What every benchmark says beside its numbers, and where it leaves them: results as JSON, and as a page made of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil


def write_results(out: Path, results: Mapping[str, Any], render: Callable[[Any], str]) -> None:
    """Write OUT.json, and OUT.md as it is rendered from the JSON."""
    text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(text, encoding="utf-8")
    out.with_suffix(".md").write_text(render(json.loads(text)), encoding="utf-8")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def circumstances(module: str) -> dict[str, Any]:
    """What the numbers of a benchmark depend on beside the code."""
    import torch

    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_files": len(_git("status", "--porcelain", "--", "spotserve", "benchmarks/*.py").splitlines()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_before": os.getloadavg(),
    }


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
