"""Models → directories in Hugging Face layout, which `read.load_model`, transformers and sentence-transformers load.

A biencoder becomes a directory of a class that transformers has itself; a contextual encoder one with the
reference's tensor names and one PyTorch module beside them (`torch_module.py`).
"""

import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from cde_jax.data.files import NewFolder, write_json
from cde_jax.interop.export_config import own_keys, reference_keys
from cde_jax.interop.read import TOKENIZER_FILES, TextSettings, check_tokenizer
from cde_jax.interop.weight_mapping import TIED, biencoder_mapping, contextual_mapping, to_torch
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig

MODULE = "modeling_cde_jax.py"
_STEM = MODULE.removesuffix(".py")


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
    config = model.config
    contextual = isinstance(model, ContextualEncoder)
    with NewFolder(directory, marker="config.json") as new:
        copy_tokenizer(Path(tokenizer), new.path, (config.second_stage if contextual else config.encoder).vocab_size)
        native = None if contextual else native_class(config)
        if native:
            _write_native(model, native, new.path, settings)
        else:
            _write_reference(model, new.path, settings)
        write_sentence_transformers(new.path, settings)
        write_card(new.path, config, card)
        new.put_in_place()


def copy_tokenizer(tokenizer: Path, folder: Path, rows: int) -> None:
    """Copy the tokenizer files, after checking that every id has one of the embedding `rows`."""
    if not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{tokenizer}: expected a directory with tokenizer.json, to be copied beside the weights")
    check_tokenizer(tokenizer, rows)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def write_card(folder: Path, config: BiencoderConfig | ContextualConfig, card: str | None) -> None:
    """README.md: `card`, or what the config alone can say."""
    if card is None:
        contextual = isinstance(config, ContextualConfig)
        kind = f"contextual encoder ({config.context_attention} attention)" if contextual else "biencoder"
        card = f"---\nlibrary_name: sentence-transformers\n---\n\nA {kind} exported by cde_jax.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file that is on the disk when this returns."""
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def parameters(model: Any) -> dict[str, np.ndarray]:
    """Every parameter of a module (every gradient of a state of gradients) as numpy array, by dotted path."""
    state = model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def native_class(config: BiencoderConfig) -> str | None:
    """The class of transformers that runs this biencoder's encoder as it is, if there is one."""
    c = config.encoder
    if type(config) is not BiencoderConfig or type(c) is not EncoderConfig or config.residual or not c.token_types:
        return None
    biases = (c.attention_bias, *c.mlp_bias)
    if c.positions == "rotary" and c.activation == "swiglu" and not any(biases):
        return "NomicBertModel"
    if c.positions == "learned" and c.activation == "gelu" and all(biases):
        return "BertModel"
    return None


def _write_native(model: Biencoder, native: str, folder: Path, settings: TextSettings) -> None:
    naming = "native" if native == "NomicBertModel" else "bert"
    tensors = to_torch(biencoder_mapping(model.config.encoder, naming), parameters(model))
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mlp.")}
    save_tensors(folder / "model.safetensors", tensors)
    own = own_keys(model.config, settings)
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
    save_tensors(path / "model.safetensors", {"linear.weight": weight, "linear.bias": bias})


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


def _write_reference(model: ContextualEncoder | Biencoder, folder: Path, settings: TextSettings) -> None:
    config = model.config
    if isinstance(model, ContextualEncoder):
        tensors = to_torch(contextual_mapping(config), parameters(model))
        if getattr(config, "tie_token_embeddings", False):  # the reference's state dict has the table under both names
            tensors[TIED[0]] = tensors[TIED[1]]
    else:
        tensors = to_torch(biencoder_mapping(config.encoder, prefix="embedder."), parameters(model))
    save_tensors(folder / "model.safetensors", tensors)
    write_reference_config(folder, config, settings)
    module = {"idx": 0, "name": "0", "path": "", "type": f"{_STEM}.Transformer", "kwargs": ["dataset_embeddings"]}
    write_json(folder / "modules.json", [module])


def write_reference_config(
    folder: Path, config: BiencoderConfig | ContextualConfig, settings: TextSettings, **own: Any
) -> None:
    """`config.json` with the reference's keys and our own (and what `own` adds), and the PyTorch module beside it."""
    keys = {
        "architectures": ["CdeModel"],
        "model_type": "cde_jax",
        "auto_map": {"AutoConfig": f"{_STEM}.CdeConfig", "AutoModel": f"{_STEM}.CdeModel"},
        **reference_keys(config),
        "max_seq_length": max(settings.query_length, settings.document_length),
        "cde_jax": {**own_keys(config, settings), **own},
    }
    write_json(folder / "config.json", keys)
    source = files("cde_jax.interop").joinpath("torch_module.py").read_text(encoding="utf-8")
    (folder / MODULE).write_text(source, encoding="utf-8")


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
