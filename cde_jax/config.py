"""Every setting of a run, declared once: type, default, range, meaning. `configs/base.py` derives from it.

`from_config_dict` turns a ConfigDict (or a nested dict) into a checked `Config`; nothing else reads a ConfigDict. The
defaults are those of the paper's large setting where it has one (arXiv 2410.02525, section 5 and appendix).
"""

import copy
import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin

SURROGATES = '"lsa", "sentence-transformers:NAME" or "checkpoint:DIR"'
AUTO = -1  # a chunk size that is chosen by the device's memory

# What a setting changes. A work directory refuses to go on with another value, except for "nothing" and "evaluation".
Affects = Literal["pairs", "vectors", "plan", "training", "evaluation", "nothing"]


def setting(default: Any, low: Any = None, high: Any = None, *, choices=(), affects: Affects | None = None) -> Any:
    """A dataclass field with its range (both ends included) or choices; `affects` None: as the section says."""
    metadata = {"low": low, "high": high, "choices": choices, "affects": affects}
    return dataclasses.field(default=default, metadata=metadata)


class SettingsError(ValueError):
    """One or more settings that cannot be used; `problems` has a line for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("the configuration cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems))


class _Section:
    """Checks its fields when it is made. Raises SettingsError."""

    name: ClassVar[str] = ""
    affects: ClassVar[Affects] = "nothing"

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            problems += _range_problems(f"{self.name}.{field.name}".lstrip("."), getattr(self, field.name), field)
        if problems := problems or list(self.conflicts()):
            raise SettingsError(problems)

    def conflicts(self) -> Iterator[str]:
        """Settings that are allowed each by itself, but not together."""
        return iter(())


@dataclasses.dataclass(frozen=True)
class Data(_Section):
    """Where pairs and evaluation sets come from, and how they are tokenised."""

    name: ClassVar[str] = "data"
    affects: ClassVar[Affects] = "pairs"

    # "docstrings" of installed packages; "jsonl" files of pairs; "tfds": published collections in their own formats;
    # "huggingface": data sets or Parquet files by name or path
    source: str = setting("docstrings", choices=("docstrings", "jsonl", "tfds", "huggingface"))
    # jsonl: files or folders of {"query", "document", "domain"?, "negatives"?} lines, plain or .gz; huggingface: data
    # sets or Parquet files; tfds: the one folder of the collections' files. Only their content counts
    paths: tuple[str, ...] = setting((), affects="nothing")
    collections: tuple[str, ...] = ()  # tfds: names from the table in data/sources/collections.py
    columns: tuple[str, ...] = ()  # huggingface: columns under other names, ("query=question", …)
    # docstrings: of our requirements, or of all packages
    packages: str = setting("core", choices=("core", "installed"))
    standard_library: bool = False  # docstrings: read Python's own too (they differ between Python versions)
    held_out: tuple[str, ...] = ()  # docstrings: packages kept out of training as evaluation sets
    evaluation: tuple[str, ...] = setting((), affects="evaluation")  # folders of evaluation sets in BEIR form
    tokenizer: str = "wordpiece"  # "wordpiece" trained on the pairs, or a pretrained one by name or path
    vocab_size: int = setting(8192, 64, 2**24)  # tokens of a trained WordPiece
    query_prefix: str = "search_query: "  # put before every query
    document_prefix: str = "search_document: "  # put before every document, context documents too
    query_length: int = setting(512, 3, 2**16)  # tokens kept of a query, [CLS] and [SEP] included
    document_length: int = setting(512, 3, 2**16)  # tokens kept of a document

    @property
    def evaluation_names(self) -> tuple[str, ...]:
        """The evaluation sets: held-out packages, then the names of the folders."""
        held_out = self.held_out if self.source == "docstrings" else ()
        return (*held_out, *map(evaluation_name, self.evaluation))

    def conflicts(self) -> Iterator[str]:
        """Each source needs its inputs; evaluation sets need different names."""
        if self.source == "jsonl" and not self.paths:
            yield "`data.paths` is empty: name the jsonl files, e.g. --config.data.paths=\"('pairs.jsonl.gz',)\""
        if self.source == "huggingface" and not self.paths:
            yield "`data.paths` is empty: name data sets or Parquet files, e.g. --config.data.paths=\"('me/pairs',)\""
        if self.source == "tfds" and (len(self.paths) != 1 or not self.collections):
            yield (
                "`data.source` 'tfds' needs `data.collections` by name and the one folder of their files in "
                f"`data.paths`, got {self.collections} and {self.paths}"
            )
        names = self.evaluation_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"evaluation sets need different names (those of their folders), these come twice: {', '.join(twice)}"
        if any(not path.strip() for path in (*self.paths, *self.evaluation)):
            yield f"an empty path is in `data.paths` {self.paths} or `data.evaluation` {self.evaluation}"


@dataclasses.dataclass(frozen=True)
class Batching(_Section):
    """How pairs become a plan. The settings that affect "plan" stand in the plan's manifest."""

    name: ClassVar[str] = "batching"
    affects: ClassVar[Affects] = "plan"

    surrogate: str = setting("lsa", affects="vectors")  # model whose vectors are clustered: one of SURROGATES
    # its prompts (of queries, of documents); (): those saved with the model
    surrogate_prompts: tuple[str, ...] = setting((), affects="vectors")
    filter_surrogate: str = setting("", affects="vectors")  # scores false and hard negatives; "": the surrogate
    filter_prompts: tuple[str, ...] = setting((), affects="vectors")  # its prompts (of queries, of documents)
    surrogate_width: int = setting(128, 2, 2**16, affects="vectors")  # dimensions of the LSA vectors
    vectors_cache: str = setting("", affects="nothing")  # folder by which work directories share surrogate vectors
    # batches of "clustered" pairs, or "random" in a domain
    method: str = setting("clustered", choices=("clustered", "random"))
    batch_size: int = setting(512, 2, 2**24)  # B, queries of a plan batch: the unit of contrast
    # pairs by centroid; some win swapped rows d⊕q only, so clusters are larger (the report has the median)
    cluster_size: int = setting(512, 1, 2**40)
    cluster_dimensions: int = setting(0, 0, 2**16)  # of the vectors that are clustered, reduced by SVD; 0: all
    cluster_rows: int = setting(2**20, 1, 2**40)  # pairs of a domain that centroids are fitted to; others are assigned
    iterations: int = setting(100, 1, 10**6)  # of k-means, at most
    tries: int = setting(3, 1, 10**4)  # k-means runs from different seeds; the best is kept
    # order of the clusters: "random", or a greedy travelling-salesman tour
    packing: str = setting("tsp", choices=("random", "tsp"))
    epochs: int = setting(3, 1, 10**6)  # arrangements of all pairs in the plan, each different
    domain_weights: tuple[str, ...] = ()  # ("NAME=0.5",): half of its batches in an epoch; 2: each row twice
    # K per query: the data's own negatives, then mined ones, then random ones of the group
    hard_negatives: int = setting(0, 0, 2**16)
    mine_first: int = setting(0, 0, 2**20)  # mined negatives: from this rank of the domain's nearest documents, 1 …
    mine_last: int = setting(0, 0, 2**20)  # … to this rank; 0: none are mined
    mine_margin: float = setting(0.05, -2.0, 2.0)  # … and only where f(q, d′) ≤ f(q, d) − margin
    # ε of the false-negative filter (paper eq. 4) on the surrogate's cosine: documents at least this much closer to the
    # query than its own document are no negatives. None: only equal texts are masked
    filter_margin: float | None = setting(0.0, -2.0, 2.0)
    # context is drawn from the "batch" (paper) or its "domain"
    context_source: str = setting("batch", choices=("batch", "domain"), affects="training")
    threads: int = setting(4, 1, 1024, affects="nothing")  # threads that read batches
    prefetch: int = setting(8, 1, 2**16, affects="nothing")  # batches ready ahead

    @property
    def filter_is_surrogate(self) -> bool:
        """Whether the model that places pairs scores false and hard negatives too."""
        same_model = self.filter_surrogate in ("", self.surrogate)
        unset = not (self.filter_surrogate or self.filter_prompts)
        takes_prompts = self.surrogate.startswith("sentence-transformers:")
        return same_model and (unset or not takes_prompts or self.filter_prompts == self.surrogate_prompts)

    def conflicts(self) -> Iterator[str]:
        """Prompts come in pairs, weights have a form, ranks are in order."""
        for name in ("surrogate_prompts", "filter_prompts"):
            if len(prompts := getattr(self, name)) not in (0, 2):
                yield f"`batching.{name}` must be empty or (of queries, of documents), got {prompts!r}"
        weights = [parse_weight(text) for text in self.domain_weights]
        if None in weights:
            yield f'`batching.domain_weights` must have the form ("NAME=0.5", …), 0 or more, got {self.domain_weights}'
        elif len(dict(weights)) < len(weights):
            yield f"`batching.domain_weights` names a domain twice: {self.domain_weights}"
        if self.mine_last and not 1 <= self.mine_first <= self.mine_last:
            yield f"`batching.mine_first` {self.mine_first} … `mine_last` {self.mine_last} must be ranks from 1 up"

    def plan_settings(self, seed: int) -> dict[str, Any]:
        """What the plan is made by, as its manifest has it (JSON types only)."""
        own = {name: getattr(self, name) for name in names_affecting(type(self), "plan")}
        return own | {"domain_weights": list(self.domain_weights), "seed": seed}


