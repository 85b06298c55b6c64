"""Models → directories in Hugging Face layout, which `read.load_model`, transformers and sentence-transformers load.

A biencoder becomes a directory of a class that transformers has itself; a contextual encoder one with the reference's
tensor names and one PyTorch module beside them (`torch_module.py`). With the context of one corpus as constants it
becomes a model of one input, for servers that know nothing of context: token ids and a mask → a unit vector.
"""

import os
import shutil
import warnings
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from cde_jax.data.files import NewFolder, write_json
from cde_jax.interop.architectures import jax_only, own_keys, reference_keys, transformers_keys
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.read import TOKENIZER_FILES, check_tokenizer
from cde_jax.interop.reference_model import ModelConfig
from cde_jax.interop.weight_mapping import TIED, model_mapping, to_torch
from cde_jax.models.attention import Prefix
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextCache, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig

Model = Biencoder | ContextualEncoder
MODULE = "modeling_cde_jax"
Tensors = dict[str, Float[np.ndarray, "..."]]
_FIRST_STAGE = ("first_stage_model.", "second_stage_model.prompt_projection.", "second_stage_model.sequence_dropout")
_ONE_FILE = 1_800_000_000  # bytes of weights in an ONNX graph; protobuf ends at 2 GB, above it they lie beside it


def save_pretrained(
    model: Model, directory: str | Path, *, tokenizer: str | Path, settings: TextSettings, card: str | None = None
) -> None:
    """Write a model as a directory: config, safetensors, tokenizer files, what sentence-transformers needs, a card.

    Args:
      tokenizer: a directory whose tokenizer files are copied.
      card: the README.md; None writes a short one.

    Raises:
      ValueError: the tokenizer directory has no tokenizer.json, or its ids do not fit the embedding rows.
    """
    config = model.config
    with NewFolder(directory, marker="config.json") as new:
        _write_texts(new.path, config, settings, Path(tokenizer), card)
        if class_name := _transformers_class(config):
            _write_transformers(new.path, model, class_name, settings)
        else:
            tensors = to_torch(model_mapping(config), parameters(model))
            if getattr(config, "tie_token_embeddings", False):  # the reference has the table under both names
                tensors[TIED[0]] = tensors[TIED[1]]
            _write_with_module(new.path, config, settings, tensors)
            _write_modules(new.path, [f"{MODULE}.Transformer"], kwargs=["dataset_embeddings"])
        new.put_in_place()


def export_corpus(
    model: ContextualEncoder,
    context: Float[Array | np.ndarray, "J D"] | ContextCache | None,
    directory: str | Path,
    *,
    tokenizer: str | Path,
    settings: TextSettings,
    card: str | None = None,
    onnx: bool = True,
) -> None:
    """Write `model` with `context` as a directory of a model without a context input and without a first stage.

    `context` is the first stage's vectors, or what `model.prepare_context` makes of them; None means null slots.

    `SentenceTransformer(directory, trust_remote_code=True).encode(texts, prompt_name=…)` and `onnx/model.onnx`
    (`input_ids`, `attention_mask`, int64 [B, L] → `sentence_embedding`, float32 [B, D]) give the unit vectors of
    `model.embed(…, context)`.

    Raises:
      ValueError: the model has settings that run in JAX only; `onnx` without PyTorch's exporter.
    """
    missing = [name for name in ("torch", "onnx", "onnxscript") if onnx and find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: install cde_jax[torch], or export without it (onnx=False)")
    config = model.config
    if unsupported := jax_only(config):
        raise ValueError(f"settings that run in JAX only cannot be exported with a context: {', '.join(unsupported)}")
    slots, prefix = context if isinstance(context, ContextCache) else model.prepare_context(context)
    tensors = to_torch(model_mapping(config), parameters(model))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FIRST_STAGE)}
    constant = np.asarray(slots, np.float32) if prefix is None else keys_values(prefix)
    tensors["second_stage_model.context"] = np.ascontiguousarray(constant)
    with NewFolder(directory, marker="config.json") as new:
        _write_texts(new.path, config, settings, Path(tokenizer), card)
        _write_with_module(new.path, config, settings, tensors, corpus_slots=slots.shape[-2])
        _write_modules(new.path, [f"{MODULE}.Transformer", "sentence_transformers.models.Normalize"])
        if onnx:
            _write_onnx(new.path)
        new.put_in_place()


def keys_values(prefix: Prefix) -> Float[np.ndarray, "layers 2 H P d"]:
    """Keys and values of all layers as the PyTorch module keeps them, float32."""
    keys, values = (np.asarray(x, np.float32) for x in prefix)
    return np.stack([keys.swapaxes(-2, -1), values], axis=1)


