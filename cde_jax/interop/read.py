"""Directories and hub names → models: exports of cde_jax, the reference's, NomicBERT, BERT, sentence-transformers.

Weights come from safetensors only and without torch; what a directory holds is decided by its `config.json`
(`architectures.py`), which tensor goes where by the table of `weight_mapping.py`. Directories are untrusted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from cde_jax.data.files import digests, fingerprint, read_json
from cde_jax.data.tokens import read_backend
from cde_jax.interop import modules
from cde_jax.interop.architectures import NUMERICS, encoder_config, from_dict, is_reference, reference_config
from cde_jax.interop.modules import Tensor, TextSettings, refuse_pickles, transformer_folder
from cde_jax.interop.reference_model import Config, ModelConfig, ReferenceEncoderConfig, simplified
from cde_jax.interop.weight_mapping import TIED, Mapped, check_bijection, from_torch, model_mapping
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualEncoder
from cde_jax.models.encoder import Encoder, EncoderConfig

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
)  # fmt: skip
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what is fetched of a hub repository


class Pretrained(NamedTuple):
    """A model, the local directory that holds its tokenizer (mostly the one it came from), its text settings."""

    model: ContextualEncoder | Biencoder
    directory: Path
    settings: TextSettings


def load_model(name_or_path: str | Path, numerics: str | None = None) -> ContextualEncoder | Biencoder:
    """The float32 model of a directory or hub name.

    Args:
      numerics: which of the reference's two programs a published directory is run as: "shipped" (the file that
        ships with cde-small-v1, the default), "shipped-sequence" (the same with rotary along the sequence) or
        "training" (the authors' training code). A directory exported by cde_jax has its own.

    Raises:
      ValueError: for pickles, unknown architectures, broken or ill-fitting files; the message says what to change.
    """
    return load_parameters(*open_checkpoint(resolve(name_or_path), numerics)[:3])


def load_pretrained(name_or_path: str | Path, numerics: str | None = None) -> Pretrained:
    """As `load_model`, with the directory of its tokenizer and the text settings."""
    directory = resolve(name_or_path)
    *checkpoint, settings = open_checkpoint(directory, numerics)
    return Pretrained(load_parameters(*checkpoint), _tokenizer_directory(directory), settings)


def load_encoder(name_or_path: str | Path, layers: int | None = None) -> Encoder:
    """The plain encoder of a directory or hub name, to start training from: its first `layers`, or all.

    Of a contextual model that is the second stage. The numerics of the reference's programs are left out.
    """
    return load_parameters(*open_encoder(name_or_path, layers))


def open_encoder(name_or_path: str | Path, layers: int | None) -> tuple[EncoderConfig, Mapped, dict[str, Tensor]]:
    """Config, weight mapping and stored tensors of the encoder that `load_encoder` loads; no weights are read."""
    config, mapping, weights, _ = open_checkpoint(resolve(name_or_path))
    config = config.encoder
    if layers is not None and not 1 <= layers <= config.layers:
        raise ValueError(f"{name_or_path}: expected 1 to {config.layers} layers to start from, got {layers}")
    changes = {"numerics": None} if isinstance(config, ReferenceEncoderConfig) else {}
    config = simplified(dataclasses.replace(config, layers=layers or config.layers, **changes))
    if type(config) is not EncoderConfig:
        others = "pre-norm layers, geglu and glu, and partial or interleaved rotary embeddings"
        raise ValueError(f"{name_or_path}: training starts from NomicBERT or BERT; {others} are for encoding only")
    return config, {path.removeprefix("encoder."): names for path, names in mapping.items()}, weights


def weights_digest(name_or_path: str | Path) -> str:
    """Digest of the safetensors of a directory or hub name, wherever it is."""
    folder = resolve(name_or_path)
    return fingerprint(digests(sorted(folder.rglob("*.safetensors")), folder))


def resolve(name_or_path: str | Path) -> Path:
    """The local directory of a path or hub name; weights, JSON and tokenizer files are fetched, never code."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        refuse_pickles(path)
        raise ValueError(f"{path} is a file; give the directory that holds it beside its config.json")
    return _download(str(name_or_path), FILES)


def _download(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # only where a hub name is given

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # hub, connection and naming errors share no base class
        reason = str(error).strip().split("\n")[0]
        problem = f"{name!r} is no directory here, not in the local cache and cannot be fetched now ({reason})"
        raise ValueError(f"{problem}; give a directory, or connect to the network once") from None


def open_checkpoint(
    directory: Path, numerics: str | None = None
) -> tuple[ModelConfig, Mapped, dict[str, Tensor], TextSettings]:
    """Config, weight mapping, stored tensors and text settings of a directory; the tensors fit the config."""
    if numerics not in (None, *NUMERICS):
        raise ValueError(f"numerics: expected one of {', '.join(NUMERICS)}, or None, got {numerics!r}")
    file = transformer_folder(directory) / "config.json"
    if not file.is_file():
        refuse_pickles(file.parent)
        raise ValueError(f"{file.parent}: expected a model directory with config.json and model.safetensors")
    keys, weights = read_json(file, dict), _plain_names(modules.tensors(file.parent))
    try:
        config = _model_config(keys, numerics, directory, weights)
        if not is_reference(keys):
            weights |= modules.head(directory)
            if "cde_jax" not in keys:
                config = modules.with_modules(config, directory, weights)
        settings = modules.text_settings(directory, keys, config)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: a key of its architecture is missing or has another type ({error!r})") from error
    except ValueError as error:
        raise error if str(directory) in str(error) else ValueError(f"{file}: {error}") from None
    if getattr(config, "tie_token_embeddings", False):
        weights = _untied(weights)
    names = "\n".join(weights)
    naming = "bert" if ".attention.self." in names else "native" if ".self_attn." in names else "reference"
    mapping = model_mapping(config, naming, "embedder." if is_reference(keys) else "")
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    check_bijection(mapping, shapes, {name: tensor.shape for name, tensor in weights.items()}, str(directory))
    check_tokenizer(directory, config)
    return config, mapping, weights, settings


def _model_config(
    config: Mapping[str, Any], numerics: str | None, directory: Path, weights: Mapping[str, Tensor]
) -> ModelConfig:
    own = config.get("cde_jax", {})
    if own.get("corpus_slots") or own.get("baked"):
        advice = "load the export it was made from, or run this one with sentence-transformers or ONNX"
        raise ValueError(f"an export with the context of a corpus has no first stage; {advice}")
    if own:
        reference = own["numerics"] in NUMERICS
        if numerics is not None and not reference:
            raise ValueError(f"exported with cde_jax's own numerics; leave numerics={numerics!r} out")
        if numerics in (None, own["numerics"]) and not (reference and own["format"] == 1):
            return from_dict(own["model"])
        numerics = numerics or own["numerics"]
    if is_reference(config):
        null = "second_stage_model.sequence_dropout_null_embedding" in weights
        return reference_config(config, numerics or "shipped", null=null, colon=partial(_colon, directory, config))
    if config.get("model_type") not in ("bert", "nomic_bert"):
        got = f"unknown model_type {config.get('model_type')!r} (architecture {config.get('architecture')!r})"
        layouts = (
            "cde-small-v1's layout (architecture: transductive or biencoder), nomic_bert, bert, exports of cde_jax"
        )
        raise ValueError(f"{got}; supported are {layouts}")
    return BiencoderConfig(encoder_config(config, numerics))


def load_parameters(
    config: Config, mapping: Mapped, weights: Mapping[str, Tensor]
) -> Encoder | Biencoder | ContextualEncoder:
    """The module of `config` with parameters from `weights`; nothing is initialised at random."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        array = from_torch(mapping, ".".join(map(str, path)), leaf.shape, lambda name: weights[name].load())
        filled.append((path, leaf.replace(jax.device_put(array, may_alias=True))))  # nobody else holds the array
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_tokenizer(directory: Path, config: ModelConfig) -> None:
    """`check_vocabulary` of the tokenizer beside the weights, if there is one."""
    with suppress(ImportError):  # where only JAX is installed: nothing is tokenized there
        if (directory / "tokenizer.json").is_file():
            largest = max(read_backend(directory).get_vocab().values(), default=-1)
            check_vocabulary(largest + 1, config, f"{directory}: ")


def check_vocabulary(tokens: int, config: ModelConfig, where: str = "") -> None:
    """A ValueError for a tokenizer of more ids than a table of word embeddings, whose look-ups would be clipped."""
    rows = min(config.encoder.vocab_size, getattr(config, "first_stage", config).encoder.vocab_size)
    if tokens > rows:
        problem = f"{where}the tokenizer has ids up to {tokens - 1}, the model's word embeddings have {rows} rows"
        raise ValueError(f"{problem}: give the tokenizer that the model was trained with")


def _tokenizer_directory(directory: Path) -> Path:
    """The directory itself, or the hub repository that cde-small-v1's layout, without tokenizer files, names."""
    config = read_json(transformer_folder(directory) / "config.json")
    if (directory / "tokenizer.json").is_file() or not is_reference(config):
        return directory
    try:
        return _download(str(config.get("tokenizer_name") or config["embedder"]), TOKENIZER_FILES)
    except ValueError:
        return directory  # loading the tokenizer will say that there is none


def _plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what a wrapper puts before an encoder's (`bert.`, `model.`, …), and with modern norm names."""
    anchor = "embeddings.word_embeddings.weight"
    prefix = next((name.removesuffix(anchor) for name in weights if name.endswith(anchor)), "")
    if prefix.startswith(("first_stage_model", "second_stage_model", "embedder")):
        prefix = ""
    for old, new in (("gamma", "weight"), ("beta", "bias")):  # of old BERT files
        weights = {name.replace(f"LayerNorm.{old}", f"LayerNorm.{new}"): x for name, x in weights.items()}
    return {name.removeprefix(prefix): x for name, x in weights.items()}


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one table that both stages share, under the second stage's name; two tables must be equal."""
    first, second = (weights.get(name) for name in TIED)
    if first and second and first.load().tobytes() != second.load().tobytes():
        problem = (
            f"config.json ties the word embeddings of both stages, and {' and '.join(TIED)} are two different tables"
        )
        raise ValueError(f"{problem}; set transductive_tie_token_embeddings to false")
    rest = {name: tensor for name, tensor in weights.items() if name not in TIED}
    return rest | ({TIED[1]: second or first} if second or first else {})


def _colon(directory: Path, config: Mapping[str, Any]) -> int:
    """The token that ends an instruction: the first of ": ", as the training code asks its tokenizer."""
    known = config.get("pool_instruction_end_id", config.get("tokens", {}).get("colon"))
    if known is not None:
        return known
    if not (directory / "tokenizer.json").is_file():
        raise ValueError("leaving instructions out needs tokenizer.json, or pool_instruction_end_id in config.json")
    return read_backend(directory).encode(": ", add_special_tokens=False).ids[0]
