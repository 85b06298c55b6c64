"""Models → directories in Hugging Face layout, which `read.load_model`, transformers and sentence-transformers load.

A biencoder becomes a directory of a class that transformers has itself; a contextual encoder one with the
reference's tensor names and one PyTorch module beside them (`torch_module.py`).
"""

import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors.numpy import save_file

from cde_jax.data.files import NewFolder, write_json
from cde_jax.interop.architectures import transformers_keys
from cde_jax.interop.export_config import own_keys, reference_keys
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.read import TOKENIZER_FILES, check_tokenizer
from cde_jax.interop.weight_mapping import TIED, biencoder_mapping, contextual_mapping, to_torch
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig

MODULE = "modeling_cde_jax.py"
_STEM = MODULE.removesuffix(".py")
Tensors = dict[str, Float[np.ndarray, "..."]]


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
    config, contextual = model.config, isinstance(model, ContextualEncoder)
    with NewFolder(directory, marker="config.json") as new:
        write_texts(new.path, config, settings, Path(tokenizer), card)
        if not contextual and (class_name := transformers_class(config)):
            _write_transformers(model, class_name, new.path, settings)
        else:
            mapping = (
                contextual_mapping(config) if contextual else biencoder_mapping(config.encoder, prefix="embedder.")
            )
            tensors = to_torch(mapping, parameters(model))
            if getattr(config, "tie_token_embeddings", False):  # the reference has the table under both names
                tensors[TIED[0]] = tensors[TIED[1]]
            write_with_module(new.path, config, settings, tensors)
            write_modules(new.path, [f"{_STEM}.Transformer"], kwargs=["dataset_embeddings"])
        new.put_in_place()


def write_texts(
    folder: Path,
    config: BiencoderConfig | ContextualConfig,
    settings: TextSettings,
    tokenizer: Path,
    card: str | None,
) -> None:
    """Tokenizer files, prompts and length as sentence-transformers reads them (one length for all), README.md.

    Every id of the tokenizer must have a row of word embeddings.
    """
    contextual = isinstance(config, ContextualConfig)
    if not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{tokenizer}: expected a directory with tokenizer.json, to be copied beside the weights")
    check_tokenizer(tokenizer, config.encoder.vocab_size)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    prompts = {"query": settings.query_prefix, "document": settings.document_prefix}
    keys = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", keys)
    length = max(settings.query_length, settings.document_length)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    if card is None:
        kind = f"contextual encoder ({config.context_attention} attention)" if contextual else "biencoder"
        card = f"---\nlibrary_name: sentence-transformers\n---\n\nA {kind} exported by cde_jax.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_with_module(
    folder: Path, config: BiencoderConfig | ContextualConfig, settings: TextSettings, tensors: Tensors, **own: Any
) -> None:
    """Weights, `config.json` with the reference's keys and our own (and what `own` adds), and the PyTorch module."""
    keys = {
        "architectures": ["CdeModel"],
        "model_type": "cde_jax",
        "auto_map": {"AutoConfig": f"{_STEM}.CdeConfig", "AutoModel": f"{_STEM}.CdeModel"},
        **reference_keys(config),
        "max_seq_length": max(settings.query_length, settings.document_length),
        "cde_jax": {**own_keys(config, settings), **own},
    }
    write_json(folder / "config.json", keys)
    _save_tensors(folder / "model.safetensors", tensors)
    source = files("cde_jax.interop").joinpath("torch_module.py").read_text(encoding="utf-8")
    (folder / MODULE).write_text(source, encoding="utf-8")


def write_modules(folder: Path, types: Sequence[str], **first: Any) -> None:
    """modules.json of sentence-transformers, and a folder for each module but the `first`, which is in `folder`."""
    modules = []
    for i, name in enumerate(types):
        path = f"{i}_{name.rsplit('.', 1)[-1]}" if i else ""
        modules.append({"idx": i, "name": str(i), "path": path, "type": name} | ({} if i else first))
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)


def parameters(model: nnx.Module | nnx.State) -> Tensors:
    """Every parameter of a module (every gradient of a state of gradients) as numpy array, by dotted path."""
    state = model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def transformers_class(config: BiencoderConfig) -> str | None:
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


def _write_transformers(model: Biencoder, class_name: str, folder: Path, settings: TextSettings) -> None:
    config = model.config
    naming = "native" if class_name == "NomicBertModel" else "bert"
    tensors = to_torch(biencoder_mapping(config.encoder, naming), parameters(model))
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mlp.")}
    _save_tensors(folder / "model.safetensors", tensors)
    own = own_keys(config, settings)
    write_json(folder / "config.json", {**transformers_keys(config.encoder, class_name), "cde_jax": own})
    kinds = ["Transformer", "Pooling", *(["Dense", "Dense"] if head else []), "Normalize"]
    write_modules(folder, [f"sentence_transformers.models.{kind}" for kind in kinds])
    modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"), False)
    modes["cls_token" if config.pooling == "cls" else "mean_tokens"] = True
    pooling = {"word_embedding_dimension": config.encoder.width}
    write_json(
        folder / "1_Pooling" / "config.json", pooling | {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    )
    for i, layer, activation in ((2, "mlp.0", "activation.GELU"), (3, "mlp.2", "linear.Identity")) if head else ():
        weight, bias = head[f"{layer}.weight"], head[f"{layer}.bias"]
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": True}
        activation = {"activation_function": f"torch.nn.modules.{activation}"}
        write_json(folder / f"{i}_Dense" / "config.json", sizes | activation)
        _save_tensors(folder / f"{i}_Dense" / "model.safetensors", {"linear.weight": weight, "linear.bias": bias})


def _save_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file that is on the disk when this returns."""
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