@dataclasses.dataclass(frozen=True)
class Init(_Section):
    """Pretrained encoders to start from."""

    name: ClassVar[str] = "model.init"
    affects: ClassVar[Affects] = "training"

    first_stage: str = ""  # pretrained encoder (name or path) the first stage starts from; "": random
    second_stage: str = ""  # … the second stage, or the biencoder
    layers: int = setting(0, 0, 4096)  # only its first layers; 0: all


@dataclasses.dataclass(frozen=True)
class Model(_Section):
    """Shape of the encoder(s)."""

    name: ClassVar[str] = "model"
    affects: ClassVar[Affects] = "training"

    kind: str = setting("contextual", choices=("contextual", "biencoder"))  # two stages, or a plain biencoder
    # "isolated": slots computed once per context; "joint": the paper
    context_attention: str = setting("isolated", choices=("isolated", "joint"))
    context_size: int = setting(512, 0, 2**20)  # J context documents
    backbone: str = setting("nomic", choices=("nomic", "bert"))  # "nomic": rotary positions, SwiGLU, no biases; "bert"
    vocab_size: int = setting(0, 0, 2**24)  # rows of the token embeddings; 0: as many as the tokenizer has
    width: int = setting(768, 1, 2**16)  # D
    layers: int = setting(12, 1, 4096)  # of the second stage (and of a biencoder)
    first_stage_layers: int = setting(0, 0, 4096)  # of the first stage; 0: as many as the second
    heads: int = setting(12, 1, 2**12)  # attention heads
    mlp_width: int = setting(3072, 1, 2**20)  # hidden width of the MLP
    max_positions: int = setting(2048, 1, 2**20)  # longest text, in tokens
    # of a biencoder: an MLP with a residual on its vector, as a contextual model's second stage always has; without it
    # the export is a plain encoder that needs no code of ours
    head: bool = False
    soft_prompt: int = setting(8, 0, 2**16)  # learned tokens between slots and text; 0: none
    # first value of a learned bias per layer and head from text to slots; None: no bias (the paper)
    slot_bias: float | None = setting(-5.0)
    # of the computation; "auto": bfloat16 on accelerators and float32 on CPU
    dtype: str = setting("auto", choices=("float32", "bfloat16", "auto"))
    # attention kernel: "xla"; "blocks", a few texts at a time (CPU); "cudnn", fused (NVIDIA GPUs in bfloat16; not yet
    # run on one); "auto": "blocks" on CPU, else "xla"
    attention: str = setting("auto", choices=("auto", "xla", "blocks", "cudnn"))
    # what each layer computes again in the backward pass: "none"; "full", everything: less memory, about a third more
    # time; "dots", all but products with weights and attention; "auto", by the platform
    remat: str = setting("auto", choices=("auto", "none", "dots", "full"))
    init: Init = dataclasses.field(default_factory=Init)

    def conflicts(self) -> Iterator[str]:
        """Heads divide the width; rotary positions turn pairs of features; a contextual model has a context."""
        if self.width % self.heads:
            yield f"`model.width` {self.width} is not a multiple of `model.heads` {self.heads}"
        elif self.backbone == "nomic" and self.width // self.heads % 2:
            yield f"`model.width` / `model.heads` is {self.width // self.heads}: rotary positions need an even number"
        if self.kind == "contextual" and not self.context_size:
            yield "`model.context_size` is 0, so there is no context to read: choose `model.kind` 'biencoder'"


