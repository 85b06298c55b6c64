"""The array file that the first command writes and the second reads: a zip archive of stores.

`lab.json` says in words what is in it; `config.json` is the base configuration; `store/` the pairs' tokens, `plans/`
the batch plans over them, `evaluation/` the sets' tokens and judgements, `start.safetensors` a pretrained encoder.
It is read with NumPy and the standard library alone.
"""

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from cde_jax.batching.plan import BatchPlan
from cde_jax.data.files import NewFolder, fingerprint, read_json
from cde_jax.data.store import Ragged, Store

FORMAT = 3  # rises with every change of what is in the file, the keys of its configuration too
ABOUT, CONFIG, STORE, PLANS, SETS, START = (
    "lab.json", "config.json", "store", "plans", "evaluation", "start.safetensors",
)  # fmt: skip
_AGAIN = "make it again with prepare.py, or copy it again"


@dataclass(frozen=True)
class TokenSet:
    """An evaluation set as tokens; documents are in the order of their ids, so that ties rank as trec_eval has them."""

    name: str
    queries: Ragged
    documents: Ragged
    beginnings: Ragged  # of documents, as queries (`cde_jax.adapters.whitening`)
    judged: Int[np.ndarray, " j"]  # the query of each judgement …
    relevant: Int[np.ndarray, " j"]  # … its document …
    grades: Int32[np.ndarray, " j"]  # … and how relevant that is
    idf_shift: float

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """How many queries and documents."""
        return self.queries.count(), self.documents.count()


@dataclass(frozen=True)
class Lab:
    """An array file unpacked and checked; `about` is its lab.json."""

    directory: Path
    about: dict[str, Any]
    config: dict[str, Any]
    pairs: Store
    sets: tuple[TokenSet, ...]

    @property
    def fingerprint(self) -> str:
        """Of everything in the file."""
        return self.about["fingerprint"]

    def plan(self, name: str) -> BatchPlan:
        """The plan of that name, checked against the pairs and against lab.json."""
        if name not in self.about["plans"]:
            raise ValueError(
                f"the array file has no plan {name!r}, only {', '.join(self.about['plans'])}; make it with "
                f"prepare.py --plans {' '.join([*self.about['plans'], name])}"
            )
        plan = BatchPlan.load(self.directory / PLANS / name)
        _same(plan.fingerprint, self.about["plans"][name]["fingerprint"], f"plan {name!r}")
        if plan.manifest["pairs"] != self.pairs.fingerprint:
            raise ValueError(
                f"the plan {name!r} of the array file belongs to other pairs: expected fingerprint "
                f"{self.pairs.fingerprint}, it has {plan.manifest['pairs']}; {_AGAIN}"
            )
        return plan

    @property
    def start(self) -> Path | None:
        """The file of pretrained weights, where there is one."""
        return self.directory / START if self.about["start"] else None


def identity(about: dict[str, Any]) -> str:
    """The fingerprint of a lab.json: of its parts, not of where and when they were made."""
    return fingerprint({key: value for key, value in about.items() if key not in ("fingerprint", "versions")})


def pack(folder: Path, out: Path) -> dict[str, int]:
    """Write the folder's files as one archive, whole or not at all; returns the compressed bytes by part."""
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # the same content gives the same bytes
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file.read_bytes(), compresslevel=9)
            part = "/".join(name.split("/")[:2]) if "/" in name else name
            part = name.split("/")[0] if part.startswith(STORE + "/") else part
            sizes[part] = sizes.get(part, 0) + archive.getinfo(name).compress_size
    os.replace(temporary, out)
    return sizes


def unpack(file: Path, target: Path) -> Lab:
    """The array file as a folder: unpacked at the first call, then taken as it is. Every digest is checked.

    Raises ValueError for a file that is missing, damaged or of another version, and where the folder holds another one.
    """
    about = _described(file)
    if (target / ABOUT).exists():
        there = read_json(target / ABOUT).get("fingerprint")
        if there != about["fingerprint"]:
            raise ValueError(
                f"{target.parent} has results of other arrays: expected fingerprint {about['fingerprint']}, that of "
                f"{file}, its arrays have {there}; choose another --out"
            )
    else:
        with NewFolder(target, marker=ABOUT) as new:
            try:
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(new.path)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise ValueError(f"{file}: damaged ({error}); {_AGAIN}") from None
            new.put_in_place()
    return open_folder(target)


def open_folder(folder: Path) -> Lab:
    """What `unpack` left in a folder, checked against its lab.json."""
    about = _checked(read_json(folder / ABOUT), folder / ABOUT)
    pairs = Store.open(folder / STORE, kind="pairs")
    _same(pairs.fingerprint, about["pairs"]["fingerprint"], "pairs")
    sets = []
    for name, said in about["sets"].items():
        store = Store.open(folder / SETS / name, kind="evaluation")
        _same(store.fingerprint, said["fingerprint"], f"evaluation set {name!r}")
        texts = (store.ragged(f"{kind}_tokens") for kind in ("query", "document", "beginning"))
        arrays = (store.array(array) for array in ("judged", "relevant", "grades"))
        sets.append(TokenSet(name, *texts, *arrays, said["idf_shift"]))
    config = read_json(folder / CONFIG)
    _same(fingerprint(config), about["config"], "configuration")
    if about["start"]:
        _same(hashlib.sha256((folder / START).read_bytes()).hexdigest(), about["start"]["sha256"], "start weights")
    return Lab(folder, about, config, pairs, tuple(sets))


def _described(file: Path) -> dict[str, Any]:
    """lab.json of an archive, of this format."""
    if not file.is_file():
        raise ValueError(f"{file}: expected an array file, there is none; make one with prepare.py --out {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            about = json.loads(archive.read(ABOUT))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not an array file, or damaged ({error}); {_AGAIN}") from None
    return _checked(about, file)


def _checked(about: dict[str, Any], where: Path) -> dict[str, Any]:
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{where}: expected an array file of format {FORMAT}, got {about.get('format')!r}; make it again with "
            "this version's prepare.py"
        )
    _same(identity(about), about.get("fingerprint"), ABOUT)
    return about


def _same(got: str, expected: str | None, what: str) -> None:
    if got != expected:
        raise ValueError(f"the array file's {what} was altered: expected fingerprint {expected}, got {got}; {_AGAIN}")
