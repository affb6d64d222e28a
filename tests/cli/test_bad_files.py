"""Files that are no plans, specs, snapshots or events: one line with the JSON path, the exit code, bounded cost."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotserve.api.admin import _read_plan
from spotserve.cli.main import run_verb
from spotserve.core.strict_json import MAX_DEPTH, MAX_FILE_BYTES, JsonFaultError, _without_strings, parse
from spotserve.errors import PlanRefusedError
from tests.cli.test_inspect import noticed_stage
from tests.cli.test_replay import written_journal

PLANS = Path(__file__).resolve().parents[2] / "plans"
CASE = PLANS / "notice"
EXPECTED = CASE / "expected-plan.json"
MAX_RSS_BYTES = 600 * 1024 * 1024

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a verb; gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_verb([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A copy of a case, to be spoiled."""
    folder = tmp_path / "case"
    shutil.copytree(CASE, folder)
    return folder


def one_error(err: str) -> str:
    """The one line of error, with or without a line of hint behind it."""
    lines = err.splitlines()
    assert lines, "nothing was said"
    assert lines[0].startswith("error: ")
    assert [line.split(":")[0] for line in lines[1:]] in ([], ["hint"])
    return lines[0]


def nested(depth: int) -> bytes:
    """Arrays in arrays."""
    return b'{"format_version": "0.1", "x": ' + b"[" * depth + b"]" * depth + b"}"


PLAN_READERS = ("show", "diff", "diff before", "verify", "apply", "report")


def reading(verb: str, path: Path) -> list[object]:
    """The command line with which a verb reads a plan file; `diff before` has it as the first of two."""
    words: dict[str, list[object]] = {
        "diff": ["diff", EXPECTED, path],
        "diff before": ["diff", path, EXPECTED],
        "report": ["report", path, "--out", path.parent / "plan.html"],
    }
    return words.get(verb, [verb, path])


BAD_DOCUMENTS = {
    "empty": b"",
    "truncated": EXPECTED.read_bytes()[:-500],
    "deep": nested(100_000),
    "just too deep": nested(MAX_DEPTH),
    "deep behind an escape": b'{"a": "\\n", "b": ' + b"[" * 100_000,
    "array": b"[]",
    "null": b"null",
    "number": b"7",
    "not UTF-8": b'{"format_version": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"format_version": "0.1"}'.encode("utf-16"),
    "NaN": b'{"format_version": "0.1", "epoch": {"from": NaN}}',
    "Infinity": b'{"format_version": "0.1", "epoch": {"from": -Infinity}}',
    "huge integer": b'{"format_version": "0.1", "epoch": {"from": 1' + b"0" * 400 + b"}}",
    "longest integer": b'{"format_version": "0.1", "epoch": {"from": 1' + b"0" * 5000 + b"}}",
    "huge float": b'{"format_version": "0.1", "epoch": {"from": 1e400}}',
    "key twice": b'{"format_version": "0.1", "epoch": {"from": 1, "from": 2}}',
    "zero bytes": b"\x00" * 64,
    "lone surrogate": b'{"format_version": "0.1", "policy": "\\ud800", "\\udfff": 1}',
    "terminal codes": b'{"format_version": "0.1", "\\u001b[2J\\n": 1}',
}


@pytest.mark.parametrize("verb", PLAN_READERS)
@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_plan_is_refused(said: Said, tmp_path: Path, name: str, verb: str) -> None:
    """Tests that a file that is no plan is one line and exit 5, for every verb that reads one."""
    path = tmp_path / "plan.json"
    path.write_bytes(BAD_DOCUMENTS[name])
    code, out, err = said(*reading(verb, path))
    line = out.rstrip("\n") if verb == "verify" else one_error(err)
    assert code == 5
    assert "corrupt" in line
    assert verb == "verify" or "hint: " in err
    assert line.isprintable()


def plan_with(**changes: Any) -> bytes:
    """The plan of a case with other values at its top."""
    return json.dumps({**json.loads(EXPECTED.read_bytes()), **changes}).encode()


