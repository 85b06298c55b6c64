"""The `config.json` of an export: every field of a model's config, and the reference's keys for readers of those."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cde_jax.interop.architectures import build_config
from cde_jax.interop.reference_model import (
    ReferenceBiencoderConfig,
    ReferenceContextualConfig,
    ReferenceEncoderConfig,
)
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig
from cde_jax.models.encoder import EncoderConfig

FORMAT = 2
RUNTIME = ("dtype", "remat", "attention")  # how a model is run, which an export does not keep
# Fields that format 1 wrote for every model, and the value at which a model is the same without.
_FORMAT_1 = {
    "statistics_size": 0,
    "tie_token_embeddings": False,
    "rotary_start": 0,
    "pool_slots": False,
    "pool_after_token": None,
    "residual_output": True,
    "text_token_types": 1,
    "slot_token_types": 0,
    "absolute_positions": False,
    "fixed_context": "no",
    "rotary_axis": "sequence",
    "positions_skip_padding": False,
    "zero_padding": False,
}


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
    encoders = [first.encoder, model.second_stage] if contextual else [first.encoder]
    used = {
        "prenorm": any(getattr(encoder, "prenorm", False) for encoder in encoders),
        "tokens_per_document": first.vectors_per_text > 1,
        "soft_prompt": contextual and not model.soft_prompt,
        "pool_slots": getattr(model, "pool_slots", False),
        "pool_after_token": getattr(model, "pool_after_token", None) is not None,
    }
    return [name for name, on in used.items() if on]


def reference_keys(model: BiencoderConfig | ContextualConfig) -> dict[str, Any]:
    """The top level of `config.json` in the reference's words, for readers that know the reference."""
    if isinstance(model, BiencoderConfig):
        return {
            "architecture": "biencoder",
            "embedder": "cde_jax",
            "embedding_output_dim": model.output_width,
            "pooling_strategy": model.pooling,
            "transductive_tokens_per_document": model.vectors_per_text,
            "backbone_config": backbone_keys(model.encoder),
        }
    keys = {
        "architecture": "transductive",
        "embedder": "cde_jax",
        "limit_layers_first_stage": model.first_stage.encoder.layers,
        "transductive_corpus_size": model.context_size,
        "transductive_tokens_per_document": model.first_stage.vectors_per_text,
        "transductive_sequence_dropout_prob": 0.005 if model.null_embedding else 0.0,
        "transductive_tie_token_embeddings": getattr(model, "tie_token_embeddings", False),
        "disable_transductive_rotary_embedding": getattr(model, "rotary_start", model.slots) != 0,
        "pooling_strategy": model.first_stage.pooling,
        "backbone_config": backbone_keys(model.second_stage),
    }
    if numerics_of(model) == "training":
        keys["pool_ignore_contextual_tokens"] = not model.pool_slots
        keys["pool_ignore_instruction_tokens"] = model.pool_after_token is not None
        keys["pool_instruction_end_id"] = model.pool_after_token
    return keys


def backbone_keys(encoder: EncoderConfig) -> dict[str, Any]:
    """NomicBERT's own keys for an encoder of ours."""
    return {
        "model_type": "nomic_bert",
        "vocab_size": encoder.vocab_size,
        "n_positions": encoder.max_positions,
        "n_embd": encoder.width,
        "n_head": encoder.heads,
        "n_layer": encoder.layers,
        "n_inner": encoder.mlp_width,
        "activation_function": encoder.activation,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "type_vocab_size": encoder.token_types,
        "prenorm": getattr(encoder, "prenorm", False),
        "rotary_emb_fraction": getattr(encoder, "rotary_fraction", 1.0) if encoder.positions == "rotary" else 0.0,
        "rotary_emb_base": encoder.rotary_base,
        "rotary_emb_interleaved": getattr(encoder, "rotary_interleaved", False),
        "qkv_proj_bias": encoder.attention_bias,
        "mlp_fc1_bias": encoder.mlp_bias[0],
        "mlp_fc2_bias": encoder.mlp_bias[1],
        "pad_vocab_size_multiple": 1,
    }


def numerics_of(model: BiencoderConfig | ContextualConfig) -> str:
    """Which program's numbers a config gives: one of `NUMERICS`, or "cde_jax" for our own."""
    return getattr(model if isinstance(model, ContextualConfig) else model.encoder, "numerics", None) or "cde_jax"


def to_dict(model: BiencoderConfig | ContextualConfig) -> dict[str, Any]:
    """Every field of a config as JSON, without the run-time choices."""

    def without_runtime(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: without_runtime(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if name not in RUNTIME
        }

    return without_runtime(dataclasses.asdict(model))


def from_dict(fields: Mapping[str, Any]) -> BiencoderConfig | ContextualConfig:
    """The inverse of `to_dict`; a field this version does not know is a ValueError that names it."""

    def build(kind: type, fields: Mapping[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(kind)}
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if name not in RUNTIME and _FORMAT_1.get(name, ...) != value
        }
        if unknown := sorted(fields.keys() - known):
            raise ValueError(
                f"unknown fields {', '.join(unknown)}; it was written by another version of cde_jax: use that"
            )
        kinds = {"encoder": ReferenceEncoderConfig, "second_stage": ReferenceEncoderConfig}
        for name, inner in (kinds | {"first_stage": ReferenceBiencoderConfig}).items():
            if name in fields:
                fields[name] = build(inner, fields[name])
        return build_config(kind, fields)

    if "second_stage" not in fields:
        return build(ReferenceBiencoderConfig, fields)
    return build(ReferenceContextualConfig if "numerics" in fields else ContextualConfig, fields)
