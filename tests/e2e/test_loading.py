"""Where weights come from: from peers what anybody holds, from storage only the rest; and never from a changed file."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spotserve.core.commands import BeginRun
from spotserve.core.events import StepDone
from spotserve.core.ids import instance_of
from spotserve.core.plan import CopyWeights, LoadWeights, Plan
from spotserve.core.slices import intersect, row_bytes, shard_slices
from spotserve.core.spec import ModelSpec
from spotserve.store.journal import EntryJournal, Journal
from tests.e2e.conftest import TinyModel
from tests.e2e.daemon import SPOTSERVE, RunningDaemon, running
from tests.e2e.models import SMALL, generated, write_tiny
from tests.e2e.scene import LAUNCHED, members_of
from tests.runtime.hub import serving_hub

pytestmark = pytest.mark.e2e

NUM_TOKENS = 20


@dataclass(frozen=True, slots=True)
class Fill:
    """What one plan run brought into its GPUs, in bytes received or read, and verified."""

    plan: Plan
    from_peers: int
    from_storage: int


def fills(daemon: RunningDaemon) -> list[Fill]:
    """Of every plan run so far, from the journal."""
    entries = list(EntryJournal(Journal.read_only(daemon.state_dir / "journal.db")).read())
    done = {(e.event.epoch, e.event.step): e.event.bytes for e in entries if isinstance(e.event, StepDone)}
    plans = [command.plan for e in entries for command in e.commands if isinstance(command, BeginRun)]
    return [
        Fill(
            plan,
            from_peers=sum(bytes_of(plan, CopyWeights, done)),
            from_storage=sum(bytes_of(plan, LoadWeights, done)),
        )
        for plan in plans
    ]


def bytes_of(plan: Plan, kind: type, done: dict[tuple[int, str], int]) -> Iterator[int]:
    """Bytes of the steps of one kind, as their workers told them."""
    return (done.get((plan.epoch.to, step.id), 0) for step in plan.steps if isinstance(step, kind))


def assert_storage_only_for_the_rest(plan: Plan) -> None:
    """No living GPU held a byte of what another was told to read from storage."""
    living = {one.id for one in plan.snapshot.world.instances if one.state in ("ready", "doomed")}
    for step in plan.steps:
        if not isinstance(step, LoadWeights):
            continue
        for piece in step.slices:
            for holding in plan.snapshot.world.holdings:
                if instance_of(holding.gpu) not in living or holding.gpu == step.workers[0]:
                    continue
                held = [s for shard in holding.shards for s in shard_slices(plan.spec.model, shard)]
                for other in (*held, *holding.slices):
                    if (other.parameter, other.dim) == (piece.parameter, piece.dim):
                        assert not intersect([(piece.start, piece.stop)], [(other.start, other.stop)])


def model_bytes(model: ModelSpec) -> int:
    """All parameters, once."""
    return sum(
        row_bytes(model, parameter)
        * parameter.shape[parameter.dim]
        * (model.num_layers if "{" in parameter.name else 1)
        for parameter in model.parameters
    )


def settle(daemon: RunningDaemon, num_runs: int) -> list[Fill]:
    """The fills once so many runs have ended and it serves."""
    daemon.wait_for(
        lambda: len([line for line in daemon.status()["migrations"] if line["outcome"]]) >= num_runs,
        f"{num_runs} migrations over",
    )
    daemon.wait_state("serving")
    return fills(daemon)


def assert_exact(daemon: RunningDaemon, model: TinyModel) -> None:
    """The tokens are those of `transformers`: the weights are the right ones, wherever they came from."""
    streams = model.stream_all(daemon, NUM_TOKENS)
    assert model.expected(NUM_TOKENS) == [stream.wait() for stream in streams]


def test_storage_only_for_what_nobody_holds(
    tmp_path: Path, large: TinyModel, large_environment: dict[str, str]
) -> None:
    """Tests that a start reads all once, a replacement after a kill only the lost part, after a notice nothing.

    And that a coordinator that comes back moves and reads nothing at all.
    """
    args = [str(large.folder), "--gpu-memory", "6MiB", "--max-num-seqs", "2", "--max-model-len", "128"]
    args += ["--instances", "2", "-dp", "1", "-pp", "2", "-tp", "1"]
    with running(tmp_path / "state", *args, env=large_environment) as daemon:
        [start] = fills(daemon)
        whole = model_bytes(start.plan.spec.model)
        assert (0, whole) == (start.from_peers, start.from_storage)
        daemon.admin("kill", instance="i0")
        daemon.admin("add-instance")
        replaced = settle(daemon, 1)[-1]
        assert_storage_only_for_the_rest(replaced.plan)
        assert 0 == replaced.from_peers
        assert 0 < replaced.from_storage < whole
        daemon.admin("add-instance")
        num_runs = len(fills(daemon))
        daemon.admin("notice", instance="i1", grace_s=60)
        moved = settle(daemon, num_runs)[-1]
        assert 0 == moved.from_storage
        assert whole - replaced.from_storage == moved.from_peers
        assert_exact(daemon, large)
        num_runs = len(fills(daemon))
        daemon.kill9()
        daemon.start()
        daemon.wait_state("serving")
        assert_exact(daemon, large)
        assert num_runs == len(fills(daemon))


def test_a_join_is_filled_by_peers(tmp_path: Path, small: TinyModel, small_environment: dict[str, str]) -> None:
    """Tests that a second replica's weights all come from the first; and when nobody is left, all from storage."""
    args = [str(small.folder), "--gpu-memory", "24MiB", "--instances", "1", "-dp", "2", "-pp", "1", "-tp", "1"]
    with running(tmp_path / "state", *args, env=small_environment) as daemon:
        daemon.admin("add-instance")
        start, joined = settle(daemon, 1)
        whole = model_bytes(start.plan.spec.model)
        assert [(0, whole), (whole, 0)] == [(each.from_peers, each.from_storage) for each in (start, joined)]
        assert_exact(daemon, small)
        for name in ("i0", "i1"):
            daemon.admin("kill", instance=name)
        daemon.wait_state("degraded")
        daemon.admin("add-instance")
        daemon.wait_state("serving")
        assert (0, whole) == (fills(daemon)[-1].from_peers, fills(daemon)[-1].from_storage)
        assert_exact(daemon, small)


