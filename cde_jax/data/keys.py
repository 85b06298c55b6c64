"""When texts count as equal: a 64-bit key of the text with case, white space and punctuation folded."""

import hashlib
import unicodedata

import numpy as np
from jaxtyping import UInt64

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, TAOCP vol. 3, section 6.4); any odd number would do


class _Fold(dict):
    """A `str.translate` table that fills itself: punctuation and space fold to a space, signs stand alone."""

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


_FOLD = _Fold()


def text_key(text: str) -> int:
    """A 64-bit key of the text with case, white space and punctuation folded: equal keys are "equal texts".

    Letters, marks, digits and mathematical signs count; a text of punctuation alone is its own key.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_FOLD).split())
    digest = hashlib.blake2b((folded or text.strip()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def fold(left: UInt64[np.ndarray, "n"], right: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """One 64-bit key of two, left · odd + right mod 2^64.

    Two pairs that share one side never collide. Others, of digests, do with probability 2^-64: among n rows about
    n²/2^65 collisions, 3·10^-4 at 100 million rows.
    """
    return left * _ODD + right