@pytest.mark.parametrize("verb", PLAN_READERS)
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (plan_with(format_version="2.0"), "bad_version - format_version: format version 2.0 is not 0.1"),
        (plan_with(format_version=[]), "bad_version - format_version: "),
        (b"{}", "bad_version - format_version: format version None is not 0.1"),
        (plan_with(surprise=1), "corrupt - surprise: extra inputs"),
        (plan_with(steps=7), "corrupt - steps: input should be"),
        (plan_with(epoch={"from": -1, "to": 1}), "corrupt - epoch.from: input should be greater"),
        (plan_with(steps=[{"kind": "reserve", "id": "s1", "bytes": -1}]), "corrupt - steps[0]"),
    ],
    ids=["major version", "no version", "empty", "unknown key", "wrong kind", "negative epoch", "negative size"],
)
def test_what_is_wrong_in_a_plan(said: Said, tmp_path: Path, data: bytes, told: str, verb: str) -> None:
    """Tests that every verb that reads a plan names the same path for the same fault."""
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    code, out, err = said(*reading(verb, path))
    assert code == 5
    assert told in (out if verb == "verify" else one_error(err))


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_plan_over_the_wire(name: str) -> None:
    """Tests that the daemon reads a plan that it is handed as strictly as the command line."""
    with pytest.raises(PlanRefusedError, match=r"^plan refused: corrupt - ") as caught:
        _read_plan(BAD_DOCUMENTS[name])
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("name", [name for name in BAD_DOCUMENTS if name != "terminal codes"])
@pytest.mark.parametrize("file", ["snapshot.json", "event.json"])
def test_bad_snapshot_or_event_is_refused(said: Said, case: Path, name: str, file: str) -> None:
    """Tests that a snapshot or event that is none is one line that names it, a hint, and exit 2."""
    (case / file).write_bytes(BAD_DOCUMENTS[name])
    code, out, err = said("plan", case)
    assert (2, "") == (code, out)
    assert file in one_error(err)
    assert "hint: " in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is malformed at model: field required"),
        ("model = [", "is not TOML"),
        ("x = " + "[" * 100_000, "is not TOML"),
        ("x = 1" + "0" * 5000, "is not TOML"),
        ("[model]\nnum_layers = 1" + "0" * 400, "is malformed at model.num_layers"),
        ("[model]\n[model]\n", "is not TOML"),
        ("# " + "x" * (4 * 1024 * 1024), "is malformed at file"),
    ],
    ids=["empty", "truncated", "deep", "long integer", "huge integer", "table twice", "large"],
)
def test_bad_spec_is_refused(said: Said, case: Path, text: str, told: str) -> None:
    """Tests that a spec that is none is one line that says where, a hint, and exit 2."""
    (case / "spec.toml").write_text(text)
    code, out, err = said("plan", case)
    assert (2, "") == (code, out)
    assert told in one_error(err)
    assert "hint: " in err


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("num_layers = 6", "num_layers = -6", "model.num_layers"),
        ("num_layers = 6", "num_layers = nan", "model.num_layers"),
        ("num_layers = 6", "num_layers = 5", "snapshot.world"),
        ("link_bytes_per_s = 400000000.0", "link_bytes_per_s = inf", "profile.link_bytes_per_s"),
        ("link_bytes_per_s = 400000000.0", "link_bytes_per_s = 1e-320", "spec.profile.link_bytes_per_s"),
        ("head_dim = 16", "head_dim = 16\nhead_size = 16", "model.head_size"),
        ('q_heads", size = 8', 'q_heads", size = 9', "spec.model.axes[0]"),
    ],
)
def test_wrong_value_in_a_spec(said: Said, case: Path, old: str, new: str, told: str) -> None:
    """Tests that a value that cannot be is named by its path."""
    path = case / "spec.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    code, _, err = said("plan", case)
    assert code == 2
    assert told in one_error(err)


