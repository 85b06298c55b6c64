"""A work directory: the names of its files, what `prepare` leaves for the other stages, and one process at a time."""

import fcntl
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

from cde_jax.batching.plan import BatchPlan
from cde_jax.config import Config, Identity, affected, flatten
from cde_jax.data.files import fingerprint, read_json
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

log = logging.getLogger(__name__)

CONFIG, LOCK, TRAINING, METRICS = "config.json", ".lock", "training.json", "metrics.jsonl"
RANKINGS, EVALUATION, PER_QUERY = "rankings.json", "evaluation.json", "per_query.json"
STORE, PLAN, LAYOUTS, CHECKPOINTS, EXPORT = "store", "plan", "layouts.json", "checkpoints", "export"
PAIRS, VECTORS, FILTER_VECTORS, LSA = (f"store/{name}" for name in ("pairs", "vectors", "filter_vectors", "lsa"))
TOKENIZER, COLLECTIONS, SETS, TOKENS = (
    f"store/{name}" for name in ("tokenizer", "collections", "evaluation", "evaluation_tokens")
)

# Settings that name a model which may move: what is in its folder counts.
BY_CONTENT = ("data.tokenizer", "batching.surrogate", "batching.filter_surrogate")


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
    check_identity(workdir / PAIRS, {"settings": pairs_settings(config, pairs.manifest)}, pairs.manifest["source"])
    plan = BatchPlan.load(workdir / PLAN)
    plan.verify(pairs.fingerprint, config.batching.plan_settings(config.seed))
    return Prepared(pairs, plan, load_tokenizer(workdir, pairs))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, not verified; {} where none can be read."""
    with suppress(ValueError):
        return read_json(folder / "manifest.json", dict)
    return {}


def pairs_settings(config: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the pairs; a tokenizer in another folder that is the recorded one counts as the same."""
    settings = config.data.affecting("pairs")
    name, recorded = settings["tokenizer"], manifest.get("source", {}).get("settings", {}).get("tokenizer")
    may_be_the_same = recorded not in (None, name) and _is_folder(name) and importlib.util.find_spec("tokenizers")
    if may_be_the_same and Tokenizer.load(name).fingerprint == manifest.get("tokenizer"):
        settings["tokenizer"] = recorded
    return settings


def load_tokenizer(workdir: Path, pairs: Store) -> Tokenizer | None:
    """The tokenizer of the pairs. Raises ValueError where it is missing, or another one than theirs."""
    folder = workdir / TOKENIZER
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; run --stage=prepare --rebuild")
    if importlib.util.find_spec("tokenizers") is None:
        return None
    tokenizer, recorded = Tokenizer.load(folder), pairs.manifest["tokenizer"]
    if tokenizer.fingerprint != recorded:
        raise ValueError(
            f"{pairs.directory} was made with another tokenizer: expected fingerprint {tokenizer.fingerprint}, that of "
            f"{folder}, it has {recorded}; run --stage=prepare --rebuild"
        )
    return tokenizer


def check_identity(folder: Path, now: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """ValueError, with what differs, where a folder was made from other inputs or settings than `now`."""
    recorded = {key: recorded.get(key) for key in now}
    if (expected := fingerprint(now)) != (got := fingerprint(recorded)):
        different = ", ".join(list(differences(now, recorded).values())[:5])
        raise ValueError(
            f"{folder} was made from other inputs or settings: expected fingerprint {expected}, it has {got} "
            f"({different}). Choose another --workdir, or --rebuild to make it and what depends on it again"
        )


def check_same_run(config: Mapping[str, Any], recorded: Mapping[str, Any], workdir: Path | str) -> None:
    """ValueError when a work directory was made with other settings that decide a run's numbers; lists each.

    A tokenizer or surrogate in another folder is let through: it is compared by content where it is read.
    """
    effect, different, flat = affected(), differences(config, recorded), flatten(config)
    moved = {name for name in different if name in BY_CONTENT and _is_folder(flat[name])}
    decide = {name for name in different if effect.get(name) in get_args(Identity)} - moved
    if lines := [f"- {line}\n" for name, line in different.items() if name in decide]:
        raise ValueError(
            f"{workdir} holds a run with another configuration:\n{''.join(lines)}Use the same configuration to go on "
            "with it, or another --workdir to start a new one; --rebuild starts over in this one and moves its "
            "checkpoints aside."
        )
    if placement := [line for name, line in different.items() if effect.get(name) == "placement" or name in moved]:
        log.warning("the run goes on in another place, or in other pieces: %s", ", ".join(placement))


def _is_folder(name: str) -> bool:
    """Whether a model's name is "DIR" or "KIND:DIR", and the folder is there."""
    path = name.rpartition(":")[2]
    return bool(path) and Path(path).expanduser().is_dir()


def has_checkpoint(workdir: Path) -> bool:
    """Whether a training has left anything to go on from."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def differences(now: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, str]:
    """{"section.key": "section.key: 3 there, 4 now"} of the values that differ, as JSON, in two nested mappings."""
    now, recorded = flatten(now), flatten(recorded)
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in now.items()}
    return {
        key: f"{key}: {recorded.get(key, '(not there)')!r} there, {now.get(key, '(not there)')!r} now"
        for key in sorted(now.keys() | recorded.keys())
        if fingerprint(now.get(key, "(not there)")) != fingerprint(recorded.get(key, "(not there)"))
    }


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
                "choose another folder"
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
