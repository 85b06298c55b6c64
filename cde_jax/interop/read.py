"""Directories and hub names → models: ours, the reference's, NomicBERT, BERT, sentence-transformers.

Weights come from safetensors only and without torch; what a directory holds is decided by its `config.json`
(`families.py`), which tensor goes where by the rule tables (`rules.py`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tokenizers
from flax import nnx

from cde_jax.data.files import read_json
from cde_jax.interop import families, ours
from cde_jax.interop.modules import TextSettings, head, text_settings, transformer_folder, with_modules
from cde_jax.interop.rules import (
    TIED,
    Rule,
    biencoder_rules,
    check_bijection,
    contextual_rules,
    encoder_rules,
    to_ours,
    torch_shapes,
)
from cde_jax.interop.tensors import Tensor, refuse_pickles, tensors
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import Encoder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what is fetched of a hub repository


class Pretrained(NamedTuple):
    """A model, the local directory that holds its tokenizer (mostly the one it came from), its text settings."""

    model: ContextualEncoder | Biencoder
    directory: Path
    settings: TextSettings


class Described(NamedTuple):
    """A directory understood, weights not read yet."""

    config: BiencoderConfig | ContextualConfig
    rules: tuple[Rule, ...]
    weights: dict[str, Tensor]
    settings: TextSettings
    encoder: str  # what stands before the names of the (second-stage) encoder's tensors
    naming: str


def load_model(name_or_path: str | Path, numerics: str | None = None) -> ContextualEncoder | Biencoder:
    """The float32 model of a directory or hub name.

    Args:
      numerics: which of the reference's two programs a published directory is run as: "shipped" (the file that
        ships with cde-small-v1, the default), "shipped-sequence" (the same with rotary along the sequence) or
        "training" (the authors' training code). A directory exported by cde_jax says its own.

    Raises:
      ValueError: for pickles, unknown families, broken or ill-fitting files; the message says what to change.
    """
    return _load(resolve(name_or_path), numerics)[0]


def load_pretrained(name_or_path: str | Path, numerics: str | None = None) -> Pretrained:
    """As `load_model`, with the directory of its tokenizer and the text settings."""
    directory = resolve(name_or_path)
    model, settings = _load(directory, numerics)
    return Pretrained(model, _tokenizer_home(directory), settings)


def _load(directory: Path, numerics: str | None) -> tuple[ContextualEncoder | Biencoder, TextSettings]:
    found = describe(directory, numerics)
    contextual = isinstance(found.config, ContextualConfig)
    kind = ContextualEncoder if contextual else Biencoder
    model = fill(lambda: kind(found.config, rngs=nnx.Rngs(0)), found.rules, found.weights, str(directory))
    check_tokenizer(directory, (found.config.second_stage if contextual else found.config.encoder).vocab_size)
    return model, found.settings


def load_encoder(name_or_path: str | Path, layers: int | None = None) -> Encoder:
    """The plain encoder of a directory or hub name, to start training from: its first `layers`, or all.

    Of a contextual model that is the second stage. The reference's numerical habits are left off.
    """
    directory = resolve(name_or_path)
    found = describe(directory, None)
    config = found.config.second_stage if isinstance(found.config, ContextualConfig) else found.config.encoder
    if layers is not None and not 1 <= layers <= config.layers:
        raise ValueError(f"{directory}: expected 1 to {config.layers} layers to start from, got {layers}")
    config = dataclasses.replace(
        config,
        layers=layers or config.layers,
        rotary_axis="sequence",
        positions_skip_padding=False,
        zero_padding=False,
    )
    cut = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.")
    weights = {
        name.removeprefix(found.encoder): tensor
        for name, tensor in found.weights.items()
        if name.startswith(found.encoder) and not name.startswith("mlp.")
    }
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not (layer := cut.match(name)) or int(layer[1]) < config.layers
    }
    rules = encoder_rules(config, found.naming)
    return fill(lambda: Encoder(config, rngs=nnx.Rngs(0)), rules, weights, str(directory))


def resolve(name_or_path: str | Path, files: Sequence[str] = FILES) -> Path:
    """The local directory of a path or hub name; weights, JSON and tokenizer files are fetched, never code."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        refuse_pickles(path)
        raise ValueError(f"{path} is a file; give the directory that holds it beside its config.json")
    from huggingface_hub import snapshot_download  # only where a hub name is given

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(files)))
    except Exception as error:  # hub, connection and naming errors share no base class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{str(name_or_path)!r} is no directory here, not in the local cache and not to be fetched now ({reason}); "
            f"give a directory, or connect to the network once"
        ) from None


def describe(directory: Path, numerics: str | None = None) -> Described:
    """Which model a directory holds, and where its tensors are."""
    if numerics not in (None, *families.NUMERICS):
        raise ValueError(f"numerics: expected one of {', '.join(families.NUMERICS)}, or None, got {numerics!r}")
    home = transformer_folder(directory)
    if not (home / "config.json").is_file():
        refuse_pickles(home)
        raise ValueError(f"{home}: expected a model directory with config.json and model.safetensors")
    config, source = read_json(home / "config.json"), str(home / "config.json")
    weights = _plain_names(tensors(home))
    naming = _naming(weights)
    own = config.get("cde_jax", {})
    if own.get("baked"):
        raise ValueError(
            f"{directory}: an export with its context baked in has no first stage; load the export it was made from, "
            f"or run this one with sentence-transformers or ONNX"
        )
    try:
        model = _model_config(config, numerics, directory, source, weights)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: a key of its family is missing or has another type ({error})") from error
    if not families.is_reference(config):
        weights |= head(directory)
        if not own:
            model = with_modules(model, directory, weights)
    settings = text_settings(directory, config, model)
    return _described(model, weights, settings, naming, reference=families.is_reference(config))


