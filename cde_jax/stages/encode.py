"""The encode command's work: each input file → a Parquet file of vectors, in this process or by actors of Ray."""

import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cde_jax.adapters.adder import Adapter
from cde_jax.data.files import file_digest, given_path, matches
from cde_jax.data.sources import beir
from cde_jax.data.sources.huggingface import parquet_columns, parquet_rows
from cde_jax.data.sources.jsonl import json_lines
from cde_jax.retrieval.embedder import Context, Embedder
from cde_jax.retrieval.vectors import DTYPES, check_same, read_metadata, vector_files, write_vectors
from cde_jax.stages.engines import check_engine
from cde_jax.stages.workdir import locked

_ENDING = re.compile(r"\.(parquet|jsonl|json)(\.gz)?$", re.IGNORECASE)


class Report(NamedTuple):
    """What became of an input file."""

    name: str  # of the output
    count: int  # texts that were encoded
    seconds: float
    kept: bool  # it was there
    error: str  # "": none


def encode(inputs: Sequence[str], output: Path, *, engine: str = "local", **settings: Any) -> Iterator[str]:
    """Encode the files that paths and patterns name into `output`; yields a line for each as it is finished.

    settings: of `FileEncoder`. A file that is there, of the same input and settings, is kept. Raises ValueError, before
    anything is encoded, for settings that do not fit each other or what is in `output`; and, when all others are
    finished, for input files that could not be read.
    """
    check_engine(engine)
    files, output = _files(inputs), given_path(output, "--output").absolute()
    with locked(output):
        start, reports = time.perf_counter(), []
        run = _on_ray if engine == "ray" else _here
        for number, report in enumerate(run(files, output, settings), 1):
            reports.append(report)
            rate = f"{report.count:,} texts, {report.count / max(report.seconds, 1e-9):,.0f} a second"
            what = f"failed: {report.error}" if report.error else "was there" if report.kept else rate
            yield f"{report.name} ({number} of {len(files)}): {what}"
    count, seconds = sum(report.count for report in reports), time.perf_counter() - start
    yield f"{count:,} texts in {seconds:,.0f} s, {count / seconds:,.0f} a second, loading the model included"
    if failed := [report for report in reports if report.error]:
        lines = "".join(f"\n- {report.error}" for report in failed)
        raise ValueError(
            f"{len(failed)} of {len(files)} input files could not be encoded; repair them and call the same command "
            f"again, which keeps the others:{lines}"
        )


class FileEncoder:
    """A model under a context, for input files: what a process of the local engine, or an actor of Ray, holds."""

    def __init__(
        self,
        output: Path,
        *,
        model: str,
        context: Path | None = None,
        adapter: Path | None = None,
        side: str = "documents",
        dtype: str = "float32",
        dimensions: int | None = None,
        progress: bool = True,
    ):
        """Raises ValueError for parts that do not belong together, and for vectors in `output` that differ in them."""
        if dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        options = {"adapter": None if adapter is None else Adapter.load(adapter), "progress": progress}
        self.embedder = embedder = Embedder.from_pretrained(model, **options)
        self.context = context = None if context is None else Context.load(context)
        self.output, self.side = output, side
        if context is None and not embedder.works_without_context:
            raise ValueError("these weights have no null embedding: give a --context")
        width = next(self.embedder.encode_stream([], context, side=side)).shape[1]
        transformed = adapter is not None or (context is not None and (context.whitening or context.hybrid) is not None)
        sizes = (width,) if transformed else embedder.dimensions
        if dimensions not in (None, *sizes):
            raise ValueError(
                f"--dimensions: expected {' or '.join(map(str, sizes))}, got {dimensions}: only vectors of "
                "a model that was trained with train.matryoshka may be cut, to these sizes, and no whitened, adapted "
                "or hybrid ones"
            )
        kind, settings = "query" if side == "queries" else "document", embedder.settings
        self.metadata = {
            "weights": embedder.weights,
            "context": None if context is None else context.fingerprint,
            "adapter": None if adapter is None else file_digest(adapter),
            "side": side,
            "prefix": getattr(settings, f"{kind}_prefix"),
            "length": getattr(settings, f"{kind}_length"),
            "dtype": dtype,
            "dimensions": dimensions or width,
        }
        for path in vector_files(output):
            check_same(path, self.metadata, read_metadata(path)[0], "choose another --output, or move it away")

    def encode(self, path: Path, name: str) -> Report:
        """Encode a file into `output`/`name`; one that cannot be read is an error in the report."""
        start, target = time.perf_counter(), self.output / name
        try:
            source = file_digest(path)
            if target.is_file() and read_metadata(target)[1] == source:
                return Report(name, 0, 0.0, True, "")
            count = write_vectors(target, self._blocks(path), self.metadata, source)
        except ValueError as error:
            return Report(name, 0, 0.0, False, str(error) if str(path) in str(error) else f"{path}: {error}")
        return Report(name, count, time.perf_counter() - start, False, "")

    def _blocks(self, path: Path) -> Iterator[tuple[list[str], Float[np.ndarray, "_ D"]]]:
        ids: deque[str] = deque()  # of texts whose vectors are not there yet

        def texts() -> Iterator[str]:
            for identifier, text in _texts(path):
                ids.append(identifier)
                yield text

        for vectors in self.embedder.encode_stream(texts(), self.context, side=self.side):
            yield [ids.popleft() for _ in range(len(vectors))], vectors


