"""Every setting of a run, declared once: type or choices, default, range, meaning. `configs/base.py` derives from it.

`from_config_dict` turns a ConfigDict (or a nested dict) into a checked `Config`; nothing else reads a ConfigDict. The
defaults are those of the paper's large setting where it has one (arXiv 2410.02525, section 5 and appendix).
"""

import copy
import dataclasses
import difflib
import functools
import math
import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin

SURROGATES = '"lsa", "sentence-transformers:NAME" or "checkpoint:DIR"'
AUTO = -1  # a chunk size that is chosen by the device's memory
TEMPERATURES = (0.001, 1.0)  # a learned temperature stays between these

# What a setting changes. These decide the numbers of a run, which goes on with the same values only.
Identity = Literal["pairs", "vectors", "plan", "training"]
# Others may change on the way. "start": what a run without a checkpoint starts from; the content is compared.
# "schedule": a change holds from the next step on, and training.json keeps the history. "placement": where a step runs
# and in what pieces, which changes the rounding of its numbers only.
Affects = Identity | Literal["start", "schedule", "placement", "evaluation", "nothing"]


def setting(default: Any, low: Any = None, high: Any = None, *, affects: Affects | None = None) -> Any:
    """A dataclass field with its range, both ends included; `affects` None: as the section says."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "affects": affects})


class SettingsError(ValueError):
    """One or more settings that cannot be used; `problems` has a line for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("the configuration cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems))


class _Section:
    """Settings, checked when they are put together. Raises SettingsError."""

    prefix: ClassVar[str]  # of its keys
    affects: ClassVar[Affects]

    def __init_subclass__(cls, *, prefix: str, affects: Affects):
        cls.prefix, cls.affects = prefix, affects

    def __post_init__(self):
        problems = [_problem(self.prefix, field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        if problems := list(filter(None, problems)) or list(self._conflicts()):
            raise SettingsError(problems)

    def _conflicts(self) -> Iterator[str]:
        """Settings that are allowed each by itself, but not together."""
        return iter(())

    def affecting(self, what: Affects) -> dict[str, Any]:
        """The values of the section's own settings that affect `what`, in the order of their declaration."""
        names = [name.removeprefix(self.prefix) for name, effect in affected(type(self)).items() if effect == what]
        return {name: getattr(self, name) for name in names if "." not in name}


@dataclasses.dataclass(frozen=True)
class Data(_Section, prefix="data.", affects="pairs"):
    """Where pairs and evaluation sets come from, and how they are tokenised."""

    # docstrings of installed packages; files of pairs; published collections in their own formats; data sets or Parquet
    source: Literal["docstrings", "jsonl", "tfds", "huggingface"] = "docstrings"
    # jsonl: files or folders of lines of pairs, plain or .gz; huggingface: data sets or Parquet files; tfds: the folder
    paths: tuple[str, ...] = setting((), affects="nothing")  # … of the collections' files. Only their content counts
    collections: tuple[str, ...] = ()  # tfds: names from the table in data/sources/collections.py
    columns: tuple[str, ...] = ()  # huggingface: columns under other names, ("query=question", …)
    packages: Literal["core", "installed"] = "core"  # docstrings: of our requirements, or of all packages
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

    def _conflicts(self) -> Iterator[str]:
        inputs = {"jsonl": "the jsonl files", "huggingface": "data sets or Parquet files"}.get(self.source)
        if inputs and not self.paths:
            yield f"`data.paths` is empty: name {inputs}, e.g. --config.data.paths=\"('pairs.jsonl.gz',)\""
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
class Batching(_Section, prefix="batching.", affects="plan"):
    """How pairs become a plan. The settings that affect "plan" stand in the plan's manifest."""

    surrogate: str = setting("lsa", affects="vectors")  # model whose vectors are clustered: one of SURROGATES
    surrogate_prompts: tuple[str, ...] = setting((), affects="vectors")  # of queries and documents; (): the model's own
    filter_surrogate: str = setting("", affects="vectors")  # scores false and hard negatives; "": the surrogate
    filter_prompts: tuple[str, ...] = setting((), affects="vectors")  # its prompts (of queries, of documents)
    # of sentence-transformers models; "auto": as saved; bfloat16 takes less time on GPUs
    surrogate_dtype: Literal["auto", "bfloat16"] = setting("auto", affects="vectors")
    surrogate_width: int = setting(128, 2, 2**16, affects="vectors")  # dimensions of the LSA vectors
    vectors_cache: str = setting("", affects="nothing")  # folder by which work directories share surrogate vectors
    method: Literal["clustered", "random"] = "clustered"  # batches of clusters, or random ones of a domain
    batch_size: int = setting(512, 2, 2**24)  # B, queries of a plan batch: the unit of contrast
    cluster_size: int = setting(512, 1, 2**40)  # pairs by centroid; clusters are larger: some win swapped rows d⊕q only
    cluster_dimensions: int = setting(0, 0, 2**16)  # of the vectors that are clustered, reduced by SVD; 0: all
    cluster_rows: int = setting(2**20, 1, 2**40)  # pairs of a domain that centroids are fitted to; others are assigned
    iterations: int = setting(100, 1, 10**6)  # of k-means, at most
    tries: int = setting(3, 1, 10**4)  # k-means runs from different seeds; the best is kept
    packing: Literal["random", "tsp"] = "tsp"  # order of clusters: random, or a greedy travelling-salesman tour
    epochs: int = setting(3, 1, 10**6)  # arrangements of all pairs in the plan, each different
    domain_weights: tuple[str, ...] = ()  # ("NAME=0.5",): half of its batches in an epoch; 2: each row twice
    hard_negatives: int = setting(0, 0, 2**16)  # K per query: the data's own, then mined, then random ones of the group
    mine_first: int = setting(0, 0, 2**20)  # mined negatives: from this rank of the domain's nearest documents, 1 …
    mine_last: int = setting(0, 0, 2**20)  # … to this rank; 0: none are mined
    mine_margin: float = setting(0.05, -2.0, 2.0)  # … and only where f(q, d′) ≤ f(q, d) − margin
    # ε of the false-negative filter (paper eq. 4): documents at least so much closer to a query, by the surrogate's
    filter_margin: float | None = setting(0.0, -2.0, 2.0)  # … cosine, than its own are masked; None: only equal texts
    context_source: Literal["batch", "domain"] = setting("batch", affects="training")  # of the context; "batch": paper
    threads: int = setting(4, 1, 1024, affects="nothing")  # threads that read batches
    prefetch: int = setting(8, 1, 2**16, affects="nothing")  # batches ready ahead

    @property
    def filter_is_surrogate(self) -> bool:
        """Whether the model that places pairs scores false and hard negatives too."""
        same_model = self.filter_surrogate in ("", self.surrogate)
        unset = not (self.filter_surrogate or self.filter_prompts)
        takes_prompts = self.surrogate.startswith("sentence-transformers:")
        return same_model and (unset or not takes_prompts or self.filter_prompts == self.surrogate_prompts)

    def _conflicts(self) -> Iterator[str]:
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
        return self.affecting("plan") | {"domain_weights": list(self.domain_weights), "seed": seed}


@dataclasses.dataclass(frozen=True)
class Init(_Section, prefix="model.init.", affects="training"):
    """Pretrained encoders to start from."""

    # pretrained encoder (name or path) the first stage starts from; "": random
    first_stage: str = setting("", affects="start")
    second_stage: str = setting("", affects="start")  # … the second stage, or the biencoder
    layers: int = setting(0, 0, 4096)  # only its first layers; 0: all


@dataclasses.dataclass(frozen=True)
class Model(_Section, prefix="model.", affects="training"):
    """Shape of the encoder(s)."""

    kind: Literal["contextual", "biencoder"] = "contextual"  # two stages, or a plain biencoder
    context_attention: Literal["isolated", "joint"] = "isolated"  # slots computed once per context, or as in the paper
    context_size: int = setting(512, 0, 2**20)  # J context documents
    backbone: Literal["nomic", "bert"] = "nomic"  # "nomic": rotary positions, SwiGLU, no biases
    vocab_size: int = setting(0, 0, 2**24)  # rows of the token embeddings; 0: as many as the tokenizer has
    width: int = setting(768, 1, 2**16)  # D
    layers: int = setting(12, 1, 4096)  # of the second stage (and of a biencoder)
    first_stage_layers: int = setting(0, 0, 4096)  # of the first stage; 0: as many as the second
    heads: int = setting(12, 1, 2**12)  # attention heads
    mlp_width: int = setting(3072, 1, 2**20)  # hidden width of the MLP
    max_positions: int = setting(2048, 1, 2**20)  # longest text, in tokens
    head: bool = False  # of a biencoder: an MLP with a residual on its vector; without, its export is a plain encoder
    soft_prompt: int = setting(8, 0, 2**16)  # learned tokens between slots and text; 0: none
    slot_bias: float | None = -5.0  # first value of a learned bias per layer and head from text to slots; None: no bias
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # "auto": bfloat16 on accelerators and float32 on CPU
    # "blocks": a few texts at a time (CPU); "cudnn": fused (NVIDIA GPUs in bfloat16); "auto": whichever of the two can
    # run here, else "xla"
    attention: Literal["auto", "xla", "blocks", "cudnn"] = setting("auto", affects="placement")
    # computed again in the backward pass: "full": everything; "dots": all but products with weights and attention
    remat: Literal["auto", "none", "dots", "full"] = setting("auto", affects="placement")
    init: Init = dataclasses.field(default_factory=Init)

    def _conflicts(self) -> Iterator[str]:
        if self.width % self.heads:
            yield f"`model.width` {self.width} is not a multiple of `model.heads` {self.heads}"
        elif self.backbone == "nomic" and self.width // self.heads % 2:
            yield f"`model.width` / `model.heads` is {self.width // self.heads}: rotary positions need an even number"
        if self.kind == "contextual" and not self.context_size:
            yield "`model.context_size` is 0, so there is no context to read: choose `model.kind` 'biencoder'"


@dataclasses.dataclass(frozen=True)
class Train(_Section, prefix="train.", affects="training"):
    """Optimisation, memory, and how often things happen."""

    steps: int = setting(0, 0, 2**31 - 1, affects="schedule")  # 0: once through the plan
    # (data, fsdp), -1: the rest. Batches are split over all devices, parameters and optimiser state over fsdp only
    mesh: tuple[int, ...] = setting((-1, 1), affects="placement")
    batches_per_step: int = setting(1, 1, 2**20)  # G plan batches per step, shared by the devices
    # plan batches that are left out; the one at the same place in a later step comes instead, once more
    skip_batches: tuple[int, ...] = setting((), affects="schedule")
    optimizer: Literal["adamw", "nadamw", "lamb", "lion", "adafactor", "muon"] = "adamw"  # of optax
    betas: tuple[float, ...] = setting((), 0.0, 1.0)  # its (β₁, β₂); (): as in optax, adamw's are 0.9 and 0.999
    epsilon: float | None = setting(None, 0.0, 1.0)  # its ε; None: as in optax, adamw's is 1e-8
    # the highest, which the warm-up ends with
    learning_rate: float = setting(2e-5, 0.0, 1.0, affects="schedule")
    first_stage_rate: float = setting(1.0, 0.0, 1000.0)  # the first stage's, as a factor; 0: the first stage is frozen
    warmup_steps: int = setting(1000, 0, 2**31 - 1, affects="schedule")  # linear
    # how the rate falls to zero after the warm-up
    schedule: Literal["linear", "cosine"] = setting("linear", affects="schedule")
    weight_decay: float = setting(0.01, 0.0, 1.0)  # of matrices, times the learning rate
    clip_norm: float = setting(1.0, 1e-9, 1e9)  # largest global norm of the gradient
    ema_decay: float = setting(0.0, 0.0, 0.999999)  # evaluate and export a moving average of the parameters; 0: not
    temperature: float = setting(0.02, 1e-4, 10.0)  # τ, or its first value
    learn_temperature: bool = False  # train log τ with the parameters, τ within TEMPERATURES
    # the loss is its mean over the first d dimensions of the vectors, for each d, and over all of them: vectors may
    matryoshka: tuple[int, ...] = setting((), 1, 2**16)  # … be cut to these (Kusupati et al., arXiv 2205.13147)
    sequence_dropout: float = setting(0.005, 0.0, 1.0)  # p that the null embedding replaces a context document
    context_dropout: float = setting(0.0, 0.0, 1.0)  # p that it replaces the whole context of a plan batch
    share_negatives: bool = False  # contrast across all plan batches of a step instead of within each
    # padded lengths that texts run at; each takes time to compile
    text_lengths: int = setting(12, 1, 256, affects="placement")
    # queries and documents, of the longest length, in a chunk that is recomputed in the backward pass; 0: a fitting
    # number (8192 positions on accelerators), recomputed only in large steps; -1: as memory allows
    document_chunk: int = setting(0, AUTO, 2**24, affects="placement")
    context_chunk: int = setting(0, AUTO, 2**24, affects="placement")  # the same for context documents
    # GiB of a step, for chunks of -1; 0: 0.9 of what the device has
    memory_gib: float = setting(0.0, 0.0, 1e6, affects="placement")
    peak_tflops: float = setting(0.0, 0.0, 1e9, affects="nothing")  # of a device, for utilisation; 0: the maker's
    wandb: str = setting("", affects="nothing")  # project of Weights & Biases that metrics go to as well; "": none
    profile_steps: int = setting(0, 0, 10**6, affects="nothing")  # traced into profile/, from the 4th of a run on
    log_every: int = setting(10, 1, 2**31 - 1, affects="nothing")  # steps between lines of metrics.jsonl
    checkpoint_every: int = setting(500, 0, 2**31 - 1, affects="nothing")  # steps; 0: only at the end
    evaluate_every: int = setting(0, 0, 2**31 - 1, affects="nothing")  # steps, on the development sets; 0: at the end

    def _conflicts(self) -> Iterator[str]:
        if len(self.mesh) != 2 or self.mesh == (-1, -1) or any(size < -1 or not size for size in self.mesh):
            yield f"`train.mesh` must be (data, fsdp), numbers of devices, one of them -1 for the rest; got {self.mesh}"
        if any(batch < 0 for batch in self.skip_batches):
            yield f"`train.skip_batches` must be numbers of plan batches, from 0, got {self.skip_batches}"
        if self.steps and self.warmup_steps >= self.steps:
            yield f"`train.warmup_steps` {self.warmup_steps} must be fewer than `train.steps` {self.steps}"
        if self.betas and (len(self.betas) != 2 or self.optimizer == "adafactor" or 1.0 in self.betas):
            yield f"`train.betas` must be (β₁, β₂) below 1, or () for adafactor, got {self.betas} for {self.optimizer}"
        if self.epsilon is not None and self.optimizer in ("lion", "adafactor"):
            yield f"`train.epsilon` must be None for {self.optimizer}, got {self.epsilon}"
        low, high = TEMPERATURES
        if self.learn_temperature and not low <= self.temperature <= high:
            yield f"a learned temperature stays within {TEMPERATURES}, `train.temperature` is {self.temperature}"
        if list(self.matryoshka) != sorted(set(self.matryoshka)):
            yield f"`train.matryoshka` must be different sizes in ascending order, got {self.matryoshka}"


@dataclasses.dataclass(frozen=True)
class Evaluate(_Section, prefix="evaluate.", affects="evaluation"):
    """What is measured at the end, and by which sets the best checkpoint is chosen."""

    # sets whose mean score picks the best checkpoint, and that are not reported; (): the newest is the best
    development: tuple[str, ...] = ()
    checkpoint: Literal["best", "newest"] = "best"  # which one is evaluated and exported
    cutoff: int = setting(10, 1, 10**6)  # k of NDCG@k
    baselines: bool = True  # BM25 and the LSA surrogate beside the model


@dataclasses.dataclass(frozen=True)
class Config(_Section, prefix="", affects="training"):
    """A whole run."""

    seed: int = setting(0, 0, 2**32 - 1)  # of data order, clusters, parameters, context draws and dropout
    data: Data = dataclasses.field(default_factory=Data)
    batching: Batching = dataclasses.field(default_factory=Batching)
    model: Model = dataclasses.field(default_factory=Model)
    train: Train = dataclasses.field(default_factory=Train)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written to config.json."""
        return dataclasses.asdict(self)

    def _conflicts(self) -> Iterator[str]:
        d, m = self.data, self.model
        longest = max(d.query_length, d.document_length)
        if longest > m.max_positions:
            yield f"texts of {longest} tokens do not fit `model.max_positions` = {m.max_positions}"
        if d.tokenizer == "wordpiece" and 0 < m.vocab_size < d.vocab_size:
            yield f"`model.vocab_size` {m.vocab_size} has no room for the `data.vocab_size` {d.vocab_size} tokens"
        if self.train.matryoshka[-1:] >= (m.width,):
            yield f"`train.matryoshka` {self.train.matryoshka} must be smaller than `model.width` {m.width}"
        if unknown := sorted(set(self.evaluate.development) - set(d.evaluation_names)):
            yield f"`evaluate.development` {', '.join(unknown)}: not among the evaluation sets {d.evaluation_names}"

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
            "batching.surrogate_dtype": "sentence-transformers:" in b.surrogate + b.filter_surrogate,
            "batching.mine_first batching.mine_last batching.mine_margin": b.hard_negatives > 0,
            "train.sequence_dropout train.context_dropout": self.model.kind == "contextual",
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


@dataclasses.dataclass(frozen=True)
class AdapterSettings(_Section, prefix="", affects="nothing"):
    """How an adapter is fitted: the keyword arguments of `Adapter.fit`, and flags of the adapt command."""

    sides: Literal["query", "both"] = "query"  # both: a second table for documents (ADDER 2), which changes the index
    # V softmax(K x + b), the paper's; V x, better on the sets measured; V (K x + b); V relu(K x + b)
    form: Literal["softmax", "linear", "low_rank", "mlp"] = "linear"
    hidden: int = setting(64, 1, 2**16)  # h, rows of K
    loss: Literal["infonce", "margin"] = "infonce"  # margin: max(0, margin − positive + hardest negative)
    negatives: Literal["global", "batch", "both"] = "global"  # of the whole corpus, or the other queries' positives
    hardest: int = setting(64, 1, 2**16)  # global negatives of a query in the loss
    temperature: float = setting(0.1, 1e-3, 1e3)
    margin: float = setting(0.1, 0.0, 2.0)
    learning_rate: float | None = setting(None, 1e-9, 1e3)  # None: by the form
    steps: int = setting(100, 1, 2**31)  # at most: the held-out queries choose
    batch_size: int = setting(128, 1, 2**16)  # queries of a step
    refresh: int | None = setting(None, 1, 2**31)  # steps between searches of the corpus; None: 1, more if it is large
    validation: float = setting(0.2, 0.01, 0.5)  # share of the queries that is held out
    folds: int | None = setting(None, 1, 100)  # shares held out in turn; None: all if that is cheap, else one
    seed: int = setting(0, 0, 2**32 - 1)

    def _conflicts(self) -> Iterator[str]:
        if (self.folds or 1) > (most := round(1 / self.validation)):
            yield f"`folds` must be ≤ 1 / validation = {most}, got {self.folds}"


def affected(section: type[_Section] = Config) -> dict[str, Affects]:
    """{"section.key": what it affects} of every setting."""
    table: dict[str, Affects] = {}
    for field in dataclasses.fields(section):
        nested = dataclasses.is_dataclass(field.type)
        effect = field.metadata.get("affects") or section.affects
        table |= affected(field.type) if nested else {section.prefix + field.name: effect}
    return table


def is_setting(name: str) -> bool:
    """Whether "section.key" is a setting, or "section" a section."""
    return any(f"{key}.".startswith(f"{name}.") for key in affected())


def unknown_setting(name: str) -> str:
    """What to say of "section.key" that is no setting: the nearest one, or those of its section."""
    prefix = name[: name.rfind(".") + 1]
    known = list(dict.fromkeys(k.removeprefix(prefix).partition(".")[0] for k in affected() if k.startswith(prefix)))
    if not known:  # no such section
        prefix, known = "", list(affected())
    if near := difflib.get_close_matches(name.removeprefix(prefix), known, n=1):
        return f"unknown key `{name}`: did you mean `{prefix}{near[0]}`?"
    return f"unknown key `{name}`: known keys here: {', '.join(known)}"


def with_changes(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration, as a nested dict, with each {"section.key": value} put in.

    `config` is a Config, a ConfigDict or a nested dict. Raises SettingsError for names that it does not have.
    """
    changed = _nested(config)
    if unknown := sorted(changes.keys() - flatten(changed).keys()):
        raise SettingsError(list(map(unknown_setting, unknown)))
    for name, value in changes.items():
        *sections, key = name.split(".")
        functools.reduce(operator.getitem, sections, changed)[key] = value
    return changed


def from_config_dict(config: Any) -> Config:
    """Build and check a `Config` from a ConfigDict or a nested dict that has every key.

    Raises SettingsError, a ValueError that names every unknown key (with the nearest known one) and every bad value.
    """
    problems: list[str] = []
    built = _build(Config, _nested(config), problems)
    if problems:
        raise SettingsError(problems)
    return built


def _nested(config: Any) -> dict[str, Any]:
    values = next((getattr(config, name)() for name in ("as_dict", "to_dict") if hasattr(config, name)), config)
    if not isinstance(values, Mapping):
        raise SettingsError([f"expected a ConfigDict (of get_config) or a nested dict, got {type(values).__name__}"])
    return copy.deepcopy(dict(values))


def _build(section: type[_Section], values: Mapping[str, Any], problems: list[str]) -> Any:
    """The section of these values; None, with lines added to `problems`, where they cannot be used."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    before, arguments = len(problems), {}
    problems += [unknown_setting(f"{section.prefix}{key}") for key in sorted(values.keys() - fields.keys())]
    for name, field in fields.items():
        if name not in values:
            problems.append(f"`{section.prefix}{name}` is missing: start from configs/base.py, which has every key")
        elif dataclasses.is_dataclass(field.type) and isinstance(values[name], Mapping):
            arguments[name] = _build(field.type, values[name], problems)
        else:
            arguments[name] = _converted(values[name], field.type)
            problems += filter(None, [_problem(section.prefix, field, arguments[name])])
    try:
        return section(**arguments) if len(problems) == before else None
    except SettingsError as error:
        problems += error.problems


def _converted(value: Any, kind: Any) -> Any:
    """Lists as tuples, and whole numbers as floats where a float is expected."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_converted(item, get_args(kind)[0]) for item in value)
    if float in (kind, *get_args(kind)) and type(value) is int and abs(value) < 2**1000:
        return float(value)
    return value


def _problem(prefix: str, field: dataclasses.Field, value: Any) -> str:
    """What is wrong with a value; "" if nothing is."""
    kind, low, high = field.type, field.metadata.get("low"), field.metadata.get("high")
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = str if choices else kind
    if get_origin(kind) is tuple:
        names = {str: "texts, e.g. ('a',)", int: "whole numbers, e.g. (-1, 1)", float: "numbers, e.g. (0.9, 0.99)"}
        item_kind = get_args(kind)[0]
        fits = isinstance(value, tuple) and all(type(item) is item_kind for item in value)
        expected = f"a tuple of {names[item_kind]}"
    elif dataclasses.is_dataclass(kind):
        fits, expected = isinstance(value, kind), "a section of keys"
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        expected = getattr(kind, "__name__", str(kind))
    if fits and choices:
        fits, expected = value in choices, f"one of {', '.join(map(repr, choices))}"
    elif fits and low is not None and value is not None:
        items = value if isinstance(value, tuple) else (value,)
        fits, expected = all(low <= item <= high for item in items), f"≥ {low} and ≤ {high}"  # not NaN
    elif fits and isinstance(value, float):
        fits, expected = math.isfinite(value), "a finite number"
    return "" if fits else f"`{prefix}{field.name}` must be {expected}, got {value!r}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
