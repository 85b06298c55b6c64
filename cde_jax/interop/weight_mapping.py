"""Names of PyTorch tensors ↔ paths of our parameters: one table for three namings, used in both directions.

A mapping gives, for the path of each of our arrays, the torch tensors that it is made of: they lie one after another
along torch's first axis, are transposed where torch keeps `[out, in]` (our `kernel`), and have a `{}` in their names
for the layer (axis 0 of our array). Loading demands a bijection: every tensor is used or named in `IGNORED`, and every
parameter is filled.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Shaped

from cde_jax.interop.reference_model import ModelConfig
from cde_jax.models.contextual import ContextualConfig
from cde_jax.models.encoder import EncoderConfig

Shape = tuple[int, ...]
Mapped = dict[str, tuple[str, ...]]

# Our layers in the three namings: NomicBERT as the reference and nomic-ai publish it (also our own contextual exports),
# NomicBERT as transformers' own class names it, and BERT.
NAMINGS = ("reference", "native", "bert")
_BLOCK = ("encoder.layers.{}.", "layers.{}.", "encoder.layer.{}.")
_MODULES = {
    "norm": ("emb_ln", "embeddings.LayerNorm", "embeddings.LayerNorm"),
    "blocks.qkv": (
        "attn.Wqkv",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.self.query attention.self.key attention.self.value",
    ),
    "blocks.out": ("attn.out_proj", "self_attn.o_proj", "attention.output.dense"),
    "blocks.norm1": ("norm1", "post_attention_layernorm", "attention.output.LayerNorm"),
    "blocks.mlp_in": ("mlp.fc11 mlp.fc12", "mlp.up_proj mlp.gate_proj", "intermediate.dense"),
    "blocks.mlp_out": ("mlp.fc2", "mlp.down_proj", "output.dense"),
    "blocks.norm2": ("norm2", "post_mlp_layernorm", "output.LayerNorm"),
}

# Both names of one table where both stages share their word embeddings.
TIED = tuple(
    f"{stage}.embeddings.word_embeddings.weight"
    for stage in ("first_stage_model.embedder", "second_stage_model.backbone")
)

# Tensors that published files carry and that no embedding depends on: poolers and pretraining heads.
IGNORED = re.compile(r"(.*\.)?(pooler\.dense\.(weight|bias)|position_ids|(original_)?inv_freq)|cls\..*")


def encoder_mapping(config: EncoderConfig, naming: str = "reference") -> Mapped:
    """The names of an `Encoder`'s parameters in a naming of `NAMINGS`."""
    column = NAMINGS.index(naming)
    tables = ("word", "position", "token_type")
    mapping = {f"{table}.embedding": (f"embeddings.{table}_embeddings.weight",) for table in tables}
    for path, names in _MODULES.items():
        prefix, modules = _BLOCK[column] if path.startswith("blocks.") else "", names[column].split()
        if modules == ["mlp.fc11", "mlp.fc12"] and not config.gated:
            modules = ["mlp.fc1"]
        mapping |= _module(path, *(prefix + module for module in modules))
    return mapping


def biencoder_mapping(config: EncoderConfig, naming: str = "reference", prefix: str = "") -> Mapped:
    """The names of a `Biencoder`'s; the reference puts `embedder.` before the encoder's, Hugging Face nothing."""
    encoder = _nested("encoder.", prefix, encoder_mapping(config, naming))
    return encoder | _module("head_in", "mlp.0") | _module("head_out", "mlp.2")


