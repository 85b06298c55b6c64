"""What a results directory holds: results.jsonl, NDCG@10 of each query, and what settings it belongs to."""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cde_jax.data.files import fingerprint, read_json, write_file, write_json

LINES, SETTINGS = "results.jsonl", "settings.json"
Line = dict[str, Any]


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write which arrays and settings the directory belongs to, or check it. Raises ValueError for others."""
    file = folder / SETTINGS
    if not file.exists():
        write_json(file, dict(settings))
        return
    there = read_json(file)
    different = [
        f"{name}: {there.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted({*there, *settings})
        if fingerprint(there.get(name)) != fingerprint(settings.get(name))
    ]
    if different:
        raise ValueError(f"{folder} has results of other settings ({'; '.join(different)}); choose another --out")


def read(folder: Path) -> list[Line]:
    """The lines of results.jsonl; one that a kill cut short is left out."""
    file = folder / LINES
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{file}:{number}: cut short, left out", file=sys.stderr)
    return lines


def append(folder: Path, line: Line) -> None:
    """Add a line; the run's state, which it ends, is removed after that."""
    state = folder / line.pop("file")
    file = folder / LINES
    with open(file, "a+b") as out:
        cut_short = out.tell() and not file.read_bytes().endswith(b"\n")
        out.write((b"\n" if cut_short else b"") + json.dumps(line).encode() + b"\n")
    state.unlink(missing_ok=True)


def finished(lines: Sequence[Line], variant: str, seed: int, identity: str, folder: Path) -> bool:
    """Whether the run is done. Raises ValueError where one of that name was another run."""
    for line in lines:
        if (line["variant"], line["seed"]) == (variant, seed):
            if line["run"] != identity:
                raise ValueError(
                    f"{folder} has results of {variant} with seed {seed} of another definition: expected run "
                    f"{identity[:16]}…, it is {line['run'][:16]}… with {line['changes']}; choose another --out or name"
                )
            return True
    return False


def save_queries(folder: Path, variant: str, seed: int, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write NDCG@10 of each query as VARIANT-SEED.npz, an array a "set/kind"."""
    content = io.BytesIO()
    flat = {f"{name}/{kind}": values for name, kinds in found.items() for kind, values in kinds.items()}
    np.savez_compressed(content, **flat)
    write_file(folder / f"{variant}-{seed}.npz", content.getvalue())


def load_queries(folder: Path, variant: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """{set: {kind: NDCG@10 of each query}}, as `save_queries` wrote it."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / f"{variant}-{seed}.npz") as file:
        for key in file.files:
            name, _, kind = key.rpartition("/")
            found.setdefault(name, {})[kind] = file[key]
    return found
