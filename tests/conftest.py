"""What every test shares: one torch thread, one printed seed, and where the shared data lies."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Before anything imports torch or numpy: sums are bit-equal only with one thread, here and in every child.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import hypothesis
import pytest

from spotserve.runtime.forkserver_client import launch

CHECKOUT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed that every random test draws from (default 0)")
    parser.addoption("--rewrite", action="store_true", help="write golden files instead of comparing with them")
    parser.addoption("--thin", type=int, default=1, help="of each test's cases every N-th alone (default 1: all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases out for `make quick`, which is a look; `make test` has them all."""
    kept = set(thinned([item.nodeid for item in items], config.getoption("--thin")))
    left_out = [item for item in items if item.nodeid not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid in kept]


def thinned(names: Iterable[str], step: int) -> list[str]:
    """Of each test with more than two cases the first and every `step`-th after it."""
    cases: dict[str, list[str]] = {}
    for name in names:
        cases.setdefault(name.partition("[")[0], []).append(name)
    return [name for group in cases.values() for name in (group if len(group) < 3 else group[::step])]


def pytest_report_header(config: pytest.Config) -> list[str]:
    data = find_shared_data()
    return [f"seed: {config.getoption('--seed')}", f"shared data: {data if data is not None else 'none'}"]


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run; the header prints it."""
    value = request.config.getoption("--seed")
    assert isinstance(value, int)
    return value


@pytest.fixture
def rng(request: pytest.FixtureRequest, seed: int) -> random.Random:
    """Randomness of one test: the same for the same seed and test, whatever ran before it."""
    return random.Random(f"{seed}:{request.node.nodeid}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compares a text with a golden file, or writes it under --rewrite; the diff is then reviewed like code."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--rewrite"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is not there: run pytest --rewrite"
        assert path.read_text(encoding="utf-8") == text

    return compare


@pytest.fixture(scope="session")
def daemon_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables under which all daemons of a test run share one forkserver and one measured profile per model."""
    folder = tmp_path_factory.mktemp("daemons")
    forkserver = launch(folder / "forkserver", log=folder / "forkserver.log", is_shared=True, parent_pid=os.getpid())
    yield {
        "SPOTSERVE_FORKSERVER": str(folder / "forkserver"),
        "SPOTSERVE_PROFILE_CACHE": str(folder / "profiles"),
        "SPOTSERVE_ORPHAN_TIMEOUT": "10",
    }
    forkserver.kill()
    forkserver.wait()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published traces and workloads; skips without it, fails under SPOTSERVE_REQUIRE_DATA=1."""
    data = find_shared_data()
    if data is not None:
        return data
    reason = "no shared data: neither ../shared/data beside the checkout nor SPOTSERVE_SHARED"
    if os.environ.get("SPOTSERVE_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def find_shared_data() -> Path | None:
    """The first place that holds the published traces."""
    candidates = [CHECKOUT.parent / "shared" / "data", CHECKOUT / "shared" / "data"]
    named = os.environ.get("SPOTSERVE_SHARED")
    if named:
        candidates = [Path(named) / "data", Path(named)]
    return next((place for place in candidates if (place / "spotserve-paper").is_dir()), None)