@dataclasses.dataclass(frozen=True)
class Train(_Section):
    """Optimisation, memory, and how often things happen."""

    name: ClassVar[str] = "train"
    affects: ClassVar[Affects] = "training"

    steps: int = setting(0, 0, 2**31 - 1)  # 0: once through the plan
    devices: int = setting(0, 0, 2**20)  # how many share a step; 0: all there are
    batches_per_step: int = setting(1, 1, 2**20)  # G plan batches per step, shared by the devices
    learning_rate: float = setting(2e-5, 0.0, 1.0)  # peak, of AdamW
    first_stage_rate: float = setting(1.0, 0.0, 1000.0)  # the first stage's, as a factor; 0: the first stage is frozen
    warmup_steps: int = setting(1000, 0, 2**31 - 1)  # linear, then linear decay to zero
    weight_decay: float = setting(0.01, 0.0, 1.0)  # of matrices
    clip_norm: float = setting(1.0, 1e-9, 1e9)  # largest global norm of the gradient
    temperature: float = setting(0.02, 1e-4, 10.0)  # τ
    sequence_dropout: float = setting(0.005, 0.0, 1.0)  # p that the null embedding replaces a context document
    share_negatives: bool = False  # contrast across all plan batches of a step instead of within each
    # padded lengths that texts run at, chosen to fit the plan; each takes time to compile. Texts are sorted by length
    # into chunks that are recomputed in the backward pass
    text_lengths: int = setting(12, 1, 256)
    # texts of the longest length whose tokens one chunk of queries and documents holds; 0: a fitting number (8192
    # tokens on accelerators); -1: as many as the device's memory holds
    document_chunk: int = setting(0, AUTO, 2**24)
    context_chunk: int = setting(0, AUTO, 2**24)  # the same for context documents
    memory_gib: float = setting(0.0, 0.0, 1e6)  # GiB of a step, for chunks of -1; 0: 0.9 of what the device has
    # of a device, for utilisation in metrics.jsonl; 0: the maker's, if known
    peak_tflops: float = setting(0.0, 0.0, 1e9, affects="nothing")
    # steps traced by jax.profiler into profile/, from the 4th of a run on
    profile_steps: int = setting(0, 0, 10**6, affects="nothing")
    log_every: int = setting(10, 1, 2**31 - 1, affects="nothing")  # steps between lines of metrics.jsonl
    checkpoint_every: int = setting(500, 0, 2**31 - 1, affects="nothing")  # steps; 0: only at the end
    # steps between scores on the development set; 0: only at the end
    evaluate_every: int = setting(0, 0, 2**31 - 1, affects="nothing")

    def conflicts(self) -> Iterator[str]:
        """Warm-up ends before the last step."""
        if self.steps and self.warmup_steps >= self.steps:
            yield f"`train.warmup_steps` {self.warmup_steps} must be fewer than `train.steps` {self.steps}"


