"""Token ids to text, a token at a time: the pieces joined are exactly what decoding all the ids at once gives.

A piece is held back while a later token could still change it: an unfinished UTF-8 character, a run of SentencePiece
byte tokens, text that may become a stop string. `finish` gives what is left.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WINDOW = 64  # tokens that the decoder of last resort keeps
OVERLAP = 16  # of them, kept when the window moves


class Pieces(Protocol):
    """Token strings in, as the vocabulary has them; text out."""

    def push(self, token: str) -> str:
        """What can be said for certain now that `token` has come."""
        ...

    def finish(self) -> str:
        """The rest."""
        ...


class ByteLevelPieces:
    """GPT-2's byte-level BPE: each character of a token stands for one byte, and the bytes are UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        """The characters that the token's bytes complete."""
        table = _byte_of_char()
        try:
            data = bytes([table[c] for c in token])
        except KeyError:  # an added token with characters outside the alphabet stands for itself
            data = token.encode()
        return self._utf8.decode(data)

    def finish(self) -> str:
        """One replacement character if a character was left unfinished."""
        return self._utf8.decode(b"", final=True)


class FusedPieces:
    """SentencePiece as `tokenizers` has it: Replace, ByteFallback, Fuse, Strip.

    A run of byte tokens decodes as a whole or not at all, so it is held until a token of another kind ends it.
    """

    def __init__(self, replace: Sequence[tuple[str, str]], byte_fallback: bool, strip: tuple[str, int]) -> None:
        self._replace = replace
        self._byte_fallback = byte_fallback
        self._strip, self._strip_left = strip  # a character, and how many of it the text still loses at its start
        self._run = bytearray()

    def push(self, token: str) -> str:
        """The token's text, and the byte run that it ends."""
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and (byte := _fallback_byte(token)) is not None:
            self._run.append(byte)
            return ""
        return self._lstrip(self._end_run() + token)

    def finish(self) -> str:
        """The byte run at the end."""
        return self._lstrip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _lstrip(self, text: str) -> str:
        cut = 0
        while self._strip_left and cut < len(text):
            if text[cut] != self._strip:
                self._strip_left = 0
                break
            self._strip_left -= 1
            cut += 1
        return text[cut:]


class WindowPieces:
    """Any other decoder: decodes the last tokens again with each new one, and says what no longer changes.

    Exact for decoders where a token changes at most the text next to it, as those of BERT, T5 and GPT-1.
    """

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._tokens: list[str] = []
        self._text = ""  # of the window
        self._said = 0  # characters of it

    def push(self, token: str) -> str:
        """What the window's text has in common with and without the token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        stable = _common_prefix(self._text, text)
        piece = text[self._said : stable]
        self._text, self._said = text, max(self._said, stable)
        if len(self._tokens) > WINDOW:
            self._move()
        return piece

    def finish(self) -> str:
        """The window's text that was held back."""
        return self._text[self._said :]

    def _move(self) -> None:
        tokens = self._tokens[-OVERLAP:]
        text = self._decode(tokens)
        held = len(self._text) - self._said
        if held <= len(text) and self._text.endswith(text.lstrip(" ")):
            self._tokens, self._text, self._said = tokens, text, len(text) - held


class Detokenizer:
    """The text of one sequence, as its tokens come. Not thread-safe; one per sequence."""

    def __init__(self, backend: Backend, pieces: Pieces, skip: Iterable[int] = ()) -> None:
        self._backend = backend
        self._pieces = pieces
        self._skip = frozenset(skip)

    def push(self, token_id: int) -> str:
        """The text that is certain now; often "", when a character is unfinished."""
        if token_id in self._skip:
            return ""
        token = self._backend.id_to_token(token_id)
        return "" if token is None else self._pieces.push(token)  # models have padding ids that stand for nothing

    def finish(self) -> str:
        """The text that was held back; call it once, at the end."""
        return self._pieces.finish()


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces, and never lets part of one through.

    The string that is complete first wins; of two that end together, the longer. How the text is cut into pieces
    makes no difference. One Knuth-Morris-Pratt automaton per string: a character costs constant time.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._failure = [_failure(s) for s in self._strings]
        self._matched = [0] * len(self._strings)  # how much of each the text so far ends with
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string if it is complete; push nothing after one is."""
        if not self._strings:
            return text, None
        whole = self._held + text
        for i, char in enumerate(text):
            for s, string in enumerate(self._strings):
                j = self._matched[s]
                while j and string[j] != char:
                    j = self._failure[s][j - 1]
                j += string[j] == char
                if j == len(string):
                    end = len(self._held) + i + 1
                    self._held = ""
                    return whole[: end if self._include else end - len(string)], string
                self._matched[s] = j
        shown = len(whole) - max(self._matched)
        self._held = whole[shown:]
        return whole[:shown], None

    def finish(self) -> str:
        """The text that was held back because it began like a stop string."""
        held, self._held = self._held, ""
        return held


def pieces_factory(backend: Backend) -> Callable[[], Pieces]:
    """Makes the incremental twin of the tokenizer's decoder, a new one for each sequence."""
    decoder = backend.decoder
    if decoder is None:
        return lambda: WindowPieces(" ".join)
    spec = json.loads(decoder.__getstate__())
    if spec["type"] == "ByteLevel":
        return ByteLevelPieces
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    if [s["type"] for s in steps] == ["ByteLevel"]:
        return ByteLevelPieces
    if (fused := _fused(steps)) is not None:
        return lambda: FusedPieces(*fused)
    return lambda: WindowPieces(decoder.decode)


def _fused(steps: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], bool, tuple[str, int]] | None:
    """The arguments of FusedPieces for a decoder, or None if it is of another form."""
    steps = list(steps)
    replace = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replace.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(steps) and steps[0]["type"] == "ByteFallback"
    if byte_fallback:
        steps.pop(0)
    if not steps or steps.pop(0)["type"] != "Fuse":
        return None
    match steps:
        case []:
            return replace, byte_fallback, ("", 0)
        case [{"type": "Strip", "content": content, "start": start, "stop": 0}]:
            return replace, byte_fallback, (content, start)
    return None


def _fallback_byte(token: str) -> int | None:
    """The byte that a token like <0x0A> stands for."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _failure(string: str) -> list[int]:
    """Knuth-Morris-Pratt: of each prefix of `string`, how long its longest proper prefix is that is a suffix too."""
    table = [0] * len(string)
    j = 0
    for i in range(1, len(string)):
        while j and string[i] != string[j]:
            j = table[j - 1]
        j += string[i] == string[j]
        table[i] = j
    return table


def _common_prefix(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