def test_a_new_journal_leaves_the_old_daemons_workers_alone(
    tmp_path: Path, small: TinyModel, small_environment: dict[str, str]
) -> None:
    """Tests that `--fresh` after a kill serves the weights that lie there now, and that the old workers end.

    They outlived their daemon with the old weights, under the names that the new one launches.
    """
    folder = Path(shutil.copytree(small.folder, tmp_path / "model"))
    args = [str(folder), "--gpu-memory", "24MiB", "--instances", "2", "-dp", "1", "-pp", "2", "-tp", "1"]
    with running(tmp_path / "state", *args, env=small_environment) as daemon:
        assert_exact(daemon, small)
        old = groups_of(daemon)
        assert all(members_of(group) for group in old)
        daemon.kill9()
        other = write_tiny(tmp_path / "other", seed=1, **SMALL)
        expected = generated(other, small.prompt_ids, NUM_TOKENS)
        assert expected != small.expected(NUM_TOKENS)
        os.replace(other / "model.safetensors", folder / "model.safetensors")
        daemon.args = (*args, "--fresh")
        daemon.start()
        daemon.wait_for(lambda: not any(members_of(group) for group in old), "without the old workers")
        streams = small.stream_all(daemon, NUM_TOKENS)
        assert expected == [stream.wait() for stream in streams]
        assert ["ready", "ready"] == [one["state"] for one in daemon.status()["instances"]]
        assert all(members_of(group) for group in groups_of(daemon) - old)


def groups_of(daemon: RunningDaemon) -> set[int]:
    """The process groups of all instances ever launched."""
    return {int(group) for _, group in LAUNCHED.findall(daemon.log_path.read_text(errors="replace"))}


def refused(state_dir: Path, env: dict[str, str], *args: str) -> str:
    """What a start says that is refused with exit 2."""
    done = subprocess.run(
        [SPOTSERVE, "run", "--port", "0", "--state-dir", str(state_dir), *args],
        env={**os.environ, **env, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (2, "") == (done.returncode, done.stdout), done.stderr
    return done.stderr


def test_a_hub_model_serves_and_its_changed_weight_is_refused(
    tmp_path: Path, small: TinyModel, small_environment: dict[str, str]
) -> None:
    """Tests that a hub id serves what its folder would, and that a bit that flips between two starts is named.

    The same for a folder of the same model whose weights nobody vouches for, until the change is said to be wanted.
    """
    own = ["--gpu-memory", "24MiB", "--instances", "1"]
    with serving_hub() as hub:
        hub.add("org/small", small.folder)
        env = {**small_environment, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        with running(tmp_path / "hub", "org/small@main", *own, env=env) as daemon:
            assert "org/small" == daemon.model()
            assert_exact(daemon, small)
    [blob] = (path for path in (tmp_path / "home").rglob("blobs/*") if len(path.name) == 64)
    flip(blob)
    said = refused(tmp_path / "hub", {**env, "HF_HUB_OFFLINE": "1"}, "org/small", *own)
    assert f"model.safetensors has sha256 {sha256_of(blob)}, but the hub says {blob.name}" in said
    assert f"hint: delete {blob}" in said

    folder = Path(shutil.copytree(small.folder, tmp_path / "copy"))
    weights = folder / "model.safetensors"
    before = sha256_of(weights)
    flip(weights)
    said = refused(tmp_path / "hub", small_environment, str(folder), *own)
    assert f"error: {weights} has sha256 {sha256_of(weights)}, but {before} was served before\n" in said
    # The next thing to be refused shows that the change is accepted.
    assert "tensor degree 9 exceeds" in refused(tmp_path / "hub", small_environment, str(folder), "--fresh", "-tp", "9")


def flip(path: Path) -> None:
    """Change one bit of the last weight, and put the mtime back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def sha256_of(path: Path) -> str:
    """As `sha256sum` would."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