@dataclasses.dataclass(frozen=True)
class Evaluate(_Section):
    """What is measured at the end, and by which set the best checkpoint is chosen."""

    name: ClassVar[str] = "evaluate"
    affects: ClassVar[Affects] = "evaluation"

    # evaluation set whose score picks the best checkpoint and which is not reported; "": the newest is the best
    development: str = ""
    checkpoint: str = setting("best", choices=("best", "newest"))  # which checkpoint is evaluated and exported
    cutoff: int = setting(10, 1, 10**6)  # k of NDCG@k
    baselines: bool = True  # BM25 and the LSA surrogate beside the model


@dataclasses.dataclass(frozen=True)
class Config(_Section):
    """A whole run."""

    affects: ClassVar[Affects] = "training"

    seed: int = setting(0, 0, 2**32 - 1)  # of data order, clusters, parameters, context draws and dropout
    data: Data = dataclasses.field(default_factory=Data)
    batching: Batching = dataclasses.field(default_factory=Batching)
    model: Model = dataclasses.field(default_factory=Model)
    train: Train = dataclasses.field(default_factory=Train)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written to config.json."""
        return dataclasses.asdict(self)

    def conflicts(self) -> Iterator[str]:
        """Settings of different sections that do not fit each other."""
        d, m, development = self.data, self.model, self.evaluate.development
        longest = max(d.query_length, d.document_length)
        if longest > m.max_positions:
            yield f"texts of {longest} tokens do not fit `model.max_positions` = {m.max_positions}"
        if d.tokenizer == "wordpiece" and 0 < m.vocab_size < d.vocab_size:
            yield f"`model.vocab_size` {m.vocab_size} has no room for the `data.vocab_size` {d.vocab_size} tokens"
        if development and development not in d.evaluation_names:
            yield f"`evaluate.development` {development!r} is none of the evaluation sets {d.evaluation_names}"

    def unused(self) -> list[str]:
        """Settings that were changed and have no effect beside the others, as "section.key"."""
        d, b = self.data, self.batching
        used = {
            "data.packages data.standard_library data.held_out": d.source == "docstrings",
            "data.paths": d.source != "docstrings",
            "data.collections": d.source == "tfds",
            "data.columns": d.source == "huggingface",
            "data.vocab_size": d.tokenizer == "wordpiece",
            "batching.surrogate_width": "lsa" in (b.surrogate, b.filter_surrogate),
            "batching.mine_first batching.mine_last batching.mine_margin": b.hard_negatives > 0,
        }
        now, default = flatten(self.as_dict()), flatten(Config().as_dict())
        names = [name for names, needed in used.items() if not needed for name in names.split()]
        return [name for name in names if now[name] != default[name]]


def evaluation_name(path: str) -> str:
    """Name of the evaluation set in a folder: the folder's own."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def parse_weight(text: str) -> tuple[str, float] | None:
    """("NAME", 0.5) of "NAME=0.5"; None for another form, and for a number below 0 or not finite."""
    name, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return None
    return (name, weight) if name and math.isfinite(weight) and weight >= 0 else None


