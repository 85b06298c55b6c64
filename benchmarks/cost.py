"""How time grows with B, J, L and the size of the corpus: a JSON line a curve with its slope, and a figure.

    python benchmarks/cost.py [--axes B J L documents pairs] [--torch] [--out cost.svg]

B, J and L: seconds of a training step, of which one is varied (L: of queries, documents and context), the others are
those of the shape. documents: encoding n of them, the embedding of their context included. pairs: a batch plan of n
pairs by synthetic vectors: clusters, packing, masks of false negatives. Each size is four times the one before; the
slope is that of a line through log seconds by log size, 1 where the time grows with the size. Models take turns;
PyTorch, with the same weights and token ids, has a process of its own (`train_step.py`). Its exported module prepares
the slots for each batch of texts.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import emit
from plan import SETTINGS, write_stores
from shapes import KINDS, PACKAGES, SHAPES, Shape, build, config_of, random_texts
from train_step import Run, jax_step, run_once, timed_runs, torch_process, torch_steps

from cde_jax.batching.build import build_plan
from cde_jax.config import Batching
from cde_jax.interop.read import TextSettings
from cde_jax.retrieval.embedder import Embedder

FIRST = {"B": 32, "J": 16, "L": 16, "documents": 256, "pairs": 4096}  # the smallest size of each axis
FIELDS = {"B": ["queries"], "J": ["context"], "L": ["query_length", "document_length"]}  # of Shape
PANELS = [("training step", ["B"]), ("training step", ["J"]), ("training step", ["L"])]
PANELS += [("encoding; batch plan", ["documents", "pairs"])]
PLAN_WIDTH, TORCH_BATCH = 128, 256
Cases = dict[str, Callable[[], Run]]


def main() -> None:
    """Time the cases of each axis at each size, print the curves, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(FIRST), choices=FIRST)
    parser.add_argument("--shape", default="demo", choices=SHAPES)
    parser.add_argument("--sizes", type=int, default=3, help="of each axis")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--torch", action="store_true", help="the exported PyTorch module too")
    parser.add_argument("--out", type=Path, default=Path("cost.svg"))
    args = parser.parse_args()
    curves = []
    with torch_process() as process:
        for axis in args.axes:
            curves += measure(axis, args, process)
    draw(curves, args.out)


def measure(axis: str, args: argparse.Namespace, process: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """The curves of an axis, printed: median seconds of each case at each size."""
    sizes, seconds = [FIRST[axis] * 4**i for i in range(args.sizes)], {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            cases = cases_of(axis, size, args, process, Path(folder))
            for run in cases.values():
                run()  # compiles
            for case, runs in timed_runs(cases, args.rounds).items():
                seconds.setdefault(case, []).append(statistics.median(run.seconds for run in runs))
    curves = [
        {"benchmark": "cost", "axis": axis, "case": case, "sizes": sizes}
        | {"seconds": [round(s, 4) for s in of_case], "slope": round(slope(sizes, of_case), 2)}
        for case, of_case in seconds.items()
    ]
    for curve in curves:
        emit(curve | {key: getattr(args, key) for key in ("shape", "rounds", "dtype")}, *PACKAGES)
    return curves


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of the line through log seconds by log size with the least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def cases_of(axis: str, size: int, args: argparse.Namespace, process: ProcessPoolExecutor, folder: Path) -> Cases:
    """What is timed at a size of an axis."""
    shape, forms = SHAPES[args.shape], ["eager"] * args.torch
    if axis == "pairs":
        settings, stores = Batching(**SETTINGS), write_stores(folder, size, PLAN_WIDTH)
        numbers = itertools.count()
        return {"batch plan": partial(run_once, lambda: plan(folder / str(next(numbers)), stores, settings))}
    if axis == "documents":
        cases = {kind: partial(run_once, jax_encoder(kind, shape, args.dtype, size)) for kind in KINDS}
        for kind in KINDS if args.torch else ():
            given = (encode_in_torch, kind, shape, args.dtype, size)
            cases[f"{kind}, PyTorch eager"] = lambda given=given: process.submit(*given).result()
        return cases
    shape = shape._replace(**dict.fromkeys(FIELDS[axis], size))
    kinds = KINDS[1:] if axis == "J" else KINDS  # a biencoder has no context
    cases = {kind: partial(run_once, jax_step(kind, shape, args.dtype, 0)[0]) for kind in kinds}
    return cases | torch_steps(process, kinds, forms, shape, args.dtype)


def plan(directory: Path, stores: Any, settings: Batching) -> None:
    """Write a batch plan."""
    build_plan(directory, *stores, settings, seed=0)


@cache
def make_embedder(kind: str, shape: Shape, dtype: str) -> Embedder:
    """An `Embedder`, which keeps its compiled programs."""
    settings = TextSettings(document_length=shape.document_length)
    return Embedder(build(config_of(kind, shape, dtype)), None, settings, progress=False)


def jax_encoder(kind: str, shape: Shape, dtype: str, count: int) -> Callable[[], None]:
    """A call that encodes a corpus by `Embedder`, with a context that is embedded anew."""
    embedder = make_embedder(kind, shape, dtype)
    documents = list(random_texts(count, shape.document_length, shape.vocabulary)[0])

    def run() -> None:
        embedder.encode_documents(documents, embedder.embed_context(documents) if embedder.contextual else None)

    return run


def encode_in_torch(kind: str, shape: Shape, dtype: str, count: int) -> Run:
    """The same by the exported module, in PyTorch's process."""
    return run_once(torch_encoder(kind, shape, dtype, count))


@cache
def torch_encoder(kind: str, shape: Shape, dtype: str, count: int) -> Callable[[], None]:
    """A call that encodes a corpus, `TORCH_BATCH` texts at a time; made by the first call."""
    import in_torch
    import torch

    module = in_torch.exported(kind, shape).eval()
    ids, mask = in_torch.tensors(random_texts(count, shape.document_length, shape.vocabulary))
    stage = getattr(module, "second_stage_model", module)

    @torch.inference_mode()
    def run() -> None:
        given = {}
        with torch.autocast(in_torch.DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            if kind != "biencoder":
                context = module.first_stage_model(ids[: shape.context], mask[: shape.context])
                given["dataset_embeddings"] = context
            for batch in zip(ids.split(TORCH_BATCH), mask.split(TORCH_BATCH), strict=True):
                stage(*batch, **given).cpu()

    return run


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """A panel for each kind of size, PyTorch's curves dashed; the slopes stand in the legends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (what, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        colours: dict[str, str] = {}
        for curve in (curve for curve in curves if curve["axis"] in names):
            kind, _, torch = curve["case"].partition(", ")
            colour = colours.setdefault(kind, f"C{len(colours)}")
            label = f"{curve['case']}: {curve['slope']:.2f}"
            axes.plot(curve["sizes"], curve["seconds"], "o--" if torch else "o-", color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel=" or ".join(names), ylabel=f"{what}, seconds")
        axes.spines[["top", "right"]].set_visible(False)
        if colours:
            axes.legend(title="slope", frameon=False, fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cde_jax"}):  # the same bytes for the same numbers
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
