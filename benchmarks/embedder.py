"""`Embedder` beside sentence-transformers on the same weights, tokenisation included: a JSON line a case.

    python benchmarks/embedder.py --model DIR_OR_NAME [--documents 10000] [--queries 200] [--starts 5] [--onnx]

Queries of a few words one at a time (milliseconds, median and 99th percentile), and documents of 5 to 300 words; the
libraries take turns, round by round, a text that is not timed before each. `ratio` is the other library's time over
ours, `difference` the largest between the vectors; `…_first_s` are the seconds of the first pass, in which we compile.
Texts are words drawn from this project's documentation. `--onnx` adds ONNX Runtime (needs onnx, onnxruntime,
onnxscript): sentence-transformers' module exported by PyTorch, batches of 32 texts of similar length.

With --starts the start-up comes first: seconds of processor and of wall clock from the start of a process to its first
vector, processes in turns; "kept programs" reads what an earlier process compiled (JAX_COMPILATION_CACHE_DIR).
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import emit

from cde_jax.retrieval.embedder import Embedder

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs"
OURS = "from cde_jax import Embedder; Embedder.from_pretrained({!r}, progress=False).encode_queries(['a query'])"
THEIRS = "from sentence_transformers import SentenceTransformer as S; S({!r}, device='cpu').encode(['a query'])"
PACKAGES = ("jax", "numpy", "torch", "sentence-transformers", "onnxruntime")
Encode = Callable[[list[str]], np.ndarray]


def main() -> None:
    """Time both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="that both libraries load")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=0, help="processes of each library, until the first vector")
    parser.add_argument("--onnx", action="store_true", help="ONNX Runtime too")
    args = parser.parse_args()
    if args.starts:
        start_up(args.model, args.starts)
    from sentence_transformers import SentenceTransformer

    ours, theirs = Embedder.from_pretrained(args.model, progress=False), SentenceTransformer(args.model, device="cpu")
    settings = {"normalize_embeddings": True, "show_progress_bar": False}
    others = {"sentence-transformers": partial(theirs.encode, **settings)}
    if args.onnx:
        others["ONNX Runtime"] = in_onnx(theirs)
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(np.log(7), 0.5, args.queries), 2, 30)
    queries = texts(sizes, random)
    documents = texts(np.clip(random.lognormal(np.log(60), 0.8, args.documents), 5, 300), random)
    report("queries, one at a time", ours.encode_queries, others, [[query] for query in queries], args.rounds)
    report("documents", ours.encode_documents, others, [documents], args.rounds)


def start_up(model: str, starts: int) -> None:
    """Time fresh processes; the first one of each case, which may compile or read files from disk, is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        none = {"JAX_COMPILATION_CACHE_DIR": ""}
        cases = {"ours": (OURS, none), "ours, kept programs": (OURS, kept), "sentence-transformers": (THEIRS, none)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(starts + 1):
            for name, (code, changes) in cases.items():
                before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                command = [sys.executable, "-c", code.format(model)]
                subprocess.run(command, check=True, env=os.environ | changes, stderr=subprocess.DEVNULL)
                wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                taken[name].append((cpu, wall))
    for name, seconds in taken.items():
        cpu, wall = (round(float(x), 2) for x in np.median(seconds[1:], axis=0))
        line = {"benchmark": "embedder", "case": "start-up", "library": name, "starts": starts}
        emit(line | {"cpu_seconds": cpu, "wall_seconds": wall}, *PACKAGES)


def texts(sizes: np.ndarray, random: np.random.Generator) -> list[str]:
    """Texts of so many words each."""
    words = [word for file in sorted(DOCUMENTATION.glob("*.md")) for word in file.read_text().split() if word.isalpha()]
    return [" ".join(random.choice(words, int(size))) for size in sizes]


def in_onnx(model: Any) -> Encode:
    """A SentenceTransformer in ONNX Runtime; texts in batches of 32, the longest first, as that library has them."""
    import onnxruntime
    import torch

    class Vectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]

    def tokens(texts: list[str], kind: str) -> dict[str, Any]:
        settings = {"padding": True, "truncation": True, "max_length": model.max_seq_length}
        rows = model.tokenizer(texts, return_tensors=kind, **settings)
        return {name: rows[name] for name in ("input_ids", "attention_mask")}

    def encode(texts: list[str]) -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = np.empty((len(texts), model.get_embedding_dimension()), np.float32)
        for start in range(0, len(texts), 32):
            rows = order[start : start + 32]
            vectors[rows] = session.run(None, tokens([texts[i] for i in rows], "np"))[0]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    any_size = [dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)] * 2
    example = tuple(tokens(["two texts", "of different lengths"], "pt").values())
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(Vectors().eval(), example, f"{folder}/model.onnx", dynamic_shapes=any_size, verbose=False)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    return encode


def report(case: str, ours: Encode, others: dict[str, Encode], calls: list[list[str]], rounds: int) -> None:
    """A line for each other library, after a first pass over all calls."""
    encode, first, vectors = {"ours": ours, **others}, {}, {}
    for name, function in encode.items():
        start = time.perf_counter()
        vectors[name] = np.concatenate([function(call) for call in calls])
        first[name] = round(time.perf_counter() - start, 2)
    seconds: dict[str, list[float]] = {name: [] for name in encode}
    for _ in range(rounds):
        for name, function in encode.items():
            function(calls[0][:1])
            for call in calls:
                start = time.perf_counter()
                function(call)
                seconds[name].append(time.perf_counter() - start)
    for other in others:
        line = {"benchmark": "embedder", "case": case, "library": other, "texts": len(calls[0]), "calls": len(calls)}
        for name, key in (("ours", "ours"), (other, "theirs")):
            line[f"{key}_ms"] = [round(1e3 * float(x), 2) for x in np.percentile(seconds[name], [50, 99])]
            line[f"{key}_first_s"] = first[name]
        line["ratio"] = round(float(np.median(np.divide(seconds[other], seconds["ours"]))), 3)
        line["difference"] = float(np.abs(vectors["ours"] - vectors[other]).max())
        emit(line | {"rounds": rounds}, *PACKAGES)


if __name__ == "__main__":
    main()
