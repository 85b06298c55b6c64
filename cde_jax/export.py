"""The command that writes a trained model for others, alone or with the context of one corpus baked in.

python -m cde_jax.export --workdir=DIR --out=DIR [--corpus=FILE] [--seed=0] [--noonnx]
"""

import json
import logging
import sys
from pathlib import Path

from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished run: its export/ is read")
_OUT = flags.DEFINE_string("out", None, "Directory to write; an older export there is replaced")
_CORPUS = flags.DEFINE_string(
    "corpus", None, "Bake the context of this corpus in: a text a line, or JSON lines with `text` and perhaps `title`"
)
_ONNX = flags.DEFINE_bool("onnx", True, "With --corpus: as ONNX too, which needs PyTorch")
_SEED = flags.DEFINE_integer("seed", 0, "Which sample of the corpus becomes its context")


def read_corpus(path: Path) -> list[str]:
    """The texts of a corpus file; a line that cannot be read is a ValueError with its number."""
    if not path.is_file():
        raise ValueError(f"--corpus={path}: there is no such file")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            texts.append(f"{row.get('title', '')} {row['text']}".strip())
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{path}:{number}: expected an object with a text, got {line:.80}") from None
    return texts


def export(workdir: Path, out: Path, corpus: Path | None, seed: int, onnx: bool = True) -> str:
    """Write `out` from `workdir`/export and tell what was written."""
    from cde_jax.retrieval.embedder import Embedder

    source = workdir / "export"
    if not (source / "config.json").is_file():
        raise ValueError(f"{workdir} has no export/ yet: run `python -m cde_jax.main … --stage=export` first")
    embedder, card = Embedder.from_pretrained(source), None
    if (source / "README.md").is_file():
        card = (source / "README.md").read_text(encoding="utf-8")
    if corpus is None:
        embedder.save_pretrained(out, card=card)
        return f"{out}: the model"
    texts = read_corpus(corpus)
    embedder.export_corpus(embedder.embed_context(texts, seed=seed), out, card=card, onnx=onnx)
    return f"{out}: the model with the context of {len(texts)} texts baked in, for PyTorch{' and ONNX' if onnx else ''}"


def main(argv: list[str]) -> None:
    """A mistake of the user is told in words, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    corpus = Path(_CORPUS.value) if _CORPUS.value else None
    try:
        print(export(Path(_WORKDIR.value), Path(_OUT.value), corpus, _SEED.value, _ONNX.value), flush=True)
    except (ValueError, OSError) as error:
        logging.getLogger("cde_jax").debug("the traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    app.run(main)