def _write_texts(folder: Path, config: ModelConfig, settings: TextSettings, tokenizer: Path, card: str | None) -> None:
    """Tokenizer files, prompts and length as sentence-transformers reads them (one length for all), README.md."""
    if not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{tokenizer}: expected a directory with tokenizer.json, to be copied beside the weights")
    check_tokenizer(tokenizer, config)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    prompts = {"query": settings.query_prefix, "document": settings.document_prefix}
    keys = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", keys)
    length = max(settings.query_length, settings.document_length)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    attention = getattr(config, "context_attention", None)
    kind = f"contextual encoder ({attention} attention)" if attention else "biencoder"
    short = f"---\nlibrary_name: sentence-transformers\n---\n\nA {kind} exported by cde_jax.\n"
    (folder / "README.md").write_text(short if card is None else card, encoding="utf-8")


def _write_with_module(folder: Path, config: ModelConfig, settings: TextSettings, tensors: Tensors, **own: Any) -> None:
    """Weights, `config.json` with the reference's keys and our own (and what `own` adds), and the PyTorch module."""
    keys = {
        "architectures": ["CdeModel"],
        "model_type": "cde_jax",
        "auto_map": {"AutoConfig": f"{MODULE}.CdeConfig", "AutoModel": f"{MODULE}.CdeModel"},
        **reference_keys(config),
        "max_seq_length": max(settings.query_length, settings.document_length),
        "cde_jax": {**own_keys(config, settings), **own},
    }
    write_json(folder / "config.json", keys)
    _save_tensors(folder / "model.safetensors", tensors)
    source = files("cde_jax.interop").joinpath("torch_module.py").read_text(encoding="utf-8")
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")


def _write_modules(folder: Path, types: Sequence[str], **first: Any) -> None:
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


def _transformers_class(config: ModelConfig) -> str | None:
    """The class of transformers that runs this biencoder's encoder as it is, if there is one."""
    c = config.encoder
    if type(config) is not BiencoderConfig or type(c) is not EncoderConfig or config.residual or not c.token_types:
        return None
    biases = (c.attention_bias, *c.mlp_bias)
    if c.positions == "rotary" and c.activation == "swiglu" and not any(biases):
        return "NomicBertModel"
    return "BertModel" if c.positions == "learned" and c.activation == "gelu" and all(biases) else None


def _write_transformers(folder: Path, model: Biencoder, class_name: str, settings: TextSettings) -> None:
    """A directory of a class of transformers, with pooling and head as modules of sentence-transformers."""
    config = model.config
    naming = "native" if class_name == "NomicBertModel" else "bert"
    tensors = to_torch(model_mapping(config, naming, prefix=""), parameters(model))
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mlp.")}
    _save_tensors(folder / "model.safetensors", tensors)
    keys = transformers_keys(config.encoder, class_name)
    write_json(folder / "config.json", keys | {"cde_jax": own_keys(config, settings)})
    kinds = ["Transformer", "Pooling", *(["Dense", "Dense"] if head else []), "Normalize"]
    _write_modules(folder, [f"sentence_transformers.models.{kind}" for kind in kinds])
    modes = {"cls_token": config.pooling == "cls", "mean_tokens": config.pooling == "mean"}
    modes |= {"max_tokens": False, "mean_sqrt_len_tokens": False}
    pooling = {"word_embedding_dimension": config.encoder.width}
    pooling |= {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    write_json(folder / "1_Pooling" / "config.json", pooling)
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


def _write_onnx(directory: Path) -> None:
    """Write `onnx/model.onnx` of the model in `directory`, by PyTorch's own exporter."""
    import torch

    spec = spec_from_file_location(MODULE, directory / f"{MODULE}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    class UnitVectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = module.CdeModel.from_pretrained(directory).eval()

        def forward(self, input_ids, attention_mask):
            return torch.nn.functional.normalize(self.model(input_ids, attention_mask), dim=-1)

    (directory / "onnx").mkdir()
    names, dynamic = ("input_ids", "attention_mask"), {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        torch.onnx.export(
            UnitVectors(),
            tuple(torch.ones(2, 8, dtype=torch.long) for _ in names),
            directory / "onnx" / "model.onnx",
            input_names=names,
            output_names=["sentence_embedding"],
            dynamic_shapes=dict.fromkeys(names, dynamic),
            dynamo=True,
            external_data=(directory / "model.safetensors").stat().st_size > _ONE_FILE,
            verbose=False,
        )
