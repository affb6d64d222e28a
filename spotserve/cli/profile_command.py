"""`spotserve profile`: measures what the cost model needs to know about a model on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, get_args

import typer

from spotserve.cli.admin_commands import Format, Json, table, wanted_format
from spotserve.cli.config import Origin, choice, run_options
from spotserve.cli.start_progress import default_progress
from spotserve.core.canonical import canonical_json
from spotserve.core.options import Device
from spotserve.core.spec import DType, Profile
from spotserve.errors import SpecError
from spotserve.runtime.model_source import resolve_model
from spotserve.runtime.profiles import profile_of, write_whole


def register(app: typer.Typer) -> None:
    """Add `profile` to the command line."""
    app.command()(profile)


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="What to measure on.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="Weights and KV [default: the checkpoint's].")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the JSON there.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even if this model has been measured here.")] = False,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="D", help="Keep the result for the daemon of this state dir.")
    ] = None,
    output: Format = "table",
    as_json: Json = False,
) -> None:
    """Measure MODEL on this machine: layer times, link rate, storage rate."""
    wanted = wanted_format(output, as_json)
    choice(get_args(Device))(device, Origin("--device"))
    if dtype is not None:
        choice(get_args(DType))(dtype, Origin("--dtype"))
    progress = default_progress()
    try:
        folder = resolve_model(model, progress).folder
    finally:
        # Of a start that was refused or interrupted too: a bar hides the cursor.
        progress.end()
    measured = profile_of(folder, device=device, dtype=dtype, cache=cache_of(state_dir), again=again)
    if out is not None:
        try:
            write_whole(out, canonical_json(measured))
        except OSError as error:
            raise SpecError(f"--out {out} cannot be written: {error.strerror}") from error
    if out is None or wanted == "json":
        typer.echo(canonical_json(measured) if wanted == "json" else profile_text(measured), nl=False)


def cache_of(state_dir: Path | None) -> Path:
    """Where the daemon looks for measured profiles: its state dir, unless SPOTSERVE_PROFILE_CACHE names a place."""
    if os.environ.get("SPOTSERVE_PROFILE_CACHE"):
        return Path(os.environ["SPOTSERVE_PROFILE_CACHE"])
    if state_dir is None:
        state_dir = Path(run_options({}, environment=os.environ, config_file=None).state_dir)
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return state_dir / "profiles"


def profile_text(measured: Profile) -> str:
    """The table view of a profile."""
    degrees = sorted({point.tensor for point in measured.latencies})
    times = {(point.tokens, point.tensor): point.layer_ms for point in measured.latencies}
    rows = [
        (tokens, *(f"{times[tokens, degree]:.3f}" for degree in degrees))
        for tokens in sorted({point.tokens for point in measured.latencies})
    ]
    layers = table(("TOKENS", *(f"TENSOR {degree} (ms)" for degree in degrees)), rows)
    return (
        f"{measured.name} on {measured.device}\n\n{layers}\n\n"
        f"link     {measured.link_bytes_per_s / 2**20:.0f} MiB/s, round trip {measured.round_trip_s * 1e6:.0f} us\n"
        f"storage  {measured.storage_bytes_per_s / 2**20:.0f} MiB/s\n"
        f"start    {measured.start_s:.1f} s, per stage {measured.stage_overhead_ms:.3f} ms\n"
    )
