"""Wrong arguments of the Python API: a ValueError that says what was expected and what came.

The calls run in a process of their own, without the type checks of conftest.py, as users run them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

VECTORS = np.eye(4, 8, dtype=np.float32)
WITH_NAN = np.where(np.arange(4)[:, None] == 2, np.float32("nan"), VECTORS)

TEXTS = {
    "a string": ("one text", "expected a list of texts, got a single one, 'one text'"),
    "bytes": (b"text", "expected a list of texts, got a single one, b'text'"),
    "a set": ({"a", "b"}, "expected a list of texts, got a set, whose order is arbitrary"),
    "a dict": ({"id": "a"}, "expected a list of texts, got a dict"),
    "None": (None, "expected a list of texts, got NoneType"),
    "a number": (3, "expected a list of texts, got int"),
    "a matrix": (np.eye(2), "expected a list of texts, got ndarray"),
    "a list of bytes": ([b"a"], "expected a list of texts, got bytes"),
    "a list with None": (["a", None], "expected a list of texts, got NoneType .* 1: None"),
    "a list of lists": ([["a"]], "expected a list of texts, got list"),
    "a lone surrogate": (["a\ud800"], "expected valid Unicode, got a lone surrogate at index 0"),
}
INTEGERS = {
    "negative": (-1, "got -1"),
    "a float": (1.5, "got 1.5"),
    "a string": ("1", "got '1'"),
    "None": (None, "got None"),
    "a boolean": (True, "got True"),
}
MATRICES = {
    "a row": (VECTORS[0], r"expected a float array of shape \[n, width\], got float32 \[8\]"),
    "integers": (VECTORS.astype(int), r"expected a float array .* got int64 \[4, 8\]"),
    "texts": (["a"], "expected a float array .* got <U1"),
    "None": (None, "expected a float array .* got object"),
    "rows of different widths": ([[1.0], [1.0, 2.0]], "expected a float array"),
    "NaN": (WITH_NAN, r"NaN or infinity in 1 of 4 rows \(first: row 2\)"),
    "infinity": (np.full((4, 8), np.inf), "NaN or infinity in 4 of 4"),
}


def calls():
    """{name: (call of an environment, pattern of its message)}."""
    found = {}
    for name, (wrong, pattern) in TEXTS.items():
        found |= {
            f"queries: {name}": (lambda e, x=wrong: e.biencoder.encode_queries(x), "queries: " + pattern),
            f"documents: {name}": (lambda e, x=wrong: e.isolated.encode_documents(x), "documents: " + pattern),
            f"corpus: {name}": (lambda e, x=wrong: e.isolated.embed_context(x), "corpus: " + pattern),
        }
        if wrong is not None:
            call = lambda e, x=wrong: e.biencoder.embed_context(["a"], queries=x)  # noqa: E731
            found[f"queries of a context: {name}"] = (call, "queries: " + pattern)
        if name not in ("a lone surrogate", "a matrix"):
            found[f"pseudo queries: {name}"] = (lambda e, x=wrong: e.pseudo_queries(x), "corpus: " + pattern)
    for name, (wrong, got) in INTEGERS.items():
        seed, k = f"seed: expected an integer of 0 or more, {got}", f"k, .*: expected an integer of 1 or more, {got}"
        found |= {
            f"seed of a context: {name}": (lambda e, x=wrong: e.isolated.embed_context(["a"], x), seed),
            f"seed of pseudo queries: {name}": (lambda e, x=wrong: e.pseudo_queries(["a"], x), seed),
            f"k: {name}": (lambda e, x=wrong: e.search(VECTORS, VECTORS, x), k),
        }
    for name, (wrong, pattern) in MATRICES.items():
        queries, documents = f"queries: .*{pattern}", f"documents: .*{pattern}"
        found |= {
            f"whitening, queries: {name}": (lambda e, x=wrong: e.whitening(x, VECTORS), queries),
            f"whitening, documents: {name}": (lambda e, x=wrong: e.whitening(VECTORS, x), documents),
            f"transform_queries: {name}": (lambda e, x=wrong: e.fitted.transform_queries(x), queries),
            f"transform_documents: {name}": (lambda e, x=wrong: e.fitted.transform_documents(x), documents),
            f"search, queries: {name}": (lambda e, x=wrong: e.search(x, VECTORS, 1), queries),
            f"search, documents: {name}": (lambda e, x=wrong: e.search(VECTORS, x, 1), documents),
        }
    for wrong in (-100, float("nan"), float("inf"), "16", None):
        pattern = "strength: expected a finite number of 0 or more, got"
        found[f"strength {wrong!r}"] = (lambda e, x=wrong: e.whitening(VECTORS, VECTORS, x), pattern)
    narrow, width = VECTORS[:, :3], "documents: .* width 8, got 3"
    wide = np.zeros((2, 8), np.float32)
    return found | {
        "size of pseudo queries: 0": (lambda e: e.pseudo_queries(["a"], size=0), "size: .* of 1 or more, got 0"),
        "whitening by no queries": (lambda e: e.whitening(VECTORS[:0], VECTORS), "got 0 and 4"),
        "whitening by no documents": (lambda e: e.whitening(VECTORS, VECTORS[:0]), "got 4 and 0"),
        "whitening by two widths": (lambda e: e.whitening(VECTORS, narrow), width),
        "whitened vectors of another width": (lambda e: e.fitted.transform_documents(narrow), width),
        "search in two widths": (lambda e: e.search(VECTORS, narrow, 1), width),
        "an empty corpus": (lambda e: e.isolated.embed_context([]), "at least one text, got none among 0"),
        "a blank corpus": (lambda e: e.isolated.embed_context([" ", "\u200b"]), "one text, got none among 2"),
        "blank queries": (lambda e: e.biencoder.embed_context(["a"], queries=["\n", ""]), "queries: .* among 2"),
        "a path as context": (lambda e: e.isolated.encode_queries(["a"], str(e.saved)), "context: .* got str"),
        "vectors as context": (lambda e: e.isolated.encode_queries(["a"], VECTORS), "context: .* got ndarray"),
        "a context for a biencoder": (lambda e: e.biencoder.encode_queries(["a"], e.context), "leave `context` out"),
        "a context of other weights": (
            lambda e: e.isolated.encode_queries(["a"], e.Context(wide, 0, 2, "other", "")), "other weights"),
        "a context of another width": (
            lambda e: e.isolated.encode_queries(["a"], e.Context(wide, 0, 2, e.isolated.weights, "")), r"32\), .* 8\)"),
        "a context of NaN": (lambda e: e.Context(WITH_NAN, 0, 4, "", ""), "context vectors: expected finite"),
        "a context of a list": (lambda e: e.Context([[1, 2]], 0, 4, "", ""), "context vectors: expected a float"),
        "saving to a directory": (lambda e: e.context.save(e.path), "expected a file name, got a directory"),
        "saving to nothing": (lambda e: e.context.save(""), "expected a path, got ''"),
        "loading what is not there": (lambda e: e.Context.load(e.path / "none"), "none: expected a file"),
        "loading a directory": (lambda e: e.Context.load(e.path), "expected a file of the format .*, there is none"),
        "loading another file": (lambda e: e.Context.load(__file__), "not safetensors, truncated or altered"),
        "no model directory": (lambda e: e.Embedder.from_pretrained(e.path / "none"), "none"),
        "a directory without a model": (lambda e: e.Embedder.from_pretrained(e.path), "config.json"),
        "an empty model name": (lambda e: e.Embedder.from_pretrained(""), "expected a model directory .* got ''"),
        "None as a model": (lambda e: e.Embedder.from_pretrained(None), "expected a model directory .* got None"),
        "a file as a model": (lambda e: e.Embedder.from_pretrained(e.saved), "is a file"),
        "unknown numerics": (lambda e: e.Embedder.from_pretrained(e.path, "fast"), "numerics: expected one of"),
        "an export over other files": (lambda e: e.isolated.save_pretrained(e.path), "expected a free name"),
        "an export of a biencoder's context": (
            lambda e: e.biencoder.export_corpus(None, e.path / "x", onnx=False), "a biencoder reads no context"),
    }  # fmt: skip


def main(path: Path) -> None:
    """Make every call and print {name: [type, message]}."""
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from cde_jax import Context, Embedder, pseudo_queries, whitening
    from cde_jax.data.tokens import Tokenizer
    from cde_jax.interop.modules import TextSettings
    from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
    from cde_jax.models.encoder import EncoderConfig
    from cde_jax.retrieval.index import search

    tokenizer = Tokenizer.train(["a few words of text"], 60)
    tokenizer.save(path / "tokenizer")
    encoder = EncoderConfig(vocab_size=60, width=32, layers=1, heads=2, mlp_width=48)
    contextual = ContextualConfig(BiencoderConfig(encoder, head=True), encoder, 2)
    embedders = []
    for kind, config in ((Biencoder, BiencoderConfig(encoder)), (ContextualEncoder, contextual)):
        graph, state = nnx.split(nnx.eval_shape(lambda kind=kind, config=config: kind(config, rngs=nnx.Rngs(0))))
        model = nnx.merge(graph, jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), state))
        embedders.append(Embedder(model, tokenizer, TextSettings("", "", 8, 8), path / "tokenizer", progress=False))
    biencoder, isolated = embedders
    context, fitted = isolated.embed_context(["a", "few"]), whitening(VECTORS, VECTORS)
    context.save(saved := path / "ctx.safetensors")
    environment = SimpleNamespace(
        Context=Context, Embedder=Embedder, pseudo_queries=pseudo_queries, whitening=whitening, search=search,
        path=path, biencoder=biencoder, isolated=isolated, context=context, fitted=fitted, saved=saved,
    )  # fmt: skip
    results = {}
    for name, (call, _) in calls().items():
        try:
            results[name] = ["nothing", repr(np.shape(call(environment)))]
        except Exception as error:
            results[name] = [type(error).__name__, str(error)]
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("calls"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name, (_, pattern) in calls().items()])
def test_a_bad_call_is_a_value_error_that_names_the_argument(name, pattern, results):
    kind, message = results[name]
    assert kind == "ValueError", message
    assert re.search(pattern, message), message


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]))
