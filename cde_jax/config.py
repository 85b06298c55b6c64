"""The run's configuration as frozen dataclasses, built from a ConfigDict and checked; nothing else reads a ConfigDict.

What each key means is said once, in `configs/base.py`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_origin

from cde_jax.training.memory import AUTO


@dataclasses.dataclass(frozen=True)
class Data:
    """Where pairs and evaluation sets come from, and how they are tokenised."""

    source: str
    paths: tuple[str, ...]
    collections: tuple[str, ...]
    columns: tuple[str, ...]
    packages: str
    standard_library: bool
    held_out: tuple[str, ...]
    evaluation: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    query_prefix: str
    document_prefix: str
    query_length: int
    document_length: int


@dataclasses.dataclass(frozen=True)
class Batching:
    """How pairs become a plan."""

    surrogate: str
    surrogate_prompts: tuple[str, ...]
    filter_surrogate: str
    filter_prompts: tuple[str, ...]
    surrogate_width: int
    method: str
    batch_size: int
    cluster_size: int
    cluster_dimensions: int
    cluster_rows: int
    iterations: int
    tries: int
    packing: str
    epochs: int
    domain_weights: tuple[str, ...]
    hard_negatives: int
    mine_first: int
    mine_last: int
    mine_margin: float
    filter_margin: float | None
    context_source: str
    threads: int
    workers: int
    prefetch: int


@dataclasses.dataclass(frozen=True)
class Init:
    """Pretrained encoders to start from."""

    first_stage: str
    second_stage: str
    layers: int


@dataclasses.dataclass(frozen=True)
class Model:
    """Shape of the encoder(s)."""

    kind: str
    context_attention: str
    context_size: int
    backbone: str
    vocab_size: int
    width: int
    layers: int
    first_stage_layers: int
    heads: int
    mlp_width: int
    max_positions: int
    head: bool
    soft_prompt: int
    slot_bias: float | None
    dtype: str
    attention: str
    remat: str
    init: Init


@dataclasses.dataclass(frozen=True)
class Train:
    """Optimisation, memory, and how often things happen."""

    steps: int
    devices: int
    batches_per_step: int
    learning_rate: float
    first_stage_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    temperature: float
    sequence_dropout: float
    share_negatives: bool
    text_lengths: int
    query_chunk: int
    document_chunk: int
    context_chunk: int
    memory_gib: float
    peak_tflops: float
    profile_steps: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What is measured at the end, and by which set the best checkpoint is chosen."""

    development: str
    checkpoint: str
    cutoff: int
    baselines: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int
    data: Data
    batching: Batching
    model: Model
    train: Train
    evaluate: Evaluate

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written to config.json."""
        return dataclasses.asdict(self)


_CHOICES = {
    "data.source": ("docstrings", "jsonl", "tfds", "huggingface"),
    "data.packages": ("core", "installed"),
    "batching.method": ("clustered", "random"),
    "batching.packing": ("random", "tsp"),
    "batching.context_source": ("batch", "domain"),
    "model.kind": ("contextual", "biencoder"),
    "model.context_attention": ("isolated", "joint"),
    "model.backbone": ("nomic", "bert"),
    "model.dtype": ("float32", "bfloat16", "auto"),
    "model.attention": ("auto", "xla", "blocks", "cudnn"),
    "model.remat": ("auto", "none", "dots", "full"),
    "evaluate.checkpoint": ("best", "newest"),
}
# key: smallest value allowed; the largest where there is one
_RANGES = {
    "seed": (0,),
    "data.vocab_size": (64,),
    "data.query_length": (3,),
    "data.document_length": (3,),
    "batching.surrogate_width": (2,),
    "batching.batch_size": (2,),
    "batching.cluster_size": (1,),
    "batching.cluster_dimensions": (0,),
    "batching.cluster_rows": (1,),
    "batching.iterations": (1,),
    "batching.tries": (1,),
    "batching.epochs": (1,),
    "batching.hard_negatives": (0,),
    "batching.mine_first": (0,),
    "batching.mine_last": (0,),
    "batching.mine_margin": (-2.0, 2.0),
    "batching.filter_margin": (-2.0, 2.0),
    "batching.threads": (1,),
    "batching.workers": (0,),
    "batching.prefetch": (1,),
    "model.context_size": (0,),
    "model.vocab_size": (0,),
    "model.width": (1,),
    "model.layers": (1,),
    "model.first_stage_layers": (0,),
    "model.heads": (1,),
    "model.mlp_width": (1,),
    "model.max_positions": (1,),
    "model.soft_prompt": (0,),
    "model.init.layers": (0,),
    "train.steps": (0,),
    "train.devices": (0,),
    "train.batches_per_step": (1,),
    "train.learning_rate": (0.0, 1.0),
    "train.first_stage_rate": (0.0, 1000.0),
    "train.warmup_steps": (0,),
    "train.weight_decay": (0.0,),
    "train.clip_norm": (1e-9,),
    "train.temperature": (1e-4, 10.0),
    "train.sequence_dropout": (0.0, 1.0),
    "train.text_lengths": (1,),
    "train.query_chunk": (AUTO,),
    "train.document_chunk": (AUTO,),
    "train.context_chunk": (AUTO,),
    "train.memory_gib": (0.0,),
    "train.peak_tflops": (0.0,),
    "train.profile_steps": (0,),
    "train.log_every": (1,),
    "train.checkpoint_every": (0,),
    "train.evaluate_every": (0,),
    "evaluate.cutoff": (1,),
}
# Keys that may differ between two runs of one work directory: they do not change any number that training computes.
FREE = {
    "data.evaluation",
    "evaluate.development",
    "batching.threads",
    "batching.workers",
    "batching.prefetch",
    "train.peak_tflops",
    "train.profile_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.evaluate_every",
    "evaluate.checkpoint",
    "evaluate.cutoff",
    "evaluate.baselines",
}


def from_config_dict(config: Any) -> Config:
    """Build and check a `Config` from a ConfigDict or a nested dict.

    Raises ValueError that names every unknown key (with the nearest known one) and every bad value.
    """
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    problems: list[str] = []
    built = _build(Config, plain, "", problems)
    if not problems:
        problems += _problems(built)
    if problems:
        raise ValueError("the configuration cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems))
    return built


def _build(kind: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in sorted(values.keys() - fields.keys()):
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known keys here: {', '.join(fields)}"
        problems.append(f"unknown key `{prefix}{name}`: {hint}")
    built = {}
    for name, expected in fields.items():
        if name not in values:
            problems.append(f"`{prefix}{name}` is missing: start from configs/base.py, which declares every key")
        elif dataclasses.is_dataclass(expected) and not isinstance(values[name], Mapping):
            problems.append(f"`{prefix}{name}` must be a section of keys, got {values[name]!r}")
        elif dataclasses.is_dataclass(expected):
            built[name] = _build(expected, values[name], f"{prefix}{name}.", problems)
        else:
            built[name] = _value(values[name], expected, prefix + name, problems)
    return None if problems else kind(**built)


def _value(value: Any, expected: Any, name: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in getattr(expected, "__args__", (expected,)):
        value = float(value)
    if get_origin(expected) is tuple:
        fits = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    else:
        fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if not fits:
        problems.append(f"`{name}` must be {_type_name(expected)}, got {value!r}")
    return value


def _type_name(expected: Any) -> str:
    if get_origin(expected) is tuple:
        return "a tuple of texts, e.g. ('one',)"
    return getattr(expected, "__name__", str(expected))


def _problems(config: Config) -> list[str]:
    flat = flatten(config.as_dict())
    problems = [
        f"`{name}` must be one of {', '.join(map(repr, choices))}, got {flat[name]!r}"
        for name, choices in _CHOICES.items()
        if flat[name] not in choices
    ]
    for name, (low, *high) in _RANGES.items():
        value = flat[name]
        if value is not None and not (low <= value and (not high or value <= high[0])):
            problems.append(f"`{name}` must be ≥ {low}{f' and ≤ {high[0]}' if high else ''}, got {value}")
    data, model, train = config.data, config.model, config.train
    if data.source == "jsonl" and not data.paths:
        problems.append("`data.paths` is empty: name the jsonl files, e.g. --config.data.paths=\"('pairs.jsonl.gz',)\"")
    if data.source == "huggingface" and not data.paths:
        problems.append(
            "`data.paths` is empty: name data sets or Parquet files, e.g. --config.data.paths=\"('me/pairs',)\""
        )
    if data.source == "tfds" and (len(data.paths) != 1 or not data.collections):
        problems.append(
            "`data.source` 'tfds' needs `data.collections` by name and the one folder of their files in `data.paths`, "
            f"got {data.collections} and {data.paths}"
        )
    b = config.batching
    for name, prompts in (("surrogate_prompts", b.surrogate_prompts), ("filter_prompts", b.filter_prompts)):
        if len(prompts) not in (0, 2):
            problems.append(f"`batching.{name}` must be empty or (of queries, of documents), got {prompts!r}")
    if b.mine_last and not 1 <= b.mine_first <= b.mine_last:
        problems.append(
            f"`batching.mine_first` {b.mine_first} … `batching.mine_last` {b.mine_last} must be ranks from 1, in order"
        )
    longest = max(data.query_length, data.document_length)
    if longest > model.max_positions:
        problems.append(f"texts of {longest} tokens do not fit `model.max_positions` = {model.max_positions}")
    if model.width % model.heads:
        problems.append(f"`model.width` {model.width} is not a multiple of `model.heads` {model.heads}")
    if model.kind == "contextual" and not model.context_size:
        problems.append("`model.context_size` is 0, so there is no context to read: choose `model.kind` 'biencoder'")
    if train.steps and train.warmup_steps >= train.steps:
        problems.append(f"`train.warmup_steps` {train.warmup_steps} must be fewer than `train.steps` {train.steps}")
    development, sets = config.evaluate.development, (*data.held_out, *map(_set_name, data.evaluation))
    if development and development not in sets:
        problems.append(f"`evaluate.development` {development!r} is none of the evaluation sets {sets}")
    return problems


def _set_name(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def check_same_run(now: Mapping[str, Any], before: Mapping[str, Any], where: str) -> None:
    """ValueError when a work directory was made with other settings that change results; lists each."""
    now, before = flatten(now), flatten(before)
    listed = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731  (JSON has no tuples)
    different = [
        f"- {name}: {before.get(name, '(not there)')!r} there, {listed(now.get(name, '(not there)'))!r} now"
        for name in sorted(now.keys() | before.keys())
        if name not in FREE and listed(now.get(name)) != listed(before.get(name))
    ]
    if different:
        raise ValueError(
            f"{where} holds a run with another configuration:\n" + "\n".join(different) + "\n"
            "Use the same configuration to go on with it, or another --workdir to start a new one; --rebuild starts "
            "over in this one and moves its checkpoints aside."
        )
