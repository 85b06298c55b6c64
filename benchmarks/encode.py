"""Encoding speed of short queries and of documents beside a large context, as ratios in one run: a JSON line per case.

    python benchmarks/encode.py [--shapes long long-768] [--torch eager compiled] [--reference DIR]
    python benchmarks/encode.py --shapes large --dtype bfloat16 --torch eager --sentence-transformers   # on a GPU

"biencoder" reads no context; "isolated" reads a cached one (`prepare_context` once, outside of the clock); "joint"
takes the slots through every layer with every text. Our PyTorch module does the same; its isolated context is baked in.
Texts are full-length random tokens, in batches as large as `Embedder` makes them, one batch a turn of the clock;
cases take turns. A ratio is the median over rounds of the biencoder's time per text by the case's.

With --sentence-transformers whole texts are encoded, tokenisation included: by `Embedder` without and with a cached
context, and by the sentence-transformers library from the same exported biencoder, in bfloat16 where JAX runs in it.
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
from cases import KINDS, SHAPES, Shape, arguments, build, config_of, emit, random_tokens, ratio, take_turns
from flax import nnx

from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.read import TextSettings
from cde_jax.interop.write import save_pretrained
from cde_jax.retrieval.embedder import Embedder
from cde_jax.retrieval.padding import full_batch
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
    parser.add_argument("--texts", type=int, default=0, help="texts of a batch; 0: as many as Embedder takes")
    parser.add_argument("--sentence-transformers", action="store_true", help="whole texts, against that library")
    args = parser.parse_args()
    for name in args.shapes:
        for length in args.lengths:
            run_length(args, name, length)
        if args.sentence_transformers:
            whole_texts(args, name)


def run_length(args: argparse.Namespace, name: str, length: int) -> None:
    """All cases on texts of one length."""
    shape = SHAPES[name]
    cases = {kind: jax_case(kind, shape, length, args) for kind in args.models} | torch_cases(args, shape, length)
    report(args, name, f"{length} tokens", cases, length)


def report(args: argparse.Namespace, name: str, what: str, cases: dict[str, Case], length: int = 0) -> None:
    """Take turns and print a line for each case."""
    shape = SHAPES[name]
    for case in cases.values():
        case.run()  # compiled
    seconds = take_turns({label: case.run for label, case in cases.items()}, args.rounds)
    per_text = {label: [s / case.texts for s in seconds[label]] for label, case in cases.items()}
    for label, case in cases.items():
        kind = next(kind for kind in KINDS if kind in label)
        one = statistics.median(per_text[label])
        line = {"benchmark": "encode", "shape": name, "what": what, "model": label, "batch": case.texts}
        line |= {"texts_per_second": round(1 / one, 2), **ratio(per_text, label)}
        if length:
            flops, base = (
                encoding_flops(config_of(k, shape, "float32"), np.array([length])) for k in (kind, "biencoder")
            )
            used = utilisation(flops, one, jax.devices()[0].device_kind, peak=args.peak)
            line["flops_ratio"] = round(base / flops, 3)
            line |= {"tflops": round(flops / one / 1e12, 3), "utilisation": None if used is None else round(used, 4)}
        emit(line | {key: getattr(args, key) for key in ("rounds", "dtype", "attention")})


def flops_of(kind: str, shape: Shape, length: int) -> float:
    """Model FLOPs of one text."""
    return encoding_flops(config_of(kind, shape, "float32"), np.array([length]))


def jax_case(kind: str, shape: Shape, length: int, args: argparse.Namespace) -> Case:
    """`model.embed`, compiled as `Embedder` does it: parameters and cached context are arguments."""
    model = build(config_of(kind, shape, args.dtype, attention=args.attention))
    graph, state = nnx.split(model)
    cache, slots = None, 0
    if kind != "biencoder":
        cache = jax.block_until_ready(
            nnx.jit(lambda model, context: model.prepare_context(context))(model, context(shape))
        )
        slots = cache.slots.shape[0] if kind == "joint" else 0
    texts = args.texts or full_batch(length, slots=slots)
    ids, mask = random_tokens(texts, length, shape.vocabulary)
    embed = jax.jit(lambda state, ids, mask, cache: nnx.merge(graph, state).embed(ids, mask, cache))
    return Case(lambda: jax.block_until_ready(embed(state, ids, mask, cache)), texts)


def context(shape: Shape) -> np.ndarray:
    """What the first stage could have given."""
    return np.random.default_rng(0).normal(0, 1, (shape.context, shape.width)).astype(np.float32)


def torch_cases(args: argparse.Namespace, shape: Shape, length: int) -> dict[str, Case]:
    """Our PyTorch module and the authors' code, where they are asked for."""
    if not args.torch and not args.reference:
        return {}
    import in_torch

    def case(kind: str, module: Any, vectors: Any, compiled: bool) -> Case:
        texts = args.texts or full_batch(length, slots=shape.context if kind == "joint" else 0)
        ids, mask = in_torch.tensors(random_tokens(texts, length, shape.vocabulary))
        embed = in_torch.encoder(module, vectors, args.dtype, compiled)
        return Case(lambda: in_torch.wait(embed(ids, mask)), texts)

    cases = {}
    for kind in args.models:
        joint = in_torch.vectors(context(shape)) if kind == "joint" else None
        for form in args.torch:
            module = in_torch.baked_of(shape, context(shape)) if kind == "isolated" else in_torch.module_of(kind, shape)
            cases[f"{kind}, PyTorch {form}"] = case(kind, module, joint, form == "compiled")
        if args.reference and kind != "isolated":
            module = in_torch.reference_of(kind, shape, args.reference)
            cases[f"{kind}, the authors' code"] = case(kind, module, joint, False)
    return cases


def whole_texts(args: argparse.Namespace, name: str) -> None:
    """Texts in, vectors out: ours and sentence-transformers, from the same directory."""
    import torch
    from sentence_transformers import SentenceTransformer

    random, shape = np.random.default_rng(0), SHAPES[name]
    words = ["".join(random.choice(list("abcdefghijklmnop"), 5)) for _ in range(2000)]
    texts = [" ".join(random.choice(words, random.integers(20, DOCUMENT))) for _ in range(args.texts or 256)]
    settings = TextSettings(document_length=DOCUMENT)
    cuda = torch.cuda.is_available() and jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(texts, min(4096, shape.vocabulary)).save(Path(folder) / "tokenizer")
        tokenizer = Tokenizer.load(Path(folder) / "tokenizer")
        embedders = {}
        for kind in ("biencoder", "isolated"):
            model = build(config_of(kind, shape, args.dtype, attention=args.attention))
            embedders[kind] = Embedder(model, tokenizer, settings, Path(folder) / "tokenizer", progress=False)
        save_pretrained(
            embedders["biencoder"].model,
            Path(folder) / "model",
            tokenizer=Path(folder) / "tokenizer",
            settings=settings,
        )
        theirs = SentenceTransformer(
            str(Path(folder) / "model"),
            device="cuda" if cuda else "cpu",
            model_kwargs={"torch_dtype": getattr(torch, args.dtype)},
        )
    read = embedders["isolated"].embed_context(texts)
    encode = partial(theirs.encode, texts, batch_size=256 if cuda else 32, normalize_embeddings=True)
    runs = {
        "biencoder": lambda: embedders["biencoder"].encode_documents(texts),
        "isolated": lambda: embedders["isolated"].encode_documents(texts, read),
        "biencoder, sentence-transformers": encode,
    }
    report(args, name, "whole texts", {label: Case(run, len(texts)) for label, run in runs.items()})


if __name__ == "__main__":
    main()
