"""Everything that a laboratory needs, from pair files and evaluation sets, in one array file.

python benchmarks/quality/prepare.py --out lab.zip --pairs FILES… --evaluation FOLDERS… [--plans random clustered …]
    [--start DIR --start-layers 3] [--queries 150 --documents 800] [--config minilm] [--set key=value …]

It is the project's own preparation: store, surrogate vectors and plans stay in `--workdir` (default: beside the file),
where a second call finds them. `--start` names a pretrained encoder (its tokenizer is used, its first layers go into
the file); without it a WordPiece is trained on the pairs. `--queries` and `--documents` cut each evaluation set down.
"""

import argparse
import hashlib
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from harness import machine as about  # noqa: E402

from cde_jax.batching.plan import BatchPlan  # noqa: E402
from cde_jax.config import Config, from_config_dict  # noqa: E402
from cde_jax.data.files import fingerprint, write_file, write_json  # noqa: E402
from cde_jax.data.store import Store, StoreWriter  # noqa: E402
from cde_jax.data.tokens import Tokenizer  # noqa: E402
from cde_jax.stages.prepare import PAIRS, PLAN, TOKENIZER, open_source, prepare  # noqa: E402
from quality import arrays, evaluation  # noqa: E402
from quality import variants as grid  # noqa: E402
from quality.settings import override, parse  # noqa: E402

log = logging.getLogger(__name__)

PACKAGES = ("jax", "numpy", "faiss-cpu", "scikit-learn", "tokenizers")
# Of the configuration, before --set. Texts are short for a small file; one epoch, for the loader goes round.
DEFAULTS: dict[str, Any] = {
    "data.source": "jsonl",
    "data.held_out": (),
    "data.query_length": 32,
    "data.document_length": 64,
    "batching.batch_size": 128,
    "batching.cluster_size": 512,
    "batching.epochs": 1,
    "model.init.first_stage": "",
    "model.init.second_stage": "",
    "model.init.layers": 0,
    "model.first_stage_layers": 0,
    "train.steps": 0,
    "evaluate.development": "",
}
KEPT = ("fingerprint", "pairs", "documents", "domains", "tokens", "prefixes", "lengths", "tokenizer")  # of a manifest


def main(arguments: list[str] | None = None) -> None:
    """Prepare, pack, and say what each part weighs."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("cde_jax", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        sizes = make(_arguments(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for part, size in sizes.items():
        print(f"{size / 1e6:9.3f} MB  {part}")
    print(f"{sum(sizes.values()) / 1e6:9.3f} MB  in all")


def make(args: argparse.Namespace) -> dict[str, int]:
    """Write the array file; returns compressed bytes by part. All inputs are looked at before anything is made."""
    plans = grid.plans(args.plans)
    sets = evaluation.read_all(args.evaluation)
    base = configuration(args)
    configs = {name: from_config_dict(override(base.as_dict(), change)) for name, change in plans.items()}
    encoder = _start(args.start, args.start_layers, base) if args.start else None
    work = args.workdir or args.out.with_name(args.out.name + ".work")
    for name, config in configs.items():
        _plan(config, work, name)
    pairs, tokenizer = Store.open(work / PAIRS, kind="pairs"), Tokenizer.load(work / TOKENIZER)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        folder = Path(scratch)
        slim = _slim(pairs, folder / arrays.STORE)
        for name in plans:
            shutil.copytree(_place(work, name), folder / arrays.PLANS / name)
        rates = evaluation.document_rates(slim.ragged("document_tokens"), tokenizer.vocab_size)
        described = {
            one.name: evaluation.write(
                evaluation.cut(one, args.queries, args.documents, base.seed),
                folder / arrays.SETS / one.name, tokenizer, base, rates,
            )
            for one in sets
        }  # fmt: skip
        write_json(folder / arrays.CONFIG, _portable(base).as_dict())
        said = {
            "format": arrays.FORMAT,
            "settings": {"queries": args.queries, "documents": args.documents, "seed": base.seed},
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "config": fingerprint(arrays.read_json(folder / arrays.CONFIG)),
            "pairs": {"fingerprint": slim.fingerprint, "pairs": slim.manifest["pairs"]},
            "plans": {name: _summary(folder / arrays.PLANS / name, change) for name, change in plans.items()},
            "sets": described,
            "start": _write_start(folder, encoder, args) if encoder is not None else None,
            "versions": about(*PACKAGES),
        }
        said["fingerprint"] = arrays.identity(said)
        write_json(folder / arrays.ABOUT, said)
        return arrays.pack(folder, args.out)


def configuration(args: argparse.Namespace) -> Config:
    """The named config with the laboratory's defaults and the changes asked for."""
    named = __import__(f"configs.{args.config}", fromlist=["get_config"]).get_config().to_dict()
    changes = DEFAULTS | {"data.paths": tuple(args.pairs), "data.tokenizer": args.start or "wordpiece"}
    if args.start:
        changes["model.layers"] = args.start_layers
    return from_config_dict(override(named, changes, parse(args.set)))


