"""The command that writes a trained model for others, alone or with the context of one corpus built in.

python -m cde_jax.export --workdir=DIR --out=DIR [--corpus=FILE] [--seed=0] [--noonnx]
"""

from pathlib import Path

from absl import app, flags

from cde_jax.commands import exit_with_message

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished run: its export/ is read")
_OUT = flags.DEFINE_string("out", None, "Directory to write; an older export there is replaced")
_CORPUS = flags.DEFINE_string("corpus", None, "Build its context in: a text a line, or JSON lines (`text`, `title`?)")
_ONNX = flags.DEFINE_bool("onnx", True, "With --corpus: as ONNX too, which needs PyTorch")
_SEED = flags.DEFINE_integer("seed", 0, "Which sample of the corpus becomes its context")


def main(argv: list[str]) -> None:
    """User errors exit with a message, no traceback."""
    from cde_jax.stages.export import export_run

    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    corpus = None if _CORPUS.value is None else Path(_CORPUS.value)
    with exit_with_message():
        print(export_run(Path(_WORKDIR.value), Path(_OUT.value), corpus, _SEED.value, _ONNX.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    app.run(main)
