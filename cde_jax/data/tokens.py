"""Texts and their tokens: what counts as a text, and the tokenizer.

A `Tokenizer` turns texts into int32 ids with the model's own first and last special tokens ([CLS] … [SEP] for
BERT). It is saved as the files that `transformers.AutoTokenizer` reads, so that an export needs nothing else.
`tokenizers` is imported inside functions: a bare accelerator image, which handles token ids only, lacks it.
"""

import hashlib
import json
import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from cde_jax.data.files import fingerprint, given_path, read_json, write_json

SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
LONGEST_WORD = 1000  # characters; longer ones are no words, and training takes a time quadratic in the length
MOST_TOKENS = 2**24  # of a vocabulary: the trainer reserves memory for all of them
_ALPHABET = 1000  # characters that get a token of their own in a trained vocabulary; rarer ones are [UNK]
_SPACES = {ord(space): " " for space in "\t\n\r"}  # that BERT's normalizer takes for spaces
_MOST_WORDS = 2**20  # different ones whose ids are kept
_TEXTS = 4096  # texts whose characters are counted at a time
_SPECIALS_FILES = ("special_tokens_map.json", "tokenizer_config.json")
_log = logging.getLogger(__name__)
_BLANK = {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs"}  # Unicode categories: spaces, control, zero-width, lone surrogates


class _Folding(dict):
    """A `str.translate` table that fills itself: punctuation and space become a space, symbols stand alone."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "PZC" or category in ("Sk", "So"):
            character = " "
        elif category[0] == "S":  # + < = $: "C" and "C++" differ, "a=b" and "a = b" do not
            character = f" {character} "
        return self.setdefault(code, character)


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
    items = list(values) if isinstance(values, Iterable) else []
    wrong = next((number for number, item in enumerate(items) if not isinstance(item, kinds)), None)
    if isinstance(values, str | bytes):
        problem = f"a single one, {values!r:.60}; write [text]"
    elif isinstance(values, Set | Mapping):
        problem = f"a {type(values).__name__}, whose order is arbitrary; give a list, for example sorted(…)"
    elif not isinstance(values, Iterable):
        problem = type(values).__name__
    elif wrong is not None:
        problem = f"{type(items[wrong]).__name__} as item {wrong}: {items[wrong]!r:.60}"
    else:
        return items
    raise ValueError(f"{name}: expected a list of texts, got {problem}")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the names of its special tokens. `specials` has at least "pad_token"."""

    def __init__(self, backend: "tokenizers.Tokenizer", specials: dict[str, str]):
        # Any setting kept in the file would act on every call: lengths are given call by call here.
        backend.no_truncation()
        backend.no_padding()
        pad = specials.get("pad_token")
        if pad is None or backend.token_to_id(pad) is None:
            raise ValueError(f"expected a tokenizer with a padding token, got {specials}; use an encoder's tokenizer")
        self.backend = backend
        self.specials = dict(specials)
        self.pad_id = backend.token_to_id(pad)
        self.unknown_id = backend.token_to_id(specials["unk_token"]) if "unk_token" in specials else None
        sample = backend.encode("a")
        marks = sample.special_tokens_mask
        self._before = next((i for i, mark in enumerate(marks) if not mark), len(marks))
        self._after = next((i for i, mark in enumerate(reversed(marks)) if not mark), len(marks))
        self._ends = sample.ids[: self._before], sample.ids[len(marks) - self._after :]  # of every text
        self._words: dict[str, list[int]] = {}  # ids of what stands between spaces
        self._word_by_word = _is_bert(backend)

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Tokenizer":
        """A folder with tokenizer.json, or the name of a repository on the Hugging Face hub that has one.

        Raises ValueError if there is neither, for example because the name needs a network and there is none.
        """
        folder = given_path(name_or_path, "tokenizer")
        if not (folder / "tokenizer.json").exists():
            if isinstance(name_or_path, Path) or len(folder.parts) > 2:  # no name on a hub
                problem = "expected a folder with tokenizer.json, there is none; it was moved or deleted"
                raise ValueError(f"{folder}: {problem}")
            folder = _download(str(name_or_path))
        backend = read_backend(folder)
        return cls(backend, _specials_of_folder(folder, backend))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A lower-case BERT WordPiece trained on `texts`; the same texts give the same vocabulary.

        The library alone does not: it numbers the pieces "##c" in the order of a randomised hash map, and ties
        between merges are broken by number. So the alphabet and its "##" pieces are given to it in a fixed order.
        The texts are gone through twice; an iterator, which can be only once, is held in memory.

        Raises ValueError for a vocabulary without room for anything but single characters, or larger than 2^24.
        """
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers, trainers

        if vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size {vocab_size}: expected at most {MOST_TOKENS} (usual are 8,000 to 250,000)")
        if isinstance(texts, str | list | tuple | set | frozenset | dict):
            texts = as_list(texts, "texts")
        texts = list(texts) if isinstance(texts, Iterator) else texts
        normalizer, pieces = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        counts = _count_characters(texts, normalizer.normalize_str)
        alphabet = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:_ALPHABET]
        smallest = len(SPECIALS) + 2 * len(alphabet)
        if not alphabet or vocab_size <= smallest:
            raise ValueError(
                f"vocab_size {vocab_size}: texts of {len(alphabet)} different characters need more than {smallest}; "
                "give more text or a larger vocabulary"
            )
        if vocab_size < 2 * smallest:
            _log.warning(
                "vocab_size %d is small for these texts: %d tokens are single characters, %d are left for words and "
                "their parts; texts become long sequences. Use %d or more",
                *(vocab_size, smallest, vocab_size - smallest, 10 * smallest),
            )
        model = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIALS["unk_token"]))
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fixed = [*SPECIALS.values(), *sorted(alphabet), *(f"##{c}" for c in sorted(alphabet))]
        settings = {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet), "show_progress": False}
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, **settings)
        model.train_from_iterator(_words(texts, normalizer, pieces), trainer)
        return cls(_bert(model.get_vocab()), SPECIALS)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included (one more than the largest id)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the ids."""
        return fingerprint([json.loads(self.backend.to_str()), self.specials])

    def encode(self, texts: Iterable[str], max_length: int) -> list[Int32[np.ndarray, "_"]]:
        """Ids of each text, at most max_length, with the special tokens; what is cut is the text's end."""
        return self.encode_counted(texts, max_length)[0]

    def encode_counted(
        self, texts: Iterable[str], max_length: int
    ) -> tuple[list[Int32[np.ndarray, "_"]], Int64[np.ndarray, "n"]]:
        """As `encode`, and the lengths before cutting. A single text or a set of texts is a ValueError."""
        if max_length <= self._before + self._after:
            specials = self._before + self._after
            raise ValueError(f"max_length {max_length}: expected more than the {specials} special tokens")
        rows = self._encode_whole(as_list(texts, "texts"))
        lengths = np.array([len(ids) for ids in rows], np.int64)
        for i in np.flatnonzero(lengths > max_length):
            rows[i] = np.concatenate([rows[i][: max_length - self._after], rows[i][lengths[i] - self._after :]])
        return rows, lengths

    def _encode_whole(self, texts: list[str]) -> list[Int32[np.ndarray, "_"]]:
        """Ids of each text. Where words are encoded each by itself, the library gets each different one once."""
        if not self._word_by_word:
            return [np.array(encoding.ids, np.int32) for encoding in self.backend.encode_batch_fast(texts)]
        split = [text.translate(_SPACES).split(" ") for text in texts]
        if missing := set().union(*split) - self._words.keys():
            if len(self._words) + len(missing) > _MOST_WORDS:
                self._words.clear()
                missing = set().union(*split)
            words = list(missing)
            encodings = self.backend.encode_batch_fast(words, add_special_tokens=False)
            self._words.update(zip(words, (encoding.ids for encoding in encodings), strict=True))
        first, last = self._ends
        ids = (chain(first, chain.from_iterable(map(self._words.__getitem__, words)), last) for words in split)
        return [np.fromiter(each, np.int32) for each in ids]

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; `load` and `AutoTokenizer` read the same tokenizer."""
        directory = Path(directory)
        write_json(directory / "tokenizer.json", json.loads(self.backend.to_str()))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials}
        write_json(directory / "tokenizer_config.json", config)


def _is_bert(backend: "tokenizers.Tokenizer") -> bool:
    """Whether it encodes what stands between spaces without regard to its surroundings: BERT's WordPiece does."""
    parts = json.loads(backend.to_str())
    kinds = [(parts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    whole = all(content.split() == [content] for content in added)
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and parts["normalizer"]["clean_text"] and whole


def _words(texts: Iterable[str], normalizer: Any, pieces: Any) -> Iterator[str]:
    """Each text as its normalised words with spaces between them; overlong ones are left out.

    What stands between two spaces gives the same words anywhere, so each different one is normalised once.
    """
    texts, known = iter(texts), {}
    while block := [text.translate(_SPACES).split(" ") for text in islice(texts, _TEXTS)]:
        missing = set().union(*block) - known.keys()
        if len(known) + len(missing) > _MOST_WORDS:
            known.clear()
            missing = set().union(*block)
        for part in missing:
            words = (word for word, _ in pieces.pre_tokenize_str(normalizer.normalize_str(part)))
            known[part] = " ".join(word for word in words if len(word) <= LONGEST_WORD)
        for parts in block:
            yield " ".join(map(known.__getitem__, parts))


def _count_characters(texts: Iterable[str], normalize: Callable[[str], str]) -> Counter[str]:
    """How often each character occurs in the normalised texts; BERT's normalizer acts on each character by itself."""
    texts, totals = iter(texts), np.zeros(sys.maxunicode + 1, np.int64)
    while block := "".join(islice(texts, _TEXTS)):
        codes = np.frombuffer(block.encode("utf-32-le", "surrogatepass"), np.uint32)
        count = np.bincount(codes)
        totals[: len(count)] += count
    counts: Counter[str] = Counter()
    for code in np.flatnonzero(totals).tolist():
        for character in normalize(chr(code)):
            counts[character] += int(totals[code])
    return counts


def read_backend(folder: Path) -> "tokenizers.Tokenizer":
    """The library's tokenizer of `folder`/tokenizer.json; a ValueError for any other content."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error}); write it again") from None


def _bert(vocabulary: dict[str, int]) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIALS["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(SPECIALS.values()))
    cls_token, sep_token = SPECIALS["cls_token"], SPECIALS["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls_token} $A {sep_token}",
        pair=f"{cls_token} $A {sep_token} $B:1 {sep_token}:1",
        special_tokens=[(token, vocabulary[token]) for token in (cls_token, sep_token)],
    )
    return backend


def _download(name: str) -> Path:
    """The folder of a hub repository's tokenizer files, in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["tokenizer.json", *_SPECIALS_FILES]))
    except Exception as error:  # hub, connection and naming errors share no base class
        reason = next(iter(str(error).strip().splitlines()), "no message")
        raise ValueError(
            f"tokenizer {name!r}: not a folder with tokenizer.json, not in the local cache and not to be fetched now "
            f"({type(error).__name__}: {reason}); give the path of a folder, or connect to the network once"
        ) from None
    if not (folder / "tokenizer.json").exists():
        raise ValueError(
            f"tokenizer {name!r}: the repository has no tokenizer.json; transformers makes a folder with it: "
            f"AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER)"
        )
    return folder


def _specials_of_folder(folder: Path, backend: "tokenizers.Tokenizer") -> dict[str, str]:
    specials: dict[str, str] = {}
    for name in _SPECIALS_FILES:
        entries = read_json(folder / name, dict) if (folder / name).exists() else {}
        for key in (*SPECIALS, "bos_token", "eos_token"):
            value = entries.get(key)
            value = value.get("content") if isinstance(value, dict) else value  # an AddedToken as JSON
            if isinstance(value, str):
                specials[key] = value
    if "pad_token" not in specials:  # a bare tokenizer.json
        specials |= {key: token for key, token in SPECIALS.items() if backend.token_to_id(token) is not None}
    return specials