def _plan(config: Config, work: Path, name: str) -> None:
    """The named plan by the project's own stage, made or kept."""
    place = _place(work, name)
    if place.exists():
        pairs = Store.open(work / PAIRS, kind="pairs", verify=False)
        BatchPlan.load(place).verify(pairs.fingerprint, config.batching.plan_settings(config.seed))
        return
    log.info("plan %s", name)
    prepare(config, work, open_source(config, work))
    place.parent.mkdir(parents=True, exist_ok=True)
    (work / PLAN).rename(place)


def _place(work: Path, name: str) -> Path:
    return work / "plans" / name


def _summary(folder: Path, change: dict[str, Any]) -> dict[str, Any]:
    plan = BatchPlan.load(folder)
    said = {"fingerprint": plan.fingerprint, "overrides": change, "batches": len(plan)}
    return said | {"difficulty": plan.manifest["difficulty"]}


def _slim(pairs: Store, folder: Path) -> Store:
    """The pairs store as training reads it: tokens and domains, under the same fingerprint."""
    with StoreWriter(folder, "pairs") as writer:
        for name in ("query_tokens", "document_tokens"):
            ragged = pairs.ragged(name)
            writer.append(f"{name}.offsets", ragged.offsets)
            writer.append(f"{name}.values", ragged.values)
        writer.append("domain", pairs.array("domain"))
        return writer.finish({key: pairs.manifest[key] for key in KEPT})


def _portable(config: Config) -> Config:
    """Without paths of this machine: the second command reads none of them."""
    d = config.data
    names = {"data.paths": [Path(path).name for path in d.paths], "data.tokenizer": Path(d.tokenizer).name}
    return from_config_dict(override(config.as_dict(), names | {"data.evaluation": ()}))


def _start(name: str, layers: int, config: Config):
    """The pretrained encoder, of the shape that the configuration's model has."""
    from cde_jax.interop.read import load_encoder
    from cde_jax.stages.assemble import encoder_config

    encoder = load_encoder(name, layers)
    ours = encoder_config(config.model, encoder.config.vocab_size, layers, "float32")
    different = [
        f"{field}: the configuration says {ours!r}, the start {theirs!r}"
        for field, ours in vars(ours).items()
        if field not in ("dtype", "attention", "remat") and ours != (theirs := getattr(encoder.config, field))
    ]
    if different:
        raise ValueError(f"--start {name} is of another shape than the model: {'; '.join(different)}; --set model.…")
    return encoder


def _write_start(folder: Path, encoder: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Its weights in float16, by their paths in our encoder."""
    from flax import nnx
    from safetensors.numpy import save

    flat = nnx.to_flat_state(nnx.state(encoder, nnx.Param))
    tensors = {".".join(map(str, path)): np.asarray(leaf[...]).astype(np.float16) for path, leaf in flat}
    content = save(tensors)
    write_file(folder / arrays.START, content)
    digest = hashlib.sha256(content).hexdigest()
    return {"name": Path(args.start).name, "layers": args.start_layers, "sha256": digest}


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the array file, lab.zip")
    parser.add_argument("--pairs", nargs="+", required=True, help="files or folders of pairs, .jsonl or .jsonl.gz")
    parser.add_argument("--evaluation", nargs="+", required=True, help="sets in BEIR form, or folders of such sets")
    parser.add_argument("--plans", nargs="+", default=["random", "clustered"], help=", ".join(grid.PLANS))
    parser.add_argument("--start", default="", help="a pretrained encoder: directory or hub name")
    parser.add_argument("--start-layers", type=int, default=3)
    parser.add_argument("--queries", type=int, default=0, help="at most so many of each evaluation set; 0: all")
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--config", default="minilm", help="a module of configs/")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
