"""The text of a choice is a fold over its tokens: independent of chunks, never half a character or half a stop."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from spotserve.api.text import ChoiceText, Detokenizer, Joint, StopJudge, visible_text
from spotserve.api.tokenizer import TextCodec
from tests.api.folder import EOS, byte_level_tokenizer, metaspace_tokenizer

BYTE_LEVEL = TextCodec(byte_level_tokenizer(), eos_token_ids=(EOS,), template=None)
METASPACE = TextCodec(metaspace_tokenizer(), eos_token_ids=(2,), template=None)
CODECS = {"byte_level": BYTE_LEVEL, "metaspace": METASPACE}

token_lists = st.lists(st.integers(0, 330), max_size=60)
stop_lists = st.lists(st.text("abe hotö🙂\ufffd", min_size=1, max_size=4), max_size=4)


def in_chunks(token_ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The list cut at these places."""
    places = sorted({min(cut, len(token_ids)) for cut in cuts})
    return [token_ids[low:high] for low, high in zip([0, *places], [*places, len(token_ids)], strict=True)]


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(max_examples=150, deadline=None)
@given(token_ids=token_lists, stops=stop_lists, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_chunking_streams_the_same_text(name: str, token_ids: list[int], stops: list[str], cuts: list[int]) -> None:
    """Tests that streamed pieces add up to the non-streamed text, and that nothing shown is taken back."""
    codec = CODECS[name]
    whole = visible_text(codec, token_ids, stops, closed=True)
    text, shown = ChoiceText(codec, stops), ""
    for chunk in in_chunks(token_ids, cuts):
        shown += text.push(chunk)
        assert whole.startswith(shown)
    assert whole == shown + text.close()


@settings(max_examples=200, deadline=None)
@given(token_ids=token_lists)
def test_byte_level_text_equals_the_tokenizers(token_ids: list[int]) -> None:
    """Tests that the fold gives what decoding all tokens at once gives, broken bytes included."""
    visible = [token_id for token_id in token_ids if not BYTE_LEVEL.hidden(token_id)]
    assert BYTE_LEVEL.decode(visible) == visible_text(BYTE_LEVEL, token_ids, (), closed=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text("abcdefgh 🙂ß東", max_size=30))
def test_metaspace_text_round_trips(text: str) -> None:
    """Tests that byte fallback and the stripped leading space survive token by token decoding."""
    token_ids = METASPACE.encode(text)
    assert METASPACE.decode(token_ids) == visible_text(METASPACE, token_ids, (), closed=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text("abcdefgh 🙂ß東", max_size=30), cut=st.integers(0, 60))
def test_a_text_goes_on_where_another_ended(text: str, cut: int) -> None:
    """Tests that the space that decoding strips from a text's first token comes back behind another text."""
    token_ids = METASPACE.encode(text)
    before, after = token_ids[:cut], token_ids[cut:]
    ends = [visible_text(METASPACE, part, (), closed=True) for part in (before, after)]
    joint = Joint(METASPACE, before)
    between = "".join(map(joint.push, after))
    whole = METASPACE.decode(token_ids)
    # Where the cut lies within a character, each text has its own half of it.
    expected = whole if "\ufffd" not in "".join(ends) else between.join(ends)
    assert expected == between.join(ends)
    assert between in ("", " ")


def test_nothing_lies_between_texts_that_strip_nothing() -> None:
    """Tests that no decoder's text but one that strips gets anything put before it, nor one that follows nothing."""
    token_ids = METASPACE.encode("a b", add_special_tokens=False)
    assert ["", "", ""] == list(map(Joint(METASPACE, ()).push, [1, *token_ids[:2]]))
    assert ["", ""] == list(map(Joint(METASPACE, (1,)).push, token_ids[:2]))
    assert ["", " ", ""] == list(map(Joint(METASPACE, (*token_ids, 1)).push, [1, *token_ids[:2]]))
    for first in range(330):
        assert all("" == Joint(BYTE_LEVEL, (first,)).push(second) for second in range(0, 330, 7))


def test_a_split_character_waits() -> None:
    """Tests that no piece of a multi-byte character is shown before its last byte."""
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    token_ids = [tokenizer.token_to_id(piece) for piece in ("ð", "Ł", "Ļ", "Ģ")]
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert ["", "", "", "\U0001f640"] == [detokenizer.push(token_id) for token_id in token_ids]


def test_long_runs_of_broken_bytes_are_let_go() -> None:
    """Tests that broken bytes cannot make the detokeniser carry an ever longer tail."""
    token = next(index for index in range(4, 260) if BYTE_LEVEL.decode([index]) == "\ufffd")
    detokenizer = Detokenizer(BYTE_LEVEL)
    text = "".join(detokenizer.push(token) for _ in range(500))
    assert len(detokenizer._pending) <= 40
    assert text + detokenizer.finish() == BYTE_LEVEL.decode([token] * 500)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["quick"], "the "),
        (["quick", "the"], ""),
        (["brown fox jumps over"], "the quick "),
        (["zzz", "k b"], "the quic"),
        (["dogs"], "the quick brown fox jumps over the lazy dog"),
    ],
)
def test_text_ends_at_the_earliest_stop(stops: list[str], expected: str) -> None:
    """Tests where stop strings cut, and that a stop that never completes holds nothing back at the end."""
    token_ids = BYTE_LEVEL.encode("the quick brown fox jumps over the lazy dog", add_special_tokens=False)
    assert expected == visible_text(BYTE_LEVEL, token_ids, stops, closed=True)


