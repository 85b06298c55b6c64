"""Our own `config.json`: every field of a model's config, beside the reference's keys for readers that know those."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cde_jax.models.contextual import BiencoderConfig, ContextualConfig
from cde_jax.models.encoder import EncoderConfig

FORMAT = 1
_RETIRED = {"statistics_size": 0}  # fields of before, and the value at which a model is the same without


def own_keys(model: BiencoderConfig | ContextualConfig, settings: Any) -> dict[str, Any]:
    """What stands under "cde_jax" in a `config.json`: it alone says how the directory is read again."""
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
    odd = {
        "prenorm": first.encoder.prenorm or (contextual and model.second_stage.prenorm),
        "tokens_per_document": first.tokens_per_document > 1,
        "soft_prompt": contextual and not model.soft_prompt,
        "pool_slots": contextual and model.pool_slots,
        "pool_after_token": contextual and model.pool_after_token is not None,
    }
    return [name for name, on in odd.items() if on]


def reference_keys(model: BiencoderConfig | ContextualConfig) -> dict[str, Any]:
    """The top level of `config.json` in the reference's words, for readers that know the reference."""
    contextual = isinstance(model, ContextualConfig)
    first = model.first_stage if contextual else model
    backbone = model.second_stage if contextual else model.encoder
    keys = {
        "architecture": "transductive" if contextual else "biencoder",
        "embedder": "cde_jax",
        "embedding_output_dim": None if contextual else model.output_width,
        "limit_layers": None,
        "limit_layers_first_stage": first.encoder.layers if contextual else None,
        "logit_scale": 50.0,
        "disable_dropout": True,
        "transductive_corpus_size": model.context_size if contextual else 1,
        "transductive_tokens_per_document": first.tokens_per_document,
        "transductive_sequence_dropout_prob": 0.005 if contextual and model.null_embedding else 0.0,
        "transductive_tie_token_embeddings": contextual and model.tie_token_embeddings,
        "disable_transductive_rotary_embedding": not (
            contextual and model.absolute_positions and model.rotary_start == 0
        ),
        "autoregressive_backbone": False,
        "pooling_strategy": first.pooling,
        "backbone_config": backbone_keys(backbone),
    }
    if contextual and numerics_of(model) == "training":
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
        "prenorm": encoder.prenorm,
        "rotary_emb_fraction": encoder.rotary_fraction if encoder.positions == "rotary" else 0.0,
        "rotary_emb_base": encoder.rotary_base,
        "rotary_emb_interleaved": encoder.rotary_interleaved,
        "qkv_proj_bias": encoder.attention_bias,
        "mlp_fc1_bias": encoder.mlp_bias[0],
        "mlp_fc2_bias": encoder.mlp_bias[1],
        "pad_vocab_size_multiple": 1,
    }


def numerics_of(model: BiencoderConfig | ContextualConfig) -> str:
    """Which program's numbers a config gives: one of `NUMERICS`, or "cde_jax" for the clean form."""
    encoder = model.second_stage if isinstance(model, ContextualConfig) else model.encoder
    if encoder.rotary_axis == "heads":
        return "shipped"
    if encoder.positions_skip_padding:
        return "training"
    sequence = isinstance(model, ContextualConfig) and model.absolute_positions
    return "shipped-sequence" if sequence else "cde_jax"


def to_dict(model: BiencoderConfig | ContextualConfig) -> dict[str, Any]:
    """Every field of a config as JSON, with the run-time choices (dtype, remat, attention) at their plain values."""

    def plain(encoder: EncoderConfig) -> EncoderConfig:
        return dataclasses.replace(encoder, dtype="float32", remat=False, attention="auto")

    if isinstance(model, BiencoderConfig):
        return dataclasses.asdict(dataclasses.replace(model, encoder=plain(model.encoder)))
    first = dataclasses.replace(model.first_stage, encoder=plain(model.first_stage.encoder))
    return dataclasses.asdict(dataclasses.replace(model, first_stage=first, second_stage=plain(model.second_stage)))


def from_dict(fields: Mapping[str, Any], source: str) -> BiencoderConfig | ContextualConfig:
    """The inverse of `to_dict`; a field this version does not know is a ValueError that names it."""

    def build(kind: type, fields: Mapping[str, Any]):
        known = {field.name: field.type for field in dataclasses.fields(kind)}
        fields = {name: value for name, value in fields.items() if _RETIRED.get(name, ...) != value}
        unknown = sorted(fields.keys() - known.keys())
        if unknown:
            raise ValueError(
                f"{source}: unknown fields {', '.join(unknown)}; it was written by another version of cde_jax: use that"
            )
        values = dict(fields)
        for name, inner in (
            ("encoder", EncoderConfig),
            ("second_stage", EncoderConfig),
            ("first_stage", BiencoderConfig),
        ):
            if values.get(name) is not None:
                values[name] = build(inner, values[name])
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    return build(ContextualConfig if "second_stage" in fields else BiencoderConfig, fields)
