"""Encoding speed of queries and documents beside a large context, as ratios within one run: a JSON line a case.

    python benchmarks/encode.py [--shapes long long-768] [--torch eager compiled] [--reference DIR]
    python benchmarks/encode.py --shapes large --dtype bfloat16 --torch eager --sentence-transformers   # on a GPU

"biencoder" reads no context; "isolated" reads a cached one (`prepare_context` once, not timed); "joint" takes the
slots through every layer with every text. The exported PyTorch module does the same; its isolated context is fixed.
Texts are random tokens of full length, in batches of the size that `Embedder` uses; cases take turns, a batch each.
First a query a call: median and 99th percentile in milliseconds, and the cost of a cached context over the biencoder's.

With --sentence-transformers whole texts are encoded, tokenisation included: by `Embedder` without and with a cached
context, and by the sentence-transformers library from the same exported biencoder, in the same dtype.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from harness import emit, speed_ratio, take_turns
from shapes import KINDS, PACKAGES, SHAPES, Shape, arguments, build, config_of, context_vectors, random_texts

from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.read import TextSettings
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.encode import full_batch
from cde_jax.training.accounting import encoding_flops, utilisation

QUERY, DOCUMENT = 16, 128  # tokens


class Case(NamedTuple):
    """A function that encodes a batch once, and how many texts that is."""

    run: Callable[[], Any]
    texts: int


def main() -> None:
    """Time each model at each shape, on queries and on documents."""
    parser = arguments(__doc__, ["long"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[QUERY, DOCUMENT], help="tokens of a text")
    parser.add_argument("--calls", type=int, default=200, help="with one query each")
    parser.add_argument("--texts", type=int, default=0, help="texts of a batch; 0: as many as Embedder takes")
    parser.add_argument("--sentence-transformers", action="store_true", help="whole texts, against that library")
    args = parser.parse_args()
    for name in args.shapes:
        one_at_a_time(args, name)
        for length in args.lengths:
            cases = {kind: jax_case(kind, SHAPES[name], length, args) for kind in args.models}
            report(args, name, f"{length} tokens", cases | torch_cases(args, SHAPES[name], length), length)
        if args.sentence_transformers:
            whole_texts(args, name)


def report(args: argparse.Namespace, name: str, what: str, cases: dict[str, Case], length: int = 0) -> None:
    """Time the cases and print a line for each; `length`: tokens of every text, if it is the same."""
    for case in cases.values():
        case.run()  # compiles
    seconds = take_turns({label: case.run for label, case in cases.items()}, args.rounds)
    per_text = {label: [s / case.texts for s in seconds[label]] for label, case in cases.items()}
    for label, case in cases.items():
        typical = statistics.median(per_text[label])
        line = {"benchmark": "encode", "shape": name, "what": what, "model": label, "batch": case.texts}
        line |= {"texts_per_second": round(1 / typical, 2), **speed_ratio(per_text, label)}
        if length:
            kind = next(kind for kind in KINDS if kind in label)
            flops, base = (
                encoding_flops(config_of(k, SHAPES[name], "float32"), np.array([length])) for k in (kind, "biencoder")
            )
            used = utilisation(flops, typical, jax.devices()[0].device_kind, peak=args.peak)
            line |= {"flops_ratio": round(base / flops, 3), "tflops": round(flops / typical / 1e12, 3)}
            line["utilisation"] = None if used is None else round(used, 4)
        emit(line | {key: getattr(args, key) for key in ("rounds", "dtype", "attention")}, *PACKAGES)


def one_at_a_time(args: argparse.Namespace, name: str) -> None:
    """One query a call, in turns: milliseconds of all calls, median and 99th percentile; `cost` over the first's."""
    alone = argparse.Namespace(**vars(args) | {"texts": 1})
    cases = {kind: jax_case(kind, SHAPES[name], QUERY, alone) for kind in args.models if kind != "joint"}
    for case in cases.values():
        case.run()  # compiles
    seconds = take_turns({label: case.run for label, case in cases.items()}, args.calls)
    flops = {k: encoding_flops(config_of(k, SHAPES[name], "float32"), np.array([QUERY])) for k in cases}
    first = next(iter(cases), None)
    for label, taken in seconds.items():
        ms = [round(1e3 * float(x), 2) for x in np.percentile(taken, [50, 99])]
        line = {"benchmark": "encode", "shape": name, "what": "one query a call", "model": label, "ms": ms}
        line |= {"cost": round(float(np.median(taken) / np.median(seconds[first])), 3), "calls": args.calls}
        emit(line | {"flops_cost": round(float(flops[label] / flops[first]), 3), "dtype": args.dtype}, *PACKAGES)