def world(data: Any) -> Any:
    """The world of a snapshot."""
    return data["world"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: world(data).update(epoch=-1), "world.epoch"),
        (lambda data: world(data)["instances"][1]["gpus"][0].update(memory_bytes=-5), "world.instances[1].gpus[0].mem"),
        (lambda data: world(data)["instances"].append(world(data)["instances"][0]), "snapshot.world.instances: i0"),
        (lambda data: world(data)["replicas"].append(world(data)["replicas"][0]), "snapshot.world.replicas: r3.1"),
        (lambda data: data["requests"].append(data["requests"][0]), "snapshot.requests: "),
        (lambda data: data["requests"][0]["choices"][0].update(kv_tokens=-1), "requests[0].choices[0].kv_tokens"),
        (lambda data: data["requests"][0].update(replica="r9"), "snapshot.requests[0].replica"),
        (lambda data: world(data)["replicas"][0]["stages"][1].update(layers=[3, 7]), "snapshot.world.replicas[0]"),
        (lambda data: world(data)["replicas"][0]["stages"][1].update(gpus=["i9/0"]), "snapshot.world.replicas[0]"),
        (lambda data: world(data)["replicas"][0]["stages"][1].update(gpus=["i0/0"]), "snapshot.world.replicas[0]"),
        (lambda data: world(data)["holdings"][0].update(gpu="i9/0"), "snapshot.world.holdings[0].gpu"),
        (lambda data: world(data)["holdings"][0]["shards"][0].update(layers=[0, 70]), "snapshot.world.holdings[0]"),
        (lambda data: world(data)["instances"][0]["gpus"][0].update(id="i7/0"), "snapshot.world.instances[0]"),
        (lambda data: world(data)["instances"][0].update(id="i" * 5000), "snapshot.world.instances"),
        (lambda data: world(data).update(instances=[1] * 100_000), "world.instances[0]"),
        (lambda data: data.update(world=None), "world"),
        (lambda data: data.update(extra=1), "extra"),
    ],
)
def test_snapshot_that_does_not_fit(said: Said, case: Path, spoil: Callable[[Any], None], told: str) -> None:
    """Tests that what a snapshot cannot say, by itself or of this model, is named by its path before it is planned."""
    path = case / "snapshot.json"
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    code, out, err = said("plan", case)
    assert (2, "") == (code, out)
    assert told in one_error(err)
    assert "hint: " in err


def test_event_about_nobody(said: Said, case: Path) -> None:
    """Tests that an event about an instance that the snapshot does not have is refused."""
    (case / "event.json").write_text('{"kind": "notice", "instances": ["i9"], "remaining_s": 30}')
    code, _, err = said("plan", case)
    assert code == 2
    assert "event.instances[0]: i9 is no instance of the snapshot" in one_error(err)
    (case / "event.json").write_text('{"kind": "notice", "instances": ["i2"], "remaining_s": -1}')
    code, _, err = said("plan", case)
    assert code == 2
    assert "event.json is malformed at remaining_s" in one_error(err)


@pytest.mark.parametrize("verb", PLAN_READERS)
@pytest.mark.parametrize("kind", ["directory", "pipe", "missing"])
def test_what_is_no_file(said: Said, tmp_path: Path, verb: str, kind: str) -> None:
    """Tests that a folder, a pipe that nobody writes and a missing file are exit 2, at once."""
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    code, _, err = said(*reading(verb, path))
    assert code == 2
    assert "cannot be read" in one_error(err)


SQLITE = b"SQLite format 3\x00"
BAD_JOURNALS = {**BAD_DOCUMENTS, "only a header": SQLITE + bytes(84), "header and noise": SQLITE + b"\xa5" * 8176}


@pytest.mark.parametrize("verb", ["inspect", "replay"])
@pytest.mark.parametrize("name", BAD_JOURNALS)
def test_bad_journal_is_refused(said: Said, tmp_path: Path, name: str, verb: str) -> None:
    """Tests that a file that is no journal is one line that names it, and a hint, whether it or its folder is given."""
    path = tmp_path / "journal.db"
    path.write_bytes(BAD_JOURNALS[name])
    for place in (path, tmp_path):
        code, out, err = said(verb, place)
        assert (1, "") == (code, out)
        line = one_error(err)
        assert str(path) in line
        assert line.isprintable()
        assert "hint: " in err


