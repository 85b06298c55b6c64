"""Models → directories in Hugging Face layout, which `read.load_model`, transformers and sentence-transformers load.

A biencoder becomes a directory of a class that transformers has itself; a contextual encoder one with the
reference's tensor names and one PyTorch module beside them (`torch_module.py`).
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from cde_jax.data.files import explained, write_json
from cde_jax.interop import ours
from cde_jax.interop.read import TextSettings, check_tokenizer
from cde_jax.interop.rules import TIED, biencoder_rules, contextual_rules, to_torch
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
MODULE = "modeling_cde_jax.py"
FORMAT = 1


def save_pretrained(
    model: ContextualEncoder | Biencoder,
    directory: str | Path,
    *,
    tokenizer: str | Path,
    settings: TextSettings,
    card: str | None = None,
) -> None:
    """Write a model as a directory: config, safetensors, tokenizer files, what sentence-transformers needs, a card.

    Args:
      tokenizer: a directory whose tokenizer files are copied.
      card: the README.md; None writes a short one.

    Raises:
      ValueError: the tokenizer directory has no tokenizer.json, or its ids do not fit the embedding rows.
    """
    tokenizer = Path(tokenizer)
    if not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{tokenizer}: expected a directory with tokenizer.json, to be copied beside the weights")
    config = model.config
    contextual = isinstance(model, ContextualEncoder)
    check_tokenizer(tokenizer, (config.second_stage if contextual else config.encoder).vocab_size)
    own = {
        "format": FORMAT,
        "numerics": ours.numerics_of(config),
        "model": ours.to_dict(config),
        "text": dataclasses.asdict(settings),
    }
    with replacing(Path(directory)) as folder:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        native = None if contextual else native_class(config)
        if native:
            _write_native(model, native, folder, own)
        else:
            _write_reference(model, folder, own)
        write_sentence_transformers(folder, settings)
        (folder / "README.md").write_text(card or _short_card(config), encoding="utf-8")


class replacing:  # noqa: N801  used as a function
    """A context that gives a temporary sibling folder and renames it to `directory` when all went well."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise explained(error, self.directory) from error
            return
        old = self.directory.parent / f".{self.directory.name}.{os.getpid()}.old"
        if self.directory.exists():
            os.replace(self.directory, old)
        os.replace(self.temporary, self.directory)
        shutil.rmtree(old, ignore_errors=True)


def parameters(model: Any) -> dict[str, np.ndarray]:
    """Every parameter of a module (every gradient of a state of gradients) as numpy array, by dotted path."""
    state = model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def native_class(config: BiencoderConfig) -> str | None:
    """The class of transformers that runs this biencoder's encoder as it is, if there is one."""
    c = config.encoder
    habits = (c.rotary_axis, c.positions_skip_padding, c.zero_padding, c.prenorm, c.rotary_interleaved)
    if config.tokens_per_document > 1 or not c.token_types or habits != ("sequence", False, False, False, False):
        return None
    biases = (c.attention_bias, *c.mlp_bias)
    if c.positions == "rotary" and c.activation == "swiglu" and c.rotary_fraction == 1 and not any(biases):
        return "NomicBertModel"
    if c.positions == "learned" and c.activation == "gelu" and all(biases):
        return "BertModel"
    return None


def _write_native(model: Biencoder, native: str, folder: Path, own: Mapping[str, Any]) -> None:
    naming = "native" if native == "NomicBertModel" else "bert"
    tensors = to_torch(biencoder_rules(model.config.encoder, naming), parameters(model))
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mlp.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**native_keys(model.config.encoder, native), "cde_jax": own})
    modules = ["Transformer", "Pooling"]
    width = model.config.encoder.width
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": model.config.pooling == "cls",
        "pooling_mode_mean_tokens": model.config.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    for layer, activation in (("0", "GELU"), ("2", "Identity")) if head else ():
        _write_dense(folder, len(modules), head[f"mlp.{layer}.weight"], head[f"mlp.{layer}.bias"], activation)
        modules.append("Dense")
    _write_modules(folder, [*modules, "Normalize"])


def _write_dense(folder: Path, index: int, weight: np.ndarray, bias: np.ndarray, activation: str) -> None:
    path = folder / f"{index}_Dense"
    path.mkdir()
    place = "linear" if activation == "Identity" else "activation"
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": True,
        "activation_function": f"torch.nn.modules.{place}.{activation}",
    }
    write_json(path / "config.json", config)
    save_file({"linear.weight": weight, "linear.bias": bias}, path / "model.safetensors", metadata={"format": "pt"})


def _write_modules(folder: Path, kinds: list[str]) -> None:
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", entries)


def native_keys(encoder: EncoderConfig, native: str) -> dict[str, Any]:
    """The `config.json` of transformers' own NomicBERT or BERT."""
    keys = {
        "architectures": [native],
        "model_type": "nomic_bert" if native == "NomicBertModel" else "bert",
        "vocab_size": encoder.vocab_size,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width,
        "hidden_act": "silu" if native == "NomicBertModel" else "gelu",
        "max_position_embeddings": encoder.max_positions,
        "type_vocab_size": encoder.token_types,
        "layer_norm_eps": encoder.norm_epsilon,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    }
    if native == "NomicBertModel":
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": encoder.rotary_base}
    return keys


def _write_reference(model: ContextualEncoder | Biencoder, folder: Path, own: Mapping[str, Any]) -> None:
    config = model.config
    if isinstance(model, ContextualEncoder):
        tensors = to_torch(contextual_rules(config), parameters(model))
        if config.tie_token_embeddings:  # the reference's state dict has the shared table under both names
            tensors[TIED[0]] = tensors[TIED[1]]
    else:
        tensors = to_torch(biencoder_rules(config.encoder, prefix="embedder."), parameters(model))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stem = MODULE.removesuffix(".py")
    keys = {
        "architectures": ["CdeModel"],
        "model_type": "cde_jax",
        "auto_map": {"AutoConfig": f"{stem}.CdeConfig", "AutoModel": f"{stem}.CdeModel"},
        **ours.reference_keys(config),
        "max_seq_length": max(own["text"]["query_length"], own["text"]["document_length"]),
        "cde_jax": own,
    }
    write_json(folder / "config.json", keys)
    source = files("cde_jax.interop").joinpath("torch_module.py")
    (folder / MODULE).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    module = {"idx": 0, "name": "0", "path": "", "type": f"{stem}.Transformer", "kwargs": ["dataset_embeddings"]}
    write_json(folder / "modules.json", [module])


def write_sentence_transformers(folder: Path, settings: TextSettings) -> None:
    """Prompts and lengths as sentence-transformers reads them; it has one length for queries and documents."""
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": settings.query_prefix, "document": settings.document_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    length = max(settings.query_length, settings.document_length)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})


def _short_card(config: Any) -> str:
    kind = "biencoder" if isinstance(config, BiencoderConfig) else f"contextual encoder ({config.context_attention})"
    return f"---\nlibrary_name: sentence-transformers\n---\n\nA {kind} exported by cde_jax.\n"