def test_a_possible_stop_is_held_back() -> None:
    """Tests that the beginning of a stop string is not shown while it may still become one."""
    text = ChoiceText(BYTE_LEVEL, ["abX"])
    letters = {letter: BYTE_LEVEL.encode(letter, add_special_tokens=False) for letter in "abcX"}
    assert ["", "", "abc"] == [text.push(letters[letter]) for letter in "abc"]
    assert ["", "", ""] == [text.push(letters[letter]) for letter in "abX"]
    assert (True, "") == (text.stopped, text.close())


@settings(max_examples=100, deadline=None)
@given(token_ids=token_lists, stops=stop_lists, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_the_judge_keeps_the_completing_token(token_ids: list[int], stops: list[str], cuts: list[int]) -> None:
    """Tests that the ledger closes a choice at the same token whatever commits it saw, and that the text agrees."""
    scan = ChoiceText(BYTE_LEVEL, stops)
    scan.push(token_ids)
    expected = token_ids[: scan.num_tokens] if scan.stopped else token_ids
    judge, stored = StopJudge(BYTE_LEVEL), []
    for chunk in in_chunks(token_ids, cuts):
        kept = judge(stops, stored, chunk)
        stored = stored + (chunk if kept is None else chunk[:kept])
        if kept is not None:
            break
    assert expected == stored
    assert visible_text(BYTE_LEVEL, token_ids, stops, closed=True) == visible_text(
        BYTE_LEVEL, stored, stops, closed=True
    )


def test_the_judge_remembers_nothing_it_needs() -> None:
    """Tests that a fresh judge, as after a restart, judges like one that saw every commit."""
    generator = random.Random(7)
    stops = ("the", "og")
    for _ in range(30):
        token_ids = [generator.randrange(4, 320) for _ in range(40)]
        at, judge = generator.randrange(40), StopJudge(BYTE_LEVEL)
        if judge(stops, (), token_ids[:at]) is None:
            assert StopJudge(BYTE_LEVEL)(stops, token_ids[:at], token_ids[at:]) == judge(
                stops, token_ids[:at], token_ids[at:]
            )


@settings(max_examples=200, deadline=None)
@given(
    token_ids=token_lists,
    stops=stop_lists,
    cuts=st.lists(st.integers(0, 60), max_size=8),
    min_tokens=st.integers(0, 60),
)
def test_a_stop_string_counts_behind_the_least_tokens(
    token_ids: list[int], stops: list[str], cuts: list[int], min_tokens: int
) -> None:
    """Tests against a search of the whole text that a stop string ends a choice iff a later token completes it."""
    plain, ends, text = ChoiceText(BYTE_LEVEL), [], ""
    for token_id in token_ids:
        text += plain.push([token_id])
        ends.append(len(text))
    floor = ends[min_tokens - 1] if 0 < min_tokens <= len(ends) else 0
    stopped_at = next(
        (
            count
            for count in range(min_tokens + 1, len(ends) + 1)
            for stop in stops
            if text[: ends[count - 1]].find(stop, max(0, floor - len(stop) + 1)) >= 0
        ),
        None,
    )
    judge, stored = StopJudge(BYTE_LEVEL), list[int]()
    for chunk in in_chunks(token_ids, cuts):
        kept = judge(stops, stored, chunk, min_tokens)
        stored += chunk if kept is None else chunk[:kept]
        if kept is not None:
            break
    assert token_ids[:stopped_at] == stored
    shown = visible_text(BYTE_LEVEL, stored, stops, closed=stopped_at is not None, min_tokens=min_tokens)
    assert text.startswith(shown)
    if stopped_at is not None:
        assert any(text.startswith(stop, len(shown)) for stop in stops)


def test_a_stop_string_that_came_too_early_stays_text() -> None:
    """Tests that one held back beside a longer stop string does not end the choice when its letters are let go."""
    letters = [BYTE_LEVEL.encode(letter, add_special_tokens=False)[0] for letter in "abcxbc"]
    text = ChoiceText(BYTE_LEVEL, ["bc", "abcd"], min_tokens=3)
    assert ["", "", "", "abcx", "", ""] == [text.push([letter]) for letter in letters]
    assert (True, 6) == (text.stopped, text.num_tokens)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_characters_bytes_over_tokens(name: str) -> None:
    """Tests that token bytes put together are the bytes of the text, whatever characters lie across tokens."""
    codec = CODECS[name]
    for text in ("grüße 東京 🙂🙃", "naïve e\u0301 👩‍👩‍👧 \u200f", "ab cd"):
        token_ids = codec.encode(text, add_special_tokens=False)
        data = b"".join(codec.token_bytes(token_id) or b"" for token_id in token_ids)
        # A Metaspace tokenizer puts a space in front, which decoding takes away.
        assert text == data.decode().removeprefix(" " if name == "metaspace" else "")
    assert codec.token_bytes(10_000) is None
    assert b"<s>" == codec.token_bytes(0 if name == "byte_level" else 1)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("e\u0301ß東🙂👩\u200d", max_size=12),
    stop=st.text("e\u0301ß東🙂👩", max_size=3),
    cut=st.integers(0, 60),
)
def test_a_restart_within_a_character(text: str, stop: str, cut: int) -> None:
    """Tests that a cut anywhere, between the bytes of one character too, is seen neither by judge nor by text."""
    token_ids = list(BYTE_LEVEL.encode(text, add_special_tokens=False))
    stops = [stop] if stop else []
    whole = ChoiceText(BYTE_LEVEL, stops)
    whole.push(token_ids)
    kept = StopJudge(BYTE_LEVEL)(stops, token_ids[:cut], token_ids[cut:])
    early = ChoiceText(BYTE_LEVEL, stops)
    early.push(token_ids[:cut])
    if early.stopped:
        return  # The ledger would have closed it before the cut.
    assert whole.stopped == (kept is not None)
    if kept is not None:
        assert whole.num_tokens == len(token_ids[:cut]) + kept
    if stops and stop in text:
        assert whole.stopped
        assert text[: text.find(stop)] == visible_text(BYTE_LEVEL, token_ids, stops, closed=True)