def _model_config(
    config: Mapping[str, Any], numerics: str | None, directory: Path, source: str, weights: Mapping[str, Tensor]
) -> BiencoderConfig | ContextualConfig:
    own = config.get("cde_jax", {})
    if own and numerics in (None, own["numerics"]):
        return ours.from_dict(own["model"], source)
    if own and own["numerics"] not in families.NUMERICS:
        raise ValueError(f"{source}: exported with cde_jax's own numerics; leave numerics={numerics!r} out")
    if not families.is_reference(config):
        return BiencoderConfig(families.plain_encoder(config, numerics, source))
    null = "second_stage_model.sequence_dropout_null_embedding" in weights
    colon = partial(_colon, directory, config)
    return families.reference_model(config, numerics or "shipped", null=null, colon=colon, source=source)


def _described(model, weights, settings, naming, *, reference: bool) -> Described:
    if isinstance(model, BiencoderConfig):
        rules = biencoder_rules(model.encoder, naming)
        prefix = ""
        if reference:
            prefix, rules = "embedder.", biencoder_rules(model.encoder, naming, prefix="embedder.")
        return Described(model, rules, weights, settings, prefix, naming)
    if model.tie_token_embeddings:
        weights = _untied(weights)
    rules = contextual_rules(model)
    return Described(model, rules, weights, settings, "second_stage_model.backbone.", "reference")


def fill(make: Callable[[], nnx.Module], rules: Iterable[Rule], weights: Mapping[str, Tensor], source: str):
    """The module that `make` describes with parameters from `weights`; nothing is initialised at random."""
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    shapes = {path: leaf.shape for path, (_, leaf) in leaves.items()}
    check_bijection(torch_shapes(rules, shapes), {name: tensor.shape for name, tensor in weights.items()}, source)
    by_path = {rule.path: rule for rule in rules}
    filled = []
    for name, (path, leaf) in leaves.items():
        array = to_ours(by_path[name], shapes[name], lambda tensor: weights[tensor].read())
        filled.append((path, leaf.replace(jax.device_put(array, may_alias=True))))  # nobody else holds the array
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_tokenizer(directory: Path, rows: int) -> None:
    """A ValueError if the tokenizer beside the weights has ids that the embedding table has no row for."""
    if not (directory / "tokenizer.json").is_file():
        return
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{directory / 'tokenizer.json'}: not a tokenizer ({error}); write it again") from None
    highest = max(vocabulary.values(), default=-1)
    if highest >= rows:
        raise ValueError(
            f"{directory}: its tokenizer has ids up to {highest}, the model's word embeddings have {rows} rows (0 to "
            f"{rows - 1}); put the tokenizer there that the model was trained with"
        )


def _tokenizer_home(directory: Path) -> Path:
    """The directory itself, or where cde-small-v1's layout, which has no tokenizer files, takes its tokenizer from."""
    config = read_json(transformer_folder(directory) / "config.json")
    if (directory / "tokenizer.json").is_file() or not families.is_reference(config):
        return directory
    try:
        return resolve(config.get("tokenizer_name") or config["embedder"], TOKENIZER_FILES)
    except ValueError:
        return directory  # whoever needs the tokenizer will say that there is none


def _plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what a wrapper puts before an encoder's (`bert.`, `model.`, …), and with modern norm names."""
    anchor = "embeddings.word_embeddings.weight"
    prefix = next((name.removesuffix(anchor) for name in weights if name.endswith(anchor)), "")
    if prefix.startswith(("first_stage_model", "second_stage_model", "embedder")):
        prefix = ""
    rename = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    plain = {}
    for name, tensor in weights.items():
        name = name.removeprefix(prefix)
        for old, new in rename.items():
            name = name.replace(old, new) if name.endswith(old) else name
        plain[name] = tensor
    return plain


def _naming(weights: Iterable[str]) -> str:
    names = "\n".join(weights)
    return next(
        (n for key, n in ((".attention.self.", "bert"), (".self_attn.", "native")) if key in names), "reference"
    )


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one table that both stages share, under the second stage's name; two tables must be equal."""
    first, second = (weights.get(name) for name in TIED)
    if first and second and first.read().tobytes() != second.read().tobytes():
        raise ValueError(
            f"config.json ties the word embeddings of both stages, but the file has two different tables: {TIED[0]} "
            f"and {TIED[1]}; set transductive_tie_token_embeddings to false"
        )
    rest = {name: tensor for name, tensor in weights.items() if name not in TIED}
    return rest | ({TIED[1]: second or first} if second or first else {})


def _colon(directory: Path, config: Mapping[str, Any]) -> int:
    """The token that ends an instruction: the first of ": ", as the training code asks its tokenizer."""
    known = config.get("pool_instruction_end_id", config.get("tokens", {}).get("colon"))
    if known is not None:
        return known
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory}: pool_ignore_instruction_tokens needs to know the colon's id; put tokenizer.json there, or "
            f"pool_instruction_end_id into config.json"
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer.encode(": ", add_special_tokens=False).ids[0]