def contextual_mapping(config: ContextualConfig) -> Mapped:
    """The names of a `ContextualEncoder`'s, which are the reference's."""
    first = biencoder_mapping(config.first_stage.encoder, prefix="embedder.")
    second = {"null": ("sequence_dropout_null_embedding",), "slot_bias": ("slot_bias",)}  # the reference has no bias
    second |= _nested("encoder.", "backbone.", encoder_mapping(config.second_stage))
    for path, name in (("prompt", "prompt_projection"), ("project", "output_projection")):
        second |= _module(f"{path}_in", f"{name}.0") | _module(f"{path}_out", f"{name}.2")
    mapping = _nested("first_stage.", "first_stage_model.", first) | _nested("", "second_stage_model.", second)
    if getattr(config, "tie_token_embeddings", False):  # NNX keeps the shared table under the encoder's path
        del mapping["first_stage.encoder.word.embedding"]
    return mapping


def model_mapping(config: ModelConfig, naming: str = "reference", prefix: str = "embedder.") -> Mapped:
    """`contextual_mapping`, or `biencoder_mapping` with a naming and what stands before the encoder's names."""
    if isinstance(config, ContextualConfig):
        return contextual_mapping(config)
    return biencoder_mapping(config.encoder, naming, prefix)


def _module(path: str, *names: str) -> Mapped:
    """Weight and bias of a linear layer, or of a norm."""
    weight = "scale" if "norm" in path else "kernel"
    return {
        f"{path}.{weight}": tuple(f"{name}.weight" for name in names),
        f"{path}.bias": tuple(f"{name}.bias" for name in names),
    }


def _nested(path: str, prefix: str, mapping: Mapped) -> Mapped:
    return {path + inner: tuple(prefix + name for name in names) for inner, names in mapping.items()}


def torch_parts(
    mapping: Mapped, state: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Name of each torch tensor that our arrays (by path) are made of, and the view of the array that it is."""
    for path, array in state.items():
        names = mapping[path]
        for i, layer in enumerate(array if "{}" in names[0] else [array]):
            rows = layer.T if path.endswith(".kernel") else layer  # torch's order of axes
            yield from zip((name.format(i) for name in names), np.split(rows, len(names)), strict=True)


def to_torch(mapping: Mapped, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Float[np.ndarray, "..."]]:
    """The torch tensors (contiguous float32 numpy arrays, by name) of our parameters (by path)."""
    return {name: np.ascontiguousarray(part, np.float32) for name, part in torch_parts(mapping, state)}


def from_torch(
    mapping: Mapped, path: str, shape: Shape, load: Callable[[str], Shaped[np.ndarray, "..."]]
) -> Float[np.ndarray, "..."]:
    """Our float32 array of a path, filled from `load(name)` tensor by tensor."""
    raw = np.empty(math.prod(shape) + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4  # JAX on CPU takes an array on a 64-byte boundary over without a copy
    array = raw[start : start + math.prod(shape)].reshape(shape)
    for name, part in torch_parts(mapping, {path: array}):
        part[...] = load(name)
    return array


def check_bijection(mapping: Mapped, shapes: Mapping[str, Shape], stored: Mapping[str, Shape], source: str) -> None:
    """One ValueError that lists every missing, unmatched and misshapen tensor.

    `shapes` are those of our parameters by path, `stored` those of the tensors by name.
    """
    state = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}  # no memory
    expected = {name: part.shape for name, part in torch_parts(mapping, state)}
    known = {name: shape for name, shape in stored.items() if name in expected}
    rest = {name: shape for name, shape in stored.items() if name not in expected and not IGNORED.fullmatch(name)}
    groups = {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored],
        "unmatched": [f"{name} {list(shape)}" for name, shape in rest.items()],
        "misshapen": [
            f"{name}: expected {list(expected[name])}, got {list(shape)}"
            + (" (config.json's vocab_size does not fit the file)" if name.endswith("word_embeddings.weight") else "")
            for name, shape in known.items()
            if shape != expected[name]
        ],
    }
    if any(groups.values()):
        raise ValueError(
            f"{source}: the tensors are not those of the model that config.json describes; change config.json or "
            f"the file so that every tensor has its place.\n"
            + "\n".join(f"  {kind}: " + "; ".join(sorted(group)) for kind, group in groups.items() if group)
        )
