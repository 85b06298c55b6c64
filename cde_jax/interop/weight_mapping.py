"""Names of PyTorch tensors ↔ paths of our parameters: one table per naming, used in both directions.

An entry names the torch tensors that make up one of our arrays: they lie one after another along torch's first axis
(`names`, with `{}` for the layer, axis 0 of our array), and are transposed where torch keeps `[out, in]`.
Loading demands a bijection: every tensor is used or named in `IGNORED`, and every parameter is filled.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from cde_jax.models.contextual import ContextualConfig
from cde_jax.models.encoder import EncoderConfig


class Entry(NamedTuple):
    """One of our arrays, by path, and the torch tensors that it is made of."""

    path: str
    names: tuple[str, ...]
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        """Whether axis 0 of our array is the layer."""
        return "{}" in self.names[0]


Shape = tuple[int, ...]
Mapped = tuple[Entry, ...]


def _dense(path: str, *names: str) -> Mapped:
    return (
        Entry(f"{path}.kernel", tuple(f"{name}.weight" for name in names), transpose=True),
        Entry(f"{path}.bias", tuple(f"{name}.bias" for name in names)),
    )


def _norm(path: str, name: str) -> Mapped:
    return Entry(f"{path}.scale", (f"{name}.weight",)), Entry(f"{path}.bias", (f"{name}.bias",))


_EMBEDDINGS = (
    Entry("word.embedding", ("embeddings.word_embeddings.weight",)),
    Entry("position.embedding", ("embeddings.position_embeddings.weight",)),
    Entry("token_type.embedding", ("embeddings.token_type_embeddings.weight",)),
)

# NomicBERT as the reference and nomic-ai publish it; also what our own contextual exports use.
REFERENCE = (
    *_EMBEDDINGS,
    *_norm("norm", "emb_ln"),
    *_dense("blocks.qkv", "encoder.layers.{}.attn.Wqkv"),
    *_dense("blocks.out", "encoder.layers.{}.attn.out_proj"),
    *_norm("blocks.norm1", "encoder.layers.{}.norm1"),
    *_dense("blocks.mlp_out", "encoder.layers.{}.mlp.fc2"),
    *_norm("blocks.norm2", "encoder.layers.{}.norm2"),
)
_REFERENCE_GATED = _dense("blocks.mlp_in", "encoder.layers.{}.mlp.fc11", "encoder.layers.{}.mlp.fc12")
_REFERENCE_PLAIN = _dense("blocks.mlp_in", "encoder.layers.{}.mlp.fc1")

# NomicBERT as transformers' own class names it.
NATIVE = (
    *_EMBEDDINGS,
    *_norm("norm", "embeddings.LayerNorm"),
    *_dense("blocks.qkv", *(f"layers.{{}}.self_attn.{x}_proj" for x in "qkv")),
    *_dense("blocks.out", "layers.{}.self_attn.o_proj"),
    *_norm("blocks.norm1", "layers.{}.post_attention_layernorm"),
    *_dense("blocks.mlp_in", "layers.{}.mlp.up_proj", "layers.{}.mlp.gate_proj"),
    *_dense("blocks.mlp_out", "layers.{}.mlp.down_proj"),
    *_norm("blocks.norm2", "layers.{}.post_mlp_layernorm"),
)

BERT = (
    *_EMBEDDINGS,
    *_norm("norm", "embeddings.LayerNorm"),
    *_dense("blocks.qkv", *(f"encoder.layer.{{}}.attention.self.{x}" for x in ("query", "key", "value"))),
    *_dense("blocks.out", "encoder.layer.{}.attention.output.dense"),
    *_norm("blocks.norm1", "encoder.layer.{}.attention.output.LayerNorm"),
    *_dense("blocks.mlp_in", "encoder.layer.{}.intermediate.dense"),
    *_dense("blocks.mlp_out", "encoder.layer.{}.output.dense"),
    *_norm("blocks.norm2", "encoder.layer.{}.output.LayerNorm"),
)

HEAD = (*_dense("head_in", "mlp.0"), *_dense("head_out", "mlp.2"))

SECOND_STAGE = (
    *_dense("prompt_in", "second_stage_model.prompt_projection.0"),
    *_dense("prompt_out", "second_stage_model.prompt_projection.2"),
    *_dense("project_in", "second_stage_model.output_projection.0"),
    *_dense("project_out", "second_stage_model.output_projection.2"),
    Entry("null", ("second_stage_model.sequence_dropout_null_embedding",)),
    Entry("slot_bias", ("second_stage_model.slot_bias",)),  # the reference has none
)

# Both names of one table where both stages share their word embeddings.
TIED = tuple(
    f"{stage}.embeddings.word_embeddings.weight"
    for stage in ("first_stage_model.embedder", "second_stage_model.backbone")
)

# Tensors that published files carry and that no embedding depends on: poolers and pretraining heads.
IGNORED = re.compile(r"(.*\.)?(pooler\.dense\.(weight|bias)|position_ids|(original_)?inv_freq)|cls\..*")


def encoder_mapping(config: EncoderConfig, naming: str = "reference") -> Mapped:
    """The table of an `Encoder` in a naming: `reference`, `native` (transformers' nomic_bert) or `bert`."""
    if naming == "reference":
        return REFERENCE + (_REFERENCE_GATED if config.gated else _REFERENCE_PLAIN)
    return {"native": NATIVE, "bert": BERT}[naming]


def biencoder_mapping(config: EncoderConfig, naming: str = "reference", prefix: str = "") -> Mapped:
    """The table of a `Biencoder`; the reference puts `embedder.` before the encoder, Hugging Face nothing."""
    return (*_nested("encoder.", prefix, encoder_mapping(config, naming)), *HEAD)


def contextual_mapping(config: ContextualConfig) -> Mapped:
    """The table of a `ContextualEncoder`: the reference's key names."""
    first = biencoder_mapping(config.first_stage.encoder, prefix="embedder.")
    entries = (
        *_nested("first_stage.", "first_stage_model.", first),
        *_nested("encoder.", "second_stage_model.backbone.", encoder_mapping(config.second_stage)),
        *SECOND_STAGE,
    )
    if getattr(config, "tie_token_embeddings", False):  # NNX keeps the shared table under the encoder's path
        entries = tuple(entry for entry in entries if entry.path != "first_stage.encoder.word.embedding")
    return entries


def _nested(path: str, name: str, entries: Mapped) -> list[Entry]:
    return [Entry(path + e.path, tuple(name + n for n in e.names), e.transpose) for e in entries]


def _parts(entry: Entry, array: Shaped[np.ndarray, "..."]) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Name of each torch tensor of one of our arrays, and the view of the array that it is."""
    for i, layer in enumerate(array if entry.stacked else [array]):
        rows = np.atleast_1d(layer.T if entry.transpose else layer)  # torch's order of axes
        yield from zip((name.format(i) for name in entry.names), np.split(rows, len(entry.names)), strict=True)


def torch_shapes(mapping: Iterable[Entry], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Name and shape of every torch tensor that a model with these parameter shapes is made of."""
    state = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}  # no memory
    return {name: part.shape for name, part in _torch_parts(mapping, state)}


