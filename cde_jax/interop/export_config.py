"""The `config.json` of an export: every field of a model's config, and the reference's keys for readers of those."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cde_jax.interop.architectures import backbone_keys, build_config
from cde_jax.interop.reference_model import (
    ReferenceBiencoderConfig,
    ReferenceContextualConfig,
    ReferenceEncoderConfig,
)
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig

FORMAT = 2
RUNTIME = ("dtype", "remat", "attention")  # how a model is run, which an export does not keep
# Fields that format 1 wrote for every model, and the value at which a model is the same without.
_FORMAT_1 = {
    "statistics_size": 0, "residual_output": True, "text_token_types": 1, "slot_token_types": 0, "rotary_start": 0,
    "absolute_positions": False, "fixed_context": "no", "tie_token_embeddings": False, "pool_slots": False,
    "pool_after_token": None, "rotary_axis": "sequence", "positions_skip_padding": False, "zero_padding": False,
}  # fmt: skip


def own_keys(model: BiencoderConfig | ContextualConfig, settings: Any) -> dict[str, Any]:
    """The object "cde_jax" of a `config.json`: it alone says how the directory is loaded again."""
    return {
        "format": FORMAT,
        "numerics": numerics_of(model),
        "jax_only": jax_only(model),
        "model": to_dict(model),
        "text": dataclasses.asdict(settings),
    }


def jax_only(model: BiencoderConfig | ContextualConfig) -> list[str]:
    """Settings that the PyTorch module and the ONNX graph do not know."""
    contextual = isinstance(model, ContextualConfig)
    first = model.first_stage if contextual else model
    used = {
        "prenorm": any(getattr(encoder, "prenorm", False) for encoder in (first.encoder, model.encoder)),
        "tokens_per_document": first.vectors_per_text > 1,
        "soft_prompt": contextual and not model.soft_prompt,
        "pool_slots": getattr(model, "pool_slots", False),
        "pool_after_token": getattr(model, "pool_after_token", None) is not None,
    }
    return [name for name, on in used.items() if on]


def reference_keys(model: BiencoderConfig | ContextualConfig) -> dict[str, Any]:
    """The top level of `config.json` by the reference's keys, for readers of those."""
    contextual = isinstance(model, ContextualConfig)
    first = model.first_stage if contextual else model
    keys = {
        "architecture": "transductive" if contextual else "biencoder",
        "embedder": "cde_jax",
        "pooling_strategy": first.pooling,
        "transductive_tokens_per_document": first.vectors_per_text,
        "backbone_config": backbone_keys(model.encoder),
    }
    if not contextual:
        return keys | {"embedding_output_dim": model.output_width}
    keys |= {
        "limit_layers_first_stage": first.encoder.layers,
        "transductive_corpus_size": model.context_size,
        "transductive_sequence_dropout_prob": 0.005 if model.null_embedding else 0.0,
        "transductive_tie_token_embeddings": getattr(model, "tie_token_embeddings", False),
        "disable_transductive_rotary_embedding": getattr(model, "rotary_start", model.slots) != 0,
    }
    if numerics_of(model) == "training":
        keys["pool_ignore_contextual_tokens"] = not model.pool_slots
        keys["pool_ignore_instruction_tokens"] = model.pool_after_token is not None
        keys["pool_instruction_end_id"] = model.pool_after_token
    return keys


def numerics_of(model: BiencoderConfig | ContextualConfig) -> str:
    """Which program's numbers a config gives: one of `NUMERICS`, or "cde_jax" for our own."""
    return getattr(model if isinstance(model, ContextualConfig) else model.encoder, "numerics", None) or "cde_jax"


def to_dict(model: BiencoderConfig | ContextualConfig) -> dict[str, Any]:
    """Every field of a config as JSON, without the run-time choices."""

    def without_runtime(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: without_runtime(inner) for name, inner in value.items() if name not in RUNTIME}

    return without_runtime(dataclasses.asdict(model))


def from_dict(fields: Mapping[str, Any]) -> BiencoderConfig | ContextualConfig:
    """The inverse of `to_dict`; a field this version does not know is a ValueError that names it."""
    contextual = ReferenceContextualConfig if "numerics" in fields else ContextualConfig
    return _from_dict(contextual if "second_stage" in fields else ReferenceBiencoderConfig, fields)


def _from_dict(kind: type, fields: Mapping[str, Any]) -> Any:
    kinds = {"encoder": ReferenceEncoderConfig, "second_stage": ReferenceEncoderConfig}
    kinds["first_stage"] = ReferenceBiencoderConfig
    known, values = {field.name for field in dataclasses.fields(kind)}, {}
    for name, value in fields.items():
        if name not in RUNTIME and _FORMAT_1.get(name, ...) != value:
            value = _from_dict(kinds[name], value) if name in kinds else value
            values[name] = tuple(value) if isinstance(value, list) else value
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}; it was written by another version of cde_jax: use that")
    return build_config(kind, values)
