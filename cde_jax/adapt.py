"""The command that fits an adapter to vectors or an encoder, a corpus and qrels: ADDER (arXiv 2310.05380).

python -m cde_jax.adapt --data=BEIR_FOLDER (--vectors=DIR | --model=NAME_OR_DIR) --out=DIR [--sides=both]
"""

import logging
from dataclasses import fields
from pathlib import Path

from absl import app, flags

from cde_jax.commands import exit_with_message
from cde_jax.config import AdapterSettings

_DATA = flags.DEFINE_string("data", None, "Folder of queries.jsonl, corpus.jsonl and qrels; .gz or not")
_QRELS = flags.DEFINE_string("qrels", None, "The qrels; None: qrels/train.tsv, qrels.tsv or qrels/test.tsv of --data")
_VECTORS = flags.DEFINE_string(
    "vectors", None, "Folder of queries and documents as .npy, rows as in the .jsonl, or .parquet with id and vector"
)
_MODEL = flags.DEFINE_string("model", None, "Encoder in place of --vectors: a directory or a hub name")
_OUT = flags.DEFINE_string("out", None, "Folder for the adapter and its report; the same command goes on from there")
_EXPORT = flags.DEFINE_list("export", [], "Also write: onnx, sentence-transformers (which needs --model)")
_TYPES = {float: flags.DEFINE_float, float | None: flags.DEFINE_float}
_TYPES |= {int: flags.DEFINE_integer, int | None: flags.DEFINE_integer}
_SETTINGS = [
    _TYPES.get(field.type, flags.DEFINE_string)(field.name, field.default, f"Of the fit: {field.name}")
    for field in fields(AdapterSettings)
]


def main(argv: list[str]) -> None:
    """User errors exit with a message, no traceback."""
    from cde_jax.stages.adapt import adapt

    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.getLogger("cde_jax").setLevel(logging.INFO)
    settings = {flag.name: flag.value for flag in _SETTINGS}
    with exit_with_message():
        sources = {"vectors": _VECTORS.value, "model": _MODEL.value, "qrels": _QRELS.value}
        print(adapt(Path(_DATA.value), Path(_OUT.value), **sources, export=_EXPORT.value, **settings), flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["data", "out"])
    app.run(main)
