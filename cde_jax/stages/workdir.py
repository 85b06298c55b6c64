"""A work directory: the names of its files, what `prepare` leaves for the other stages, and one process at a time."""

import fcntl
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config, Data, flatten, names_affecting
from cde_jax.data.files import fingerprint, read_json
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

log = logging.getLogger(__name__)

CONFIG, LOCK, TRAINING, METRICS = "config.json", ".lock", "training.json", "metrics.jsonl"
RANKINGS, EVALUATION, PER_QUERY = "rankings.json", "evaluation.json", "per_query.json"
PLAN, CHECKPOINTS, EXPORT = "plan", "checkpoints", "export"
STORE = "store"
PAIRS, VECTORS, FILTER_VECTORS, LSA = (f"store/{name}" for name in ("pairs", "vectors", "filter_vectors", "lsa"))
TOKENIZER, COLLECTIONS, SETS, TOKENS = (
    f"store/{name}" for name in ("tokenizer", "collections", "evaluation", "evaluation_tokens")
)


class Prepared(NamedTuple):
    """What `prepare` leaves for the stages after it; opened and verified once in a run."""

    pairs: Store
    plan: BatchPlan
    tokenizer: Tokenizer | None  # None where the tokenizers library is not installed: tokens are all that is read

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.pairs.manifest["vocab_size"]


def load_prepared(config: Config, workdir: Path) -> Prepared:
    """What `prepare` left in a work directory, checked against each other and the config."""
    pairs = Store.open(workdir / PAIRS, kind="pairs")
    check_identity(workdir / PAIRS, {"settings": pairs_settings(config)}, pairs.manifest["source"])
    plan = BatchPlan.load(workdir / PLAN)
    plan.verify(pairs.fingerprint, config.batching.plan_settings(config.seed))
    return Prepared(pairs, plan, load_tokenizer(workdir, pairs))


def load_tokenizer(workdir: Path, pairs: Store) -> Tokenizer | None:
    """The tokenizer of the pairs. Raises ValueError where it is missing, or another one than theirs."""
    if not (workdir / TOKENIZER / "tokenizer.json").is_file():
        raise ValueError(f"{workdir / TOKENIZER} has no tokenizer.json; run --stage=prepare --rebuild")
    if importlib.util.find_spec("tokenizers") is None:
        return None
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    if tokenizer.fingerprint != pairs.manifest["tokenizer"]:
        raise ValueError(
            f"{workdir / PAIRS} was made with another tokenizer: expected fingerprint {tokenizer.fingerprint}, that of "
            f"{workdir / TOKENIZER}, it has {pairs.manifest['tokenizer']}; run --stage=prepare --rebuild"
        )
    return tokenizer


def pairs_settings(config: Config) -> dict[str, Any]:
    """The settings that a pairs store records."""
    return {name: getattr(config.data, name) for name in names_affecting(Data, "pairs")}


def check_identity(folder: Path, now: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """ValueError, with what differs, where a folder was made from other inputs or settings than `now`."""
    recorded = {key: recorded.get(key) for key in now}
    expected, got = fingerprint(now), fingerprint(recorded)
    if got != expected:
        now, recorded = flatten(now), flatten(recorded)
        keys = [k for k in {**now, **recorded} if fingerprint(now.get(k, "")) != fingerprint(recorded.get(k, ""))]
        different = ", ".join(f"{key}: {recorded.get(key)!r} there, {now.get(key)!r} now" for key in keys[:5])
        raise ValueError(
            f"{folder} was made from other inputs or settings: expected fingerprint {expected}, it has {got} "
            f"({different}). Choose another --workdir, or --rebuild to make it and what depends on it again"
        )


def read_record(file: Path, **types: type) -> dict[str, Any] | None:
    """The object in a JSON file of a work directory, with keys of these types; None where there is no file.

    Raises ValueError for a file that holds something else.
    """
    if not file.exists():
        return None
    record = read_json(file)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in types.items()):
        raise ValueError(f"{file}: expected an object with {', '.join(types)}, found something else: move it away")
    return record


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other processes out of a work directory. The kernel drops the lock of a process that ends or is killed."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{workdir} is used by another process, pid {file.read() or 'unknown'}: wait until that one ends, or "
                "choose another --workdir"
            ) from None
        except OSError:  # a file system without locks
            log.warning("%s cannot be locked: run no other process in it", workdir)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def move_aside(folder: Path) -> None:
    """Rename a folder to the first free FOLDER.before-N."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    log.warning("%s was moved to %s", folder, aside)