@pytest.mark.parametrize("verb", ["inspect", "replay"])
def test_a_journal_cut_short(said: Said, tmp_path: Path, verb: str) -> None:
    """Tests that a journal of which the end, or some page, is missing is refused by name."""
    whole = tmp_path / "whole.db"
    written_journal(whole, noticed_stage().journal.entries)
    data = whole.read_bytes()
    path = tmp_path / "journal.db"
    for cut in (data[: len(data) // 2], data[:-5000], data[:4096] + bytes(4096) + data[8192:]):
        path.write_bytes(cut)
        code, out, err = said(verb, path)
        assert (1, "") == (code, out)
        assert str(path) in one_error(err)


@pytest.mark.parametrize("verb", ["inspect", "replay"])
@pytest.mark.parametrize("kind", ["empty folder", "pipe", "missing"])
def test_what_is_no_journal(said: Said, tmp_path: Path, verb: str, kind: str) -> None:
    """Tests that an empty folder, a pipe that nobody writes and a missing file are one line, at once."""
    path = tmp_path / "it"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    code, out, err = said(verb, path)
    assert code in (1, 2)
    assert not out
    assert str(path) in one_error(err)


@pytest.mark.parametrize("option", ["--spec", "--snapshot"])
def test_pipe_as_an_input(said: Said, tmp_path: Path, option: str) -> None:
    """Tests that `plan` waits for no pipe either."""
    given = {"--spec": CASE / "spec.toml", "--snapshot": CASE / "snapshot.json"}
    given[option] = tmp_path / "pipe"
    os.mkfifo(given[option])
    code, _, err = said("plan", *(word for pair in given.items() for word in pair))
    assert code == 2
    assert option in one_error(err)


PROBE = """
import sys
from spotserve.cli.main import run_verb
code = run_verb(sys.argv[1:])
# Not ru_maxrss: that begins with the peak of the process that forked this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(peak, *sorted({"ortools", "scipy", "numpy"} & set(sys.modules)))
sys.exit(code)
"""


def probed(*arguments: object) -> tuple[int, int, list[str]]:
    """(exit code, peak memory in bytes, solver libraries loaded) of a verb in a process of its own."""
    words = [sys.executable, "-c", PROBE, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    peak, *libraries = done.stdout.splitlines()[-1].split()
    return done.returncode, int(peak), libraries


def test_no_solver_for_a_bad_file(case: Path) -> None:
    """Tests that neither a file that is no snapshot nor one that does not fit the spec loads a solver's library."""
    data = json.loads((case / "snapshot.json").read_text())
    data["requests"][0]["replica"] = "r9"
    for text in (json.dumps(data), "{"):
        (case / "snapshot.json").write_text(text)
        code, _, libraries = probed("plan", case)
        assert (2, []) == (code, libraries)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "verb",
    ["plan", "verify", *(pytest.param(verb, marks=pytest.mark.slow) for verb in PLAN_READERS if verb != "verify")],
)
def test_memory_for_a_large_file(case: Path, verb: str) -> None:
    """Tests that a file of 100 MB is refused within 600 MB, and that no solver is loaded for it."""
    large = case / "snapshot.json"
    large.write_bytes(b'{"world": [' + b"[],\n" * (25 * 1024 * 1024) + b"1]}")
    assert large.stat().st_size > 100_000_000
    code, peak, libraries = probed(*(["plan", case] if verb == "plan" else reading(verb, large)))
    assert (2 if verb == "plan" else 5, []) == (code, libraries)
    assert peak < MAX_RSS_BYTES


@pytest.mark.parametrize(
    "unit", [b"[],", b"{},", b"1,", b'"",', b'{"a":1},', b"99999999999999999999,"], ids=lambda unit: unit.decode()
)
@pytest.mark.slow
def test_memory_for_many_values(tmp_path: Path, unit: bytes) -> None:
    """Tests that a file just within the bound on its size costs bounded memory, whatever small values fill it."""
    path = tmp_path / "plan.json"
    begin = b'{"format_version": "0.1", "steps": ['
    path.write_bytes(begin + unit * ((MAX_FILE_BYTES - 100) // len(unit)) + b"1]}")
    code, peak, _ = probed("verify", path)
    assert code == 5
    assert peak < MAX_RSS_BYTES


def test_number_of_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that values are counted before they are parsed, and that brackets and commas in strings are none."""
    monkeypatch.setattr("spotserve.core.strict_json.MAX_VALUES", 10)
    assert parse(b'{"a": "[,,,,,,,,,,,\\",,,,,,]"}') == {"a": '[,,,,,,,,,,,",,,,,,]'}
    with pytest.raises(JsonFaultError, match="values and brackets exceed 10"):
        parse(b"[1,1,1,1,1,1,1,1,1,1,1]")


def test_strings_over_the_edge_of_what_is_measured(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Tests that measuring part by part counts the same, wherever a part ends: in a string, an escape, or a cut one."""
    whole = [rng.choices(b'"\\[,]a ', k=rng.randrange(60)) for _ in range(300)]
    texts = [bytes(text) for text in whole] + [b'["' + b'\\"' * 50 + b'", [1, 2]]', EXPECTED.read_bytes()[:3000]]
    outside = [b"".join(_without_strings(text)) for text in texts]
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr("spotserve.core.strict_json.MEASURED_BYTES", size)
        assert outside == [b"".join(_without_strings(text)) for text in texts]


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (b'{"a": [1, {"b": NaN}]}', "a[1].b"),
        (b'{"a": [1, {"b": 1, "b": 2}]}', "a[1]"),
        (b'{"a b": {"c": 1e999}}', '["a b"].c'),
        (b'{"a": {"c": 9007199254740993}}', "a.c"),
    ],
)
def test_where_strict_json_is_wrong(data: bytes, path: str) -> None:
    """Tests that what plain parsers let pass is refused with its path."""
    with pytest.raises(JsonFaultError) as caught:
        parse(data)
    assert path == caught.value.path


def test_largest_integer_passes() -> None:
    """Tests that every integer that all JSON readers hold exactly is read, and ordinary numbers of many digits."""
    assert [2**53, -(2**53), 0.1234567890123456] == parse(b"[9007199254740992, -9007199254740992, 0.1234567890123456]")


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**53,
    2**70,
    1e300,
    -0.5,
    "",
    "i0",
    "i0/0",
    "x" * 300,
    "\x1b[2J\n",
    [],
    {},
    [[]],
    [-1, 10**9],
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def spoiled(data: bytes, draw: random.Random) -> bytes:
    """A file with random bytes or random values in it."""
    if draw.random() < 0.3:
        out = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(out))
            choice = draw.randrange(4)
            if choice == 0:
                del out[at:]
                out += b" "
            elif choice == 1:
                out[at] = draw.randrange(256)
            elif choice == 2:
                del out[at : at + draw.randrange(1, 40)]
                out += b" "
            else:
                out[at:at] = out[at : at + draw.randrange(1, 200)]
        return bytes(out)
    document = json.loads(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        container, key = draw.choice(places(document))
        choice = draw.randrange(4)
        if choice == 0:
            del container[key]
        elif choice == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif choice == 2 and isinstance(container[key], int | float):
            container[key] = container[key] * draw.choice([-1, 0, 2, 1000])
        else:
            # A copy: a list that one try puts into another would be in all later ones, and at last in itself.
            container[key] = copy.deepcopy(draw.choice(VALUES))
        if not places(document):
            break
    return json.dumps(document).encode()


def fuzzed(said: Said, folder: Path, draw: random.Random, *, tries: int) -> None:
    """Spoil files of the cases and run verbs over them: an exit code of the contract, lines, never a traceback."""
    cases = [path for path in sorted(PLANS.iterdir()) if (path / "spec.toml").exists() and path.name != "opt-6.7b-t4"]
    cases = [path for path in cases if (path / "snapshot.json").stat().st_size < 20_000]
    for number in range(tries):
        chosen = draw.choice(cases)
        kind = draw.choice(["expected-plan.json", "snapshot.json", "event.json", "spec.json"])
        target = folder / str(number)
        shutil.copytree(chosen, target)
        spec = json.loads((chosen / "expected-plan.json").read_text())["spec"]
        (target / "spec.json").write_text(json.dumps(spec))
        (target / kind).write_bytes(spoiled((target / kind).read_bytes(), draw))
        if kind == "expected-plan.json":
            verb = draw.choice([verb for verb in PLAN_READERS if verb != "apply"])
            code, out, err = said(*reading(verb, target / kind))
            assert code in (0, 5), (target / kind, err)
        elif kind == "event.json":
            code, out, err = said("plan", target)
            assert code in (0, 2, 4), (target / kind, err)
        else:
            files = ("--spec", target / "spec.json", "--snapshot", target / "snapshot.json")
            code, out, err = said("plan", *files, "--lose", "i1", "--solver", "configure=enumerate")
            assert code in (0, 1, 2, 4), (target / kind, err)
        if code not in (0, 4):
            told = out if kind == "expected-plan.json" and out else err
            assert all(line.isprintable() for line in told.splitlines()), told
        shutil.rmtree(target)


def test_fuzzed_files(said: Said, tmp_path: Path, rng: random.Random) -> None:
    """Tests that no spoiled file of the cases brings a verb to a traceback or an exit code outside the contract."""
    fuzzed(said, tmp_path, rng, tries=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzzed_files_at_length(said: Said, tmp_path: Path, rng: random.Random) -> None:
    """Tests the same for thousands of them."""
    fuzzed(said, tmp_path, rng, tries=2000)
