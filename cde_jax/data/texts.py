"""Texts: what counts as one, when two are equal, and lists of them."""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Set
from typing import Any

_BLANK = {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"}  # Unicode categories: spaces, control, zero-width, lone surrogates


class _Folding(dict):
    """A `str.translate` table that fills itself: punctuation and space become a space, symbols stand alone."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "PZC" or category in ("Sk", "So"):
            folded = " "
        elif category[0] == "S":  # + < = $: "C" and "C++" differ, "a=b" and "a = b" do not
            folded = f" {character} "
        else:
            folded = character
        self[code] = folded
        return folded


_FOLDING = _Folding()


def text_key(text: str) -> int:
    """A 64-bit key of the text with case, white space and punctuation folded: texts with equal keys are duplicates.

    Letters, marks, digits and mathematical symbols count; a text of punctuation alone is compared as it is.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_FOLDING).split())
    digest = hashlib.blake2b((folded or text.strip()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def has_text(text: str) -> bool:
    """Whether there is any character but spaces, control and zero-width characters."""
    return any(unicodedata.category(character) not in _BLANK for character in text)


def as_list(values: Any, name: str, kinds: type | tuple[type, ...] = str) -> list[Any]:
    """`values` as a list of texts (or other `kinds`). ValueError for a single text, a set, a mapping or other items."""
    if isinstance(values, str | bytes):
        raise ValueError(f"{name}: expected a list of texts, got a single one, {values!r:.60}; write [text]")
    if isinstance(values, Set | Mapping):
        raise ValueError(
            f"{name}: expected a list of texts, got a {type(values).__name__}, whose order is arbitrary; give a list, "
            "for example sorted(…)"
        )
    if not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list of texts, got {type(values).__name__}")
    values = list(values)
    for number, value in enumerate(values):
        if not isinstance(value, kinds):
            raise ValueError(
                f"{name}: expected a list of texts, got {type(value).__name__} as item {number}: {value!r:.60}"
            )
    return values