def affected(section: type[_Section] = Config, prefix: str = "") -> dict[str, Affects]:
    """{"section.key": what it affects} of every setting."""
    table: dict[str, Affects] = {}
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            table |= affected(field.type, f"{prefix}{field.name}.")
        else:
            table[prefix + field.name] = field.metadata.get("affects") or section.affects
    return table


def names_affecting(section: type[_Section], *what: Affects) -> tuple[str, ...]:
    """Fields of a section that affect one of `what`, in the order of their declaration."""
    return tuple(name for name, effect in affected(section).items() if effect in what and "." not in name)


def is_setting(name: str) -> bool:
    """Whether "section.key" is a setting, or "section" a section."""
    return any(f"{key}.".startswith(f"{name}.") for key in affected())


def unknown_setting(name: str, known: Iterable[str] = ()) -> str:
    """What to say of a setting "section.key" that is none; `known` are the keys of its section."""
    section, dot, key = name.rpartition(".")
    prefix = section + dot
    known = list(known) or [k.removeprefix(prefix).partition(".")[0] for k in affected() if k.startswith(prefix)]
    if not known:  # no such section
        prefix, key, known = "", name, list(affected())
    known = list(dict.fromkeys(known))
    if near := difflib.get_close_matches(key, known, n=1):
        return f"unknown key `{name}`: did you mean `{prefix}{near[0]}`?"
    return f"unknown key `{name}`: known keys here: {', '.join(known)}"