def _here(files: dict[str, Path], output: Path, settings: dict[str, Any]) -> Iterator[Report]:
    encoder = FileEncoder(output, **settings)
    return (encoder.encode(path, name) for name, path in files.items())


def _on_ray(files: dict[str, Path], output: Path, settings: dict[str, Any]) -> Iterator[Report]:
    """A task of Ray Data for each file, run by actors that hold a model: one a GPU, or one a CPU where there is none.

    Only names and reports go through Ray. Its own checkpoints are by row, and keep every finished id in memory; ours
    are the finished files.
    """
    import ray
    import ray.data

    class Actor:
        def __init__(self):
            self.encoder = FileEncoder(output, progress=False, **settings)

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            reports = [self.encoder.encode(Path(p), n) for n, p in zip(rows["name"], rows["path"], strict=True)]
            return {field: [getattr(report, field) for report in reports] for field in Report._fields}

    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # RAY_ADDRESS names a cluster; without it, this machine
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actors = ray.data.ActorPoolStrategy(size=min(len(files), gpus or int(resources["CPU"])))
    rows = [{"name": name, "path": str(path.absolute())} for name, path in files.items()]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    options = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    try:
        for row in data.map_batches(Actor, batch_size=1, compute=actors, **options).iter_rows():
            yield Report(**row)
    except ray.exceptions.RayError as error:
        if messages := re.findall(r"^(?:ValueError|ImportError): (.*)", str(error), re.MULTILINE):
            raise ValueError(messages[-1]) from None
        raise


def _files(inputs: Sequence[str]) -> dict[str, Path]:
    """The input files by the name of their output; ValueError where there are none, or two of one name."""
    files: dict[str, Path] = {}
    for pattern in inputs:
        found = matches(given_path(pattern, "--input"))
        if not found or any(path.is_dir() for path in found.values()):
            raise ValueError(f"--input {pattern}: expected files, found none; name them, as '{pattern}/*.parquet'")
        for name, path in found.items():
            if not _ENDING.search(name):
                raise ValueError(f"{path}: expected a name with the ending .parquet, .jsonl or .jsonl.gz")
            name = _ENDING.sub("", name) + ".parquet"
            if files.setdefault(name, path) != path:
                raise ValueError(f"{path} and {files[name]}: both would be written as {name}; encode one elsewhere")
    return files


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Id and text, after its title, of each row of Parquet or line of JSON."""
    if path.suffix.lower() == ".parquet":
        columns = [name for name in parquet_columns(path) if name in ("_id", "id", "title", "text")]
        rows = enumerate(parquet_rows(path, columns), 1)
        entries = ((f"{path}: row {number}", row) for number, row in rows)
    else:
        entries = json_lines(path)
    for place, entry in entries:
        identifier = entry.get("_id", entry.get("id"))
        if isinstance(identifier, int) and not isinstance(identifier, bool):
            identifier = str(identifier)
        yield beir.document(entry | {"_id": identifier}, place)
