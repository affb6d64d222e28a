"""Workers end to end: forked, told what to do over gRPC, generating over the mesh; tokens equal transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster
from tests.runtime.stage_play import Play, folder, forkserver, model, play, prompt_of, reference

__all__ = ["folder", "forkserver", "model", "play"]

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 2), (1, 3)])
def test_tokens_equal_transformers(play: Play, folder: Path, pipeline: int, tensor: int) -> None:
    """Tests that a replica of real processes generates what transformers does, requests batched together."""
    prompts = {"a": prompt_of(1, 3), "b": prompt_of(2, 40), "c": prompt_of(3, 17)}

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(pipeline * tensor)
        replica = await cluster.place(pipeline, tensor, [f"i{index}" for index in range(pipeline * tensor)])
        for name, prompt in prompts.items():
            await cluster.admit(replica, name, prompt, max_tokens=40)
        await cluster.finished(*prompts)
        for name, prompt in prompts.items():
            assert reference(folder, prompt, 40) == cluster.tokens(name)

    play(scenario)


def test_choices_and_eos(play: Play, folder: Path) -> None:
    """Tests that choices of one sampled request differ, repeat with their seed, and that EOS ends a choice."""
    prompt = prompt_of(4, 20)
    greedy = reference(folder, prompt, 30)
    stop = next(token for index, token in enumerate(greedy) if index >= 5 and token not in greedy[:index])

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(1)
        replica = await cluster.place(1, 1, ["i0"])
        for name in ("x", "y"):
            await cluster.admit(replica, name, prompt, num_choices=2, max_tokens=20, temperature=1.0, top_p=0.9)
        await cluster.admit(replica, "z", prompt, ignore_eos=False, stop_token_ids=(stop,), max_tokens=30)
        await cluster.finished("x", "y", num_choices=2)
        await cluster.finished("z")
        assert cluster.tokens("x", 0) != cluster.tokens("x", 1)
        assert [cluster.tokens("x", 0), cluster.tokens("x", 1)] == [cluster.tokens("y", 0), cluster.tokens("y", 1)]
        assert greedy[: greedy.index(stop) + 1] == cluster.tokens("z")
        assert cluster.stream("z").finish_reason == "stop"
        assert cluster.stream("x").finish_reason == "length"

    play(scenario)


@pytest.mark.parametrize(
    ("old", "new", "workers"),
    [((1, 2), (2, 1), ("i1", "i2")), ((2, 2), (1, 3), ("i1", "i4", "i5")), ((1, 1), (2, 2), ("i0", "i1", "i2", "i3"))],
)
def test_live_migration_continues_exactly(
    play: Play,
    folder: Path,
    old: tuple[int, int],
    new: tuple[int, int],
    workers: tuple[str, ...],
) -> None:
    """Tests that requests move to another (P, M) while decoding goes on, token for token and without any prefill."""
    prompts = {"a": prompt_of(5, 3), "b": prompt_of(6, 70), "c": prompt_of(7, 33)}

    async def scenario(cluster: Cluster) -> None:
        await cluster.launch(6 if old == (2, 2) else 4 if new == (2, 2) else 3)
        source = await cluster.place(*old, [f"i{index}" for index in range(old[0] * old[1])])
        cluster.cap(20)
        for name, prompt in prompts.items():
            await cluster.admit(source, name, prompt, max_tokens=200)
        await cluster.until(lambda: all(cluster.tokens(name) for name in prompts))
        target = cluster.replica(*new, workers, name="r2", generation=2)
        await cluster.reserve(target)
        assert await cluster.load(target) > 0
        await cluster.join(target)
        assert await cluster.copy_kv(source, target) > 0
        before = len(cluster.tokens("a"))
        cluster.cap(40)
        await cluster.until(lambda: len(cluster.tokens("a")) > before)
        positions = await cluster.quiesce(source)
        assert len(prompts) == len(positions)
        num_bytes, missing = await cluster.copy_kv_delta(positions)
        assert [] == missing
        assert num_bytes > 0
        cluster.cap(None)
        await cluster.activate(target, cluster.contents(positions))
        await cluster.release(source)
        await cluster.finished(*prompts)
        probe = await cluster.probe(target.leader)
        assert 0 == probe["prefilled_tokens"]
        for name, prompt in prompts.items():
            assert reference(folder, prompt, 200) == cluster.tokens(name)
            assert {("r1", 1), ("r2", 2)} == set(cluster.stream(name).sources)
        assert [] == cluster.broken

    play(scenario)
