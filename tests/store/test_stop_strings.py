"""Stop strings over real characters: one generation begins them, a restart lies between, another one completes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spotserve.api.choice import whole_choice
from spotserve.api.text import StopJudge
from spotserve.api.tokenizer import TextCodec
from spotserve.core.ids import RequestId
from spotserve.store.ledger import Ledger, Owner
from tests.api.folder import byte_level_tokenizer
from tests.store.conftest import R1, R2, TIMEOUT_S, new_request, run_of

CODEC = TextCodec(byte_level_tokenizer(), eos_token_ids=(1,), template=None)
TEXT = "aé東👩\u200d👩ö e\u0301 stop 東🙃京 more"


@pytest.mark.parametrize("stop", ["stop", "東🙃京", "👩\u200d👩", "e\u0301 ", "\u0301", "🙃", "é", "no such"])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_cut_anywhere_changes_nothing(open_ledger: Callable[..., Ledger], stop: str, restarts: bool) -> None:
    """Tests every cut of a text between two generations, within characters and within the stop string too."""
    token_ids = CODEC.encode(TEXT, add_special_tokens=False)
    cuts = range(len(token_ids) + 1)
    ledger = open_ledger(judge=StopJudge(CODEC))
    names = [RequestId(f"q{cut}") for cut in cuts]
    ledger.accept([new_request(name, stop=(stop,)) for name in names])
    ledger.set_owners(dict.fromkeys(names, Owner(R1, 1)))
    ledger.append(R1, 1, [run_of(name, 0, *token_ids[:cut]) for name, cut in zip(names, cuts, strict=True) if cut])
    ledger.flush().result(TIMEOUT_S)
    if restarts:
        ledger.shutdown()
        ledger = open_ledger(judge=StopJudge(CODEC))
    ledger.set_owners(dict.fromkeys(names, Owner(R2, 2)))
    rest = [run_of(name, cut, *token_ids[cut:]) for name, cut in zip(names, cuts, strict=True)]
    # One token at a time, as a leader says them.
    for run in rest:
        for at, token_id in enumerate(run.token_ids):
            ledger.append(R2, 2, [run_of(run.request, run.position + at, token_id)])
    ledger.flush().result(TIMEOUT_S)
    views = [ledger.view(name) for name in names]
    (whole,) = {(view.choices[0].token_ids, view.choices[0].finish_reason) for view in views if view is not None}
    (text,) = {whole_choice(view, CODEC, 0)[0] for view in views if view is not None}
    expected = TEXT.partition(stop)[0] if stop in TEXT else TEXT
    assert (expected, "stop" if stop in TEXT else None) == (text, whole[1])
    assert CODEC.decode(whole[0]).startswith(expected + (stop if stop in TEXT else ""))