def with_changes(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration, as a nested dict, with each {"section.key": value} put in.

    `config` is a Config, a ConfigDict or a nested dict. Raises SettingsError for names that it does not have.
    """
    changed, problems = _nested(config), []
    for name, value in changes.items():
        *sections, key = name.split(".")
        place: Any = changed
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and key in place and not isinstance(place[key], dict):
            place[key] = value
        else:
            problems.append(unknown_setting(name))
    if problems:
        raise SettingsError(problems)
    return changed


def from_config_dict(config: Any) -> Config:
    """Build and check a `Config` from a ConfigDict or a nested dict that has every key.

    Raises SettingsError, a ValueError that names every unknown key (with the nearest known one) and every bad value.
    """
    problems: list[str] = []
    built = _build(Config, _nested(config), "", problems)
    if problems:
        raise SettingsError(problems)
    return built


def _nested(config: Any) -> dict[str, Any]:
    values = next((getattr(config, name)() for name in ("as_dict", "to_dict") if hasattr(config, name)), config)
    if not isinstance(values, Mapping):
        raise SettingsError([f"expected a ConfigDict (of get_config) or a nested dict, got {type(values).__name__}"])
    return copy.deepcopy(dict(values))


def _build(section: type[_Section], values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(section)}
    before, arguments = len(problems), {}
    problems += [unknown_setting(f"{prefix}{key}", fields) for key in sorted(values.keys() - fields.keys())]
    for name, expected in fields.items():
        if name not in values:
            problems.append(f"`{prefix}{name}` is missing: start from configs/base.py, which has every key")
        elif not dataclasses.is_dataclass(expected):
            arguments[name] = _converted(values[name], expected)
            problems += _type_problems(prefix + name, arguments[name], expected)
        elif isinstance(values[name], Mapping):
            arguments[name] = _build(expected, values[name], f"{prefix}{name}.", problems)
        else:
            problems.append(f"`{prefix}{name}` must be a section of keys, got {values[name]!r}")
    if len(problems) > before:
        return None
    try:
        return section(**arguments)
    except SettingsError as error:
        problems += error.problems
        return None


def _converted(value: Any, expected: Any) -> Any:
    """Lists as tuples, and whole numbers as floats where a float is expected."""
    if isinstance(value, list):
        return tuple(value)
    is_float = float in (get_args(expected) or (expected,))
    if is_float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    return value


def _type_problems(name: str, value: Any, expected: Any) -> list[str]:
    if get_origin(expected) is tuple:
        fits = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        kind = "a tuple of texts, e.g. ('a',)"
    else:
        fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        kind = getattr(expected, "__name__", str(expected))
    return [] if fits else [f"`{name}` must be {kind}, got {value!r}"]


def _range_problems(name: str, value: Any, field: dataclasses.Field) -> list[str]:
    if value is None or not field.metadata:
        return []
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        return [f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}"]
    if low is not None and not low <= value <= high:  # NaN too
        return [f"`{name}` must be ≥ {low} and ≤ {high}, got {value}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"`{name}` must be a finite number, got {value}"]
    return []


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def check_same_run(now: Mapping[str, Any], before: Mapping[str, Any], where: str) -> None:
    """ValueError when a work directory was made with other settings that change results; lists each."""
    now, before, effect = flatten(now), flatten(before), affected()
    as_json = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731  (JSON has no tuples)
    different = [
        f"- {name}: {before.get(name, '(not there)')!r} there, {as_json(now.get(name, '(not there)'))!r} now"
        for name in sorted(now.keys() | before.keys())
        if effect.get(name) not in ("nothing", "evaluation") and as_json(now.get(name)) != as_json(before.get(name))
    ]
    if different:
        raise ValueError(
            f"{where} holds a run with another configuration:\n" + "\n".join(different) + "\n"
            "Use the same configuration to go on with it, or another --workdir to start a new one; --rebuild starts "
            "over in this one and moves its checkpoints aside."
        )