def texts_of_batch(args: argparse.Namespace, kind: str, shape: Shape, length: int) -> int:
    """--texts, or the batch size that `Embedder` uses; joint slots take room in it."""
    return args.texts or full_batch(length, slots=shape.context if kind == "joint" else 0)


def jax_case(kind: str, shape: Shape, length: int, args: argparse.Namespace) -> Case:
    """`model.embed`, compiled as in `Embedder`: parameters and cached context are arguments."""
    model = build(config_of(kind, shape, args.dtype, attention=args.attention))
    graph, state = nnx.split(model)
    cache = None
    if kind != "biencoder":
        prepare = nnx.jit(lambda model, vectors: model.prepare_context(vectors))
        cache = jax.block_until_ready(prepare(model, context_vectors(shape)))
    texts = texts_of_batch(args, kind, shape, length)
    ids, mask = random_texts(texts, length, shape.vocabulary)
    embed = jax.jit(lambda state, ids, mask, cache: nnx.merge(graph, state).embed(ids, mask, cache))
    return Case(lambda: jax.block_until_ready(embed(state, ids, mask, cache)), texts)


def torch_cases(args: argparse.Namespace, shape: Shape, length: int) -> dict[str, Case]:
    """The exported PyTorch module and the authors' code, as asked for."""
    if not args.torch and not args.reference:
        return {}
    import in_torch

    cases, vectors = {}, context_vectors(shape)
    for kind in args.models:
        count, joint = texts_of_batch(args, kind, shape, length), vectors if kind == "joint" else None
        texts = random_texts(count, length, shape.vocabulary)
        for form in args.torch:
            isolated = kind == "isolated"
            module = in_torch.exported_with_context(shape, vectors) if isolated else in_torch.exported(kind, shape)
            run = in_torch.encoder(module, texts, joint, args.dtype, form == "compiled")
            cases[f"{kind}, PyTorch {form}"] = Case(run, count)
        if args.reference and kind != "isolated":
            module = in_torch.reference(kind, shape, args.reference)
            cases[f"{kind}, the authors' code"] = Case(
                in_torch.encoder(module, texts, joint, args.dtype, compiled=False), count
            )
    return cases


def whole_texts(args: argparse.Namespace, name: str) -> None:
    """Texts to vectors by `Embedder` and by sentence-transformers, from the same exported directory."""
    import torch
    from sentence_transformers import SentenceTransformer

    random, shape = np.random.default_rng(0), SHAPES[name]
    words = ["".join(random.choice(list("abcdefghijklmnop"), 5)) for _ in range(2000)]
    texts = [" ".join(random.choice(words, random.integers(20, DOCUMENT))) for _ in range(args.texts or 256)]
    settings = TextSettings(document_length=DOCUMENT)
    cuda = torch.cuda.is_available() and jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "tokenizer"
        Tokenizer.train(texts, min(4096, shape.vocabulary)).save(files)
        embedders = {}
        for kind in ("biencoder", "isolated"):
            model = build(config_of(kind, shape, args.dtype, attention=args.attention))
            embedders[kind] = Embedder(model, Tokenizer.load(files), settings, files, progress=False)
        exported = Path(folder) / "model"
        save_pretrained(embedders["biencoder"].model, exported, tokenizer=files, settings=settings)
        dtype = {"torch_dtype": getattr(torch, args.dtype)}
        library = SentenceTransformer(str(exported), device="cuda" if cuda else "cpu", model_kwargs=dtype)
    context = embedders["isolated"].embed_context(texts)
    runs = {
        "biencoder": partial(embedders["biencoder"].encode_documents, texts),
        "isolated": partial(embedders["isolated"].encode_documents, texts, context),
        "biencoder, sentence-transformers": partial(
            library.encode, texts, batch_size=256 if cuda else 32, normalize_embeddings=True
        ),
    }
    report(args, name, "whole texts", {label: Case(run, len(texts)) for label, run in runs.items()})


if __name__ == "__main__":
    main()
