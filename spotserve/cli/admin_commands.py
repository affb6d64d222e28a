"""The verbs that speak to a running daemon: look at it, take and give instances, run a plan, stop it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spotserve.cli.client import client_for
from spotserve.cli.config import Origin, choice, seconds
from spotserve.cli.plan_file import plan_in, read_bytes
from spotserve.core.canonical import canonical_json
from spotserve.errors import SpecError, SpotServeError

Url = Annotated[str | None, typer.Option(metavar="URL", help="The daemon [default: SPOTSERVE_URL, else loopback].")]
Format = Annotated[str, typer.Option("--format", metavar="table|json", help="How the answer reads.")]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
Instance = Annotated[str, typer.Argument(metavar="ID", help="An instance, such as i2.")]


def register(app: typer.Typer) -> None:
    """Add the admin verbs to the command line."""
    app.command()(status)
    app.command()(notice)
    app.command()(kill)
    app.command("add-instance")(add_instance)
    app.command()(snapshot)
    app.command()(apply)
    app.command()(stop)


def status(url: Url = None, output: Format = "table", as_json: Json = False) -> None:
    """Show state, replicas, instances, requests and migrations."""
    wanted = wanted_format(output, as_json)
    answer = client_for(url).get("/admin/status")
    typer.echo(canonical_json(answer) if wanted == "json" else status_text(answer), nl=False)


def notice(
    instance: Instance,
    grace: Annotated[str, typer.Option(metavar="S", help="Seconds until it is taken.")] = "30",
    url: Url = None,
) -> None:
    """Give an instance its preemption notice.

    At the deadline it is killed, finished or not; a second notice can only shorten it.
    """
    grace_s = seconds(0)(grace, Origin("--grace"))
    client_for(url).post("/admin/notice", {"instance": instance_id(instance), "grace_s": grace_s})


def kill(instance: Instance, url: Url = None) -> None:
    """Kill every worker of an instance at once, without notice."""
    client_for(url).post("/admin/kill", {"instance": instance_id(instance)}, timeout_s=120.0)


def add_instance(url: Url = None) -> None:
    """Add one instance and print its id."""
    typer.echo(client_for(url).post("/admin/add-instance")["instance"])


def snapshot(
    spec: Annotated[bool, typer.Option("--spec", help="Print the serving spec instead of the snapshot.")] = False,
    url: Url = None,
) -> None:
    """Print the daemon's snapshot, or its spec.

    As `spotserve plan --snapshot F --spec F` reads them.
    """
    answer = client_for(url).get("/admin/snapshot")
    typer.echo(canonical_json(answer["spec" if spec else "snapshot"]), nl=False)


def apply(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, as spotserve plan --out writes it.")],
    url: Url = None,
) -> None:
    """Run a plan on the daemon.

    Returns when it is released (exit 0) or aborted (1); a stale plan is refused (5).
    """
    data = read_bytes(file, what="FILE")
    plan_in(data, file)  # What is no plan is told here; what it means for the daemon only the daemon can say.
    answer = client_for(url).post("/admin/apply", data, timeout_s=None)
    typer.echo(canonical_json(answer), nl=False)
    if answer.get("outcome") == "aborted":
        raise SpotServeError(f"plan {file} was aborted", hint="spotserve status shows what the daemon did instead")


def stop(url: Url = None) -> None:
    """Stop the daemon within its --drain.

    It admits nothing new and finishes what it can; the rest goes on at the next start.
    """
    client_for(url).post("/admin/stop")


def wanted_format(output: str, as_json: bool) -> str:
    """`table` or `json`."""
    return "json" if as_json else str(choice(("table", "json"))(output, Origin("--format")))


def instance_id(text: str) -> str:
    """What can be an instance id; whether there is such an instance is for the daemon to say."""
    if not text or len(text) > 64:
        raise SpecError(f"ID {text[:70]!r} is not an instance id", hint="spotserve status lists them")
    return text


def status_text(answer: dict[str, Any]) -> str:
    """The table view of `status --json`; every figure in it comes from there."""
    parallel = answer.get("parallel")
    degrees = f"  {parallel['data']}x{parallel['pipeline']}x{parallel['tensor']} (DxPxM)" if parallel else ""
    requests = "  ".join(f"{name} {count}" for name, count in answer["requests"].items())
    parts = [f"{answer['state']}  epoch {answer['epoch']}{degrees}", f"requests  {requests}"]
    parts.append(instances_table(answer["instances"]))
    parts.append(
        table(
            ("REPLICA", "GENERATION", "STAGE", "LAYERS", "GPUS"),
            [
                (r["id"], r["generation"], index, layer_range(stage["layers"]), gpu_names(stage["gpus"]))
                for r in answer["replicas"]
                for index, stage in enumerate(r["stages"])
            ],
        )
    )
    parts.append(
        table(
            ("EPOCH", "TRIGGER", "MODE", "OUTCOME", "ESTIMATED", "STALL", "WEIGHTS", "KV", "RECOMPUTED"),
            [migration_row(migration) for migration in answer["migrations"]],
        )
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def instances_table(instances: Sequence[dict[str, Any]]) -> str:
    """A line per instance; with the type of its GPUs where the daemon knows several."""
    titles = ["INSTANCE", "STATE", "MARKET", "GPUS"]
    rows = [[one["id"], one["state"], one["market"], gpu_names(one["gpus"])] for one in instances]
    if any("gpu_types" in one for one in instances):
        titles.append("TYPE")
        for one, row in zip(instances, rows, strict=True):
            row.append(", ".join(dict.fromkeys(one.get("gpu_types", []))) or "-")
    return table(titles, rows)


def migration_row(migration: dict[str, Any]) -> tuple[object, ...]:
    """One migration in the words of the table."""
    estimated_s, stall_ms = migration.get("estimated_s"), migration.get("stall_ms_max")
    return (
        migration["epoch"],
        migration["trigger"],
        migration["mode"],
        migration["outcome"] or "running",
        "-" if estimated_s is None else f"{estimated_s:.2f} s",
        "-" if stall_ms is None else f"{stall_ms:.0f} ms",
        size_text(migration["weight_bytes"]),
        size_text(migration["kv_bytes"]),
        f"{migration['recomputed_tokens']} tokens",
    )


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; empty for no rows."""
    if not rows:
        return ""
    cells = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def gpu_names(gpus: object) -> str:
    """GPU ids, or how many there are."""
    if isinstance(gpus, list):
        return " ".join(str(gpu.get("id", gpu)) if isinstance(gpu, dict) else str(gpu) for gpu in gpus) or "-"
    return str(gpus)


def layer_range(layers: Sequence[int]) -> str:
    """`0:4`, half-open like every range."""
    return f"{layers[0]}:{layers[1]}"


def size_text(size_bytes: int) -> str:
    """Bytes for a person."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
