"""`config.json` ↔ our configs: the reference's keys, NomicBERT's (its own and transformers') and BERT's."""

import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cde_jax.interop.reference_model import (
    Config,
    Numerics,
    ReferenceBiencoderConfig,
    ReferenceContextualConfig,
    ReferenceEncoderConfig,
    simplified,
)
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig
from cde_jax.models.encoder import EncoderConfig

NUMERICS = get_args(Numerics)

# Our fields by the keys of transformers' nomic_bert and bert …
TRANSFORMERS = {
    "vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "mlp_width", "max_position_embeddings": "max_positions", "type_vocab_size": "token_types",
    "layer_norm_eps": "norm_epsilon",
}  # fmt: skip
# … and by those of NomicBERT's own config class, a GPT-2 config, whose defaults stand for missing keys.
NOMIC = {
    "vocab_size": "vocab_size", "n_embd": "width", "n_layer": "layers", "n_head": "heads", "n_inner": "mlp_width",
    "activation_function": "activation", "n_positions": "max_positions", "type_vocab_size": "token_types",
    "layer_norm_epsilon": "norm_epsilon", "qkv_proj_bias": "attention_bias", "rotary_emb_base": "rotary_base",
    "rotary_emb_interleaved": "rotary_interleaved", "prenorm": "prenorm",
}  # fmt: skip
_NOMIC_DEFAULTS = {
    "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "activation_function": "gelu_new",
    "n_positions": 1024, "type_vocab_size": 2, "layer_norm_epsilon": 1e-5, "qkv_proj_bias": True, "mlp_fc1_bias": True,
    "mlp_fc2_bias": True, "rotary_emb_fraction": 0.0, "rotary_emb_interleaved": False, "prenorm": False,
    "pad_vocab_size_multiple": 1,
}  # fmt: skip
_NOMIC_ALIASES = {
    "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
_NOMIC_UNSUPPORTED = {  # and the value that is supported
    "causal": False, "use_rms_norm": False, "parallel_block": False, "norm_mlp": False, "num_heads_kv": None,
    "rotary_emb_scale_base": None,
}  # fmt: skip
_NOMIC_BERT_2048 = {
    "vocab_size": 30528, "n_inner": 3072, "activation_function": "swiglu", "n_positions": 2048,
    "layer_norm_epsilon": 1e-12, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "rotary_emb_fraction": 1.0, "rotary_emb_base": 1000, "pad_vocab_size_multiple": 64,
}  # fmt: skip
# For directories of the reference that name their backbone and leave its config out.
BACKBONES = {
    "nomic-ai/nomic-bert-2048": _NOMIC_BERT_2048,
    "nomic-ai/nomic-embed-text-v1": {**_NOMIC_BERT_2048, "n_positions": 8192},
    # The reference reads BERT's config with NomicBERT's class, which knows no layer_norm_eps: GPT-2's 1e-5 stays.
    "bert-base-uncased": {"n_positions": 512, "vocab_size": 30522},
}

# Smallest and largest value of a size; of sizes that are not listed: 1 to 10 million.
_SIZES = {
    "layers": (1, 1000),
    "context_size": (1, 1_000_000),
    "tokens_per_document": (1, 1000),
    **dict.fromkeys(("token_types", "soft_prompt", "rotary_start", "pool_after_token"), (0, 10_000_000)),
}
_POSITIVE = ("norm_epsilon", "rotary_base", "rotary_fraction")


def build_config(kind: type[Config], fields: Mapping[str, Any]) -> Config:
    """`kind(**fields)`, as our own class where it can be; a ValueError for values of another type and absurd sizes."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        low, high = _SIZES.get(name, (1, 10_000_000))
        if type(value) is int and int in (hints[name], *get_args(hints[name])) and not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {value!r:.80}")
        if not _has_type(value, hints[name]) or (name in _POSITIVE and not value > 0):
            expected = "a positive number" if name in _POSITIVE else f"a value of {hints[name]}"
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    return simplified(kind(**{name: float(x) if hints[name] is float else x for name, x in fields.items()}))


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (Union, UnionType):
        return any(_has_type(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_has_type, value, arguments))
    if hint is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is int if hint is int else isinstance(value, hint)


def nomic_encoder(config: Mapping[str, Any], numerics: str | None, layers: int | None = None) -> EncoderConfig:
    """An encoder by the keys of NomicBERT's own config class, or of transformers' nomic_bert."""
    numerics_field = {"numerics": numerics} if numerics in ("shipped", "training") else {}
    if config.get("model_type") == "nomic_bert" and "n_embd" not in config:
        rope = config.get("rope_parameters") or {}
        _check_supported(rope, {"rope_type": "default"})
        _check_supported(config, {"hidden_act": "silu"})
        optional = ("max_positions", "token_types", "norm_epsilon")  # with our defaults
        fields = {field: config[key] for key, field in TRANSFORMERS.items() if key in config or field not in optional}
        fields["rotary_base"] = rope.get("rope_theta", config.get("rope_theta", 1000.0))
        return build_config(ReferenceEncoderConfig, _first(fields, layers) | numerics_field)
    _check_supported(config, _NOMIC_UNSUPPORTED)
    base = {"rotary_emb_base": 1000 if numerics in ("training", None) else 10000}
    aliases = {key: config[alias] for alias, key in _NOMIC_ALIASES.items() if alias in config}
    keys = _NOMIC_DEFAULTS | base | aliases | dict(config)
    activation = keys["activation_function"]
    activation = "gelu" if activation.startswith("gelu") else activation  # the reference's are all exact erf GELUs
    gated, width = activation != "gelu", keys["n_embd"]
    inner = keys["n_inner"] or (int(8 * width / 3) if gated else 4 * width)
    fraction = keys["rotary_emb_fraction"]
    fields = {field: keys[key] for key, field in NOMIC.items()} | {
        "vocab_size": _round_up(keys["vocab_size"], keys["pad_vocab_size_multiple"]),
        "mlp_width": _round_up(inner, 256) if gated else inner,
        "activation": activation,
        "positions": "rotary" if fraction > 0 else "learned",
        "rotary_fraction": fraction if fraction > 0 else 1.0,
        "mlp_bias": (keys["mlp_fc1_bias"], keys["mlp_fc2_bias"]),
    }
    return build_config(ReferenceEncoderConfig, _first(fields, layers) | numerics_field)


def bert_encoder(config: Mapping[str, Any], layers: int | None = None) -> EncoderConfig:
    """An encoder by BERT's keys."""
    _check_supported(config, {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False})
    fields = {field: config[key] for key, field in TRANSFORMERS.items()}
    fields |= {"activation": "gelu", "positions": "learned", "attention_bias": True, "mlp_bias": (True, True)}
    return build_config(EncoderConfig, _first(fields, layers))


def _first(fields: dict[str, Any], layers: int | None) -> dict[str, Any]:
    return fields | {"layers": min(fields["layers"], layers)} if layers else fields


def _round_up(number: int, multiple: int) -> int:
    if type(number) is not int:
        raise TypeError(f"expected an integer, got {number!r:.80}")
    return -(-number // multiple) * multiple


def _check_supported(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    others = [f"{key}={config[key]}" for key, value in supported.items() if config.get(key, value) not in (value, None)]
    if others:
        raise ValueError(
            f"{', '.join(others)} is not supported; cde_jax runs bidirectional BERT and NomicBERT with LayerNorm, "
            f"plain multi-head attention, absolute or default rotary positions, and exact GELU or SiLU"
        )


def plain_encoder(config: Mapping[str, Any], numerics: str | None) -> EncoderConfig:
    """The encoder of a plain Hugging Face `config.json`; the error for an unknown model type lists the known ones."""
    model_type = config.get("model_type")
    if model_type == "bert":
        return bert_encoder(config)
    if model_type == "nomic_bert":
        return nomic_encoder(config, numerics)
    raise ValueError(
        f"unknown model_type {model_type!r} (architecture {config.get('architecture')!r}); supported are "
        f"cde-small-v1's layout (architecture: transductive or biencoder), nomic_bert (nomic-ai's and transformers' "
        f"own keys), bert, and exports of cde_jax"
    )


def transformers_keys(encoder: EncoderConfig, class_name: str) -> dict[str, Any]:
    """The `config.json` of transformers' own NomicBertModel or BertModel."""
    nomic = class_name == "NomicBertModel"
    keys = {
        "architectures": [class_name],
        "model_type": "nomic_bert" if nomic else "bert",
        **{key: getattr(encoder, field) for key, field in TRANSFORMERS.items()},
        "hidden_act": "silu" if nomic else "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    }
    return keys | ({"rope_parameters": {"rope_type": "default", "rope_theta": encoder.rotary_base}} if nomic else {})


def backbone_keys(encoder: EncoderConfig) -> dict[str, Any]:
    """The keys of NomicBERT's own config class for an encoder."""
    rotary = encoder.positions == "rotary"
    return {
        "model_type": "nomic_bert",
        **{key: getattr(encoder, field, False) for key, field in NOMIC.items()},
        "rotary_emb_fraction": getattr(encoder, "rotary_fraction", 1.0) if rotary else 0.0,
        "mlp_fc1_bias": encoder.mlp_bias[0],
        "mlp_fc2_bias": encoder.mlp_bias[1],
        "pad_vocab_size_multiple": 1,
    }


def is_reference(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` has the reference's keys at its top level."""
    return config.get("architecture") in ("transductive", "biencoder") and "embedder" in config


def reference_config(
    config: Mapping[str, Any], numerics: str, *, null: bool, colon: Callable[[], int]
) -> BiencoderConfig | ContextualConfig:
    """Our config of a directory of the reference.

    Args:
      null: whether the weights have a null embedding although their dropout probability is 0.
      colon: token id that ends an instruction; asked for only where the training code leaves instructions out.
    """
    _check_supported(config, {"autoregressive_backbone": False, "pooling_strategy": "mean"})
    contextual = config["architecture"] == "transductive"
    first_stage = {
        "encoder": _backbone(config, numerics, "limit_layers_first_stage" if contextual else "limit_layers"),
        "head": True,
        "output_width": None if contextual else config.get("embedding_output_dim"),
        "tokens_per_document": config.get("transductive_tokens_per_document", 1),
    }
    first_stage = build_config(ReferenceBiencoderConfig, first_stage)
    if not contextual:
        return first_stage
    training, documents = numerics == "training", config.get("transductive_corpus_size", 1)
    not_rotated = config.get("disable_transductive_rotary_embedding", True)
    skip_instruction = training and config.get("pool_ignore_instruction_tokens", False)
    fields = {
        "first_stage": first_stage,
        "second_stage": _backbone(config, numerics, "limit_layers"),
        "context_size": documents,
        "context_attention": "joint",
        "slot_bias": None,
        "null_embedding": null or config.get("transductive_sequence_dropout_prob", 0.0) > 0,
        "numerics": numerics,
        "rotary_start": documents * first_stage.vectors_per_text if not_rotated else 0,
        "tie_token_embeddings": config.get("transductive_tie_token_embeddings", False),
        "pool_slots": training and not config.get("pool_ignore_contextual_tokens", True),
        "pool_after_token": colon() if skip_instruction else None,
    }
    return build_config(ReferenceContextualConfig, fields)


def _backbone(config: Mapping[str, Any], numerics: str, limit: str) -> EncoderConfig:
    backbone, layers = config.get("backbone_config"), config.get(limit)
    if backbone is None:
        name = config.get("dataset_backbone") or config["embedder"]
        name = "nomic-ai/nomic-embed-text-v1" if name.startswith("nomic-ai/nomic-embed-text-v1") else name
        if name not in BACKBONES:
            raise ValueError(
                f"the backbone {name!r} is not among those whose shape is known here ({', '.join(BACKBONES)}); put its "
                f"own config.json under the key backbone_config"
            )
        backbone = BACKBONES[name]
    if backbone.get("model_type") == "bert" and config["embedder"] != "bert-base-uncased":
        if config["architecture"] != "biencoder":  # the reference embeds the tokens of such a second stage twice
            raise ValueError("a contextual model on transformers' own BERT is not supported, a biencoder is")
        return bert_encoder(backbone, layers)
    return nomic_encoder(backbone, numerics, layers)