def check_bijection(expected: Mapping[str, Shape], stored: Mapping[str, Shape], source: str) -> None:
    """One ValueError that lists every missing, unmatched and misshapen tensor."""
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    unmatched = [
        f"{name} {list(shape)}"
        for name, shape in stored.items()
        if name not in expected and not IGNORED.fullmatch(name)
    ]
    misshapen = [
        f"{name}: expected {list(expected[name])}, got {list(shape)}"
        + (" (config.json's vocab_size does not fit the file)" if name.endswith("word_embeddings.weight") else "")
        for name, shape in stored.items()
        if name in expected and tuple(shape) != expected[name]
    ]
    groups = {"missing": missing, "unmatched": unmatched, "misshapen": misshapen}
    if any(groups.values()):
        raise ValueError(
            f"{source}: the tensors are not those of the model that config.json describes; change config.json or "
            f"the file so that every tensor has its place.\n"
            + "\n".join(f"  {kind}: " + "; ".join(sorted(group)) for kind, group in groups.items() if group)
        )


def from_torch(
    entry: Entry, shape: Shape, load: Callable[[str], Shaped[np.ndarray, "..."]]
) -> Float[np.ndarray, "..."]:
    """Our float32 array, filled from `load(name)` tensor by tensor."""
    array = _aligned(shape)
    for name, part in _parts(entry, array):
        part[...] = load(name)
    return array


def _aligned(shape: Shape) -> Float[np.ndarray, "..."]:
    """An empty float32 array on a 64-byte boundary, which JAX on CPU takes over without a copy."""
    raw = np.empty(math.prod(shape) + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + math.prod(shape)].reshape(shape)


def to_torch(
    mapping: Iterable[Entry], state: Mapping[str, Shaped[np.ndarray, "..."]]
) -> dict[str, Float[np.ndarray, "..."]]:
    """The torch tensors (contiguous float32 numpy arrays, by name) of our parameters (by path)."""
    return {name: np.ascontiguousarray(part, np.float32) for name, part in _torch_parts(mapping, state)}


def _torch_parts(
    mapping: Iterable[Entry], state: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    entries = {entry.path: entry for entry in mapping}
    assert state.keys() <= entries.keys(), f"no entry for {sorted(state.keys() - entries.keys())}"
    for path, array in state.items():
        yield from _parts(entries[path], array)
