import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.run.tiny import byte_level, other_kinds, sentencepiece, smollm2  # noqa: F401
from trtllm_cli.run.detokenizer import REPLACEMENT, WINDOW, Detokenizer, StopStrings, WindowPieces, pieces_factory
from trtllm_cli.run.tokenizer import Tokenizer

KINDS = {"byte_level": byte_level(), "sentencepiece": sentencepiece(), **other_kinds()}


def pieces(backend, ids, skip_special_tokens=True):
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    detokenizer = Detokenizer(backend, pieces_factory(backend)(), special if skip_special_tokens else ())
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_joined_are_what_decode_gives(kind, data, skip):
    backend = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 3), max_size=40))
    assert "".join(pieces(backend, ids, skip)) == backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", other_kinds())
def test_the_last_resort_stays_exact_when_its_window_moves(kind):
    backend = KINDS[kind]
    ids = [(i * 7 + i // 5) % backend.get_vocab_size() for i in range(5 * WINDOW)]
    assert "".join(pieces(backend, ids)) == backend.decode(ids)


def test_the_last_resort_decodes_a_bounded_number_of_tokens_each_time():
    lengths = []
    window = WindowPieces(lambda tokens: lengths.append(len(tokens)) or " ".join(tokens))
    for i in range(1000):
        window.push(f"t{i}")
    assert max(lengths) <= WINDOW + 1


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=15))
def test_valid_text_never_shows_a_replacement_character(kind, text):
    if REPLACEMENT in text:
        return
    backend = KINDS[kind]
    ids = backend.encode(text, add_special_tokens=False).ids
    joined = ""
    for piece in pieces(backend, ids, skip_special_tokens=False):
        assert REPLACEMENT not in piece
        joined += piece
    assert joined == backend.decode(ids, skip_special_tokens=False)


def test_a_character_comes_with_its_last_byte():
    backend = KINDS["byte_level"]
    assert pieces(backend, backend.encode("🙂!").ids) == ["", "", "", "🙂", "!", ""]


def test_an_unfinished_character_comes_at_the_end():
    backend = KINDS["byte_level"]
    assert pieces(backend, backend.encode("🙂").ids[:3]) == ["", "", "", REPLACEMENT]


def test_a_byte_run_decodes_as_a_whole_or_not_at_all():
    backend = KINDS["sentencepiece"]
    run = [backend.token_to_id(f"<0x{b:02X}>") for b in "é".encode()]
    a = backend.token_to_id("a")
    assert pieces(backend, [*run, a]) == ["", "", "éa", ""]
    broken = [*run, run[0], a]
    assert "".join(pieces(backend, broken)) == backend.decode(broken) == REPLACEMENT * 3 + "a"


def test_sentencepiece_loses_one_leading_space_only():
    backend = KINDS["sentencepiece"]
    word = backend.token_to_id("▁a")
    assert pieces(backend, [backend.token_to_id("<s>"), word, word]) == ["", "a", " a", ""]


@pytest.mark.real_model
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=60), skip=st.booleans())
def test_a_real_vocabulary_in_any_order(smollm2, ids, skip):  # noqa: F811
    tokenizer = _load(smollm2)
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    joined = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    assert joined == tokenizer.decode(ids, skip_special_tokens=skip)


@functools.cache
def _load(directory):
    return Tokenizer.load(directory)


def stop_in(chunks, strings, **options):
    stops = StopStrings(strings, **options)
    shown = ""
    for chunk in chunks:
        text, found = stops.push(chunk)
        shown += text
        if found is not None:
            return shown, found
    return shown + stops.finish(), None


def slow_stop(text, strings, include=False):
    """The same by definition: the first end at which a stop string is complete, the longest of those."""
    for end in range(len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.text("ab\n", max_size=4), max_size=12),
    strings=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_stop_strings_are_found_however_the_text_is_cut(chunks, strings, include):
    assert stop_in(chunks, strings, include=include) == slow_stop("".join(chunks), strings, include)


def test_nothing_that_could_become_a_stop_string_is_shown():
    stops = StopStrings(["\n\nUser:"])
    assert stops.push("Fine.\n") == ("Fine.", None)
    assert stops.push("\nUs") == ("", None)
    assert stops.push("ually") == ("\n\nUsually", None)
    assert stops.push("\n\nUser: hi") == ("", "\n\nUser:")


def test_text_is_held_no_longer_than_it_must_be():
    stops = StopStrings(["aab"])
    assert stops.push("aaa") == ("a", None)
    assert stops.finish() == "aa"
