"""`config.json` ↔ our configs: our exports, the reference's keys, NomicBERT's (its own and transformers'), BERT's."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cde_jax.interop.reference_model import (
    Config,
    ModelConfig,
    Numerics,
    ReferenceBiencoderConfig,
    ReferenceContextualConfig,
    ReferenceEncoderConfig,
    simplified,
)
from cde_jax.models.contextual import ContextualConfig
from cde_jax.models.encoder import EncoderConfig

NUMERICS = get_args(Numerics)
FORMAT = 2
RUNTIME = ("dtype", "remat", "attention")  # how a model is run, which an export does not keep
_INNER = dict.fromkeys(("encoder", "second_stage"), ReferenceEncoderConfig) | {"first_stage": ReferenceBiencoderConfig}
# Fields that format 1 wrote for every model, and the value at which a model is the same without.
_FORMAT_1 = {
    "statistics_size": 0, "residual_output": True, "text_token_types": 1, "slot_token_types": 0, "rotary_start": 0,
    "absolute_positions": False, "fixed_context": "no", "tie_token_embeddings": False, "pool_slots": False,
    "pool_after_token": None, "rotary_axis": "sequence", "positions_skip_padding": False, "zero_padding": False,
}  # fmt: skip

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
_NOMIC_SUPPORTED = {
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
        expected, (low, high) = f"a value of {hints[name]}", _SIZES.get(name, (1, 10_000_000))
        fits = _has_type(value, hints[name])
        if name in _POSITIVE:
            expected, fits = "a positive number", fits and value > 0
        elif type(value) is int and int in (hints[name], *get_args(hints[name])):
            expected, fits = f"{low} to {high}", low <= value <= high
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    return simplified(kind(**{name: float(x) if hints[name] is float else x for name, x in fields.items()}))


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_has_type(value, argument) for argument in arguments)
    if origin is tuple and arguments[-1] is ...:
        return isinstance(value, tuple) and all(_has_type(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_has_type, value, arguments))
    if hint is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is int if hint is int else isinstance(value, hint)


def own_keys(model: ModelConfig, settings: Any) -> dict[str, Any]:
    """The object "cde_jax" of a `config.json`: it alone says how the directory is loaded again."""
    return {
        "format": FORMAT,
        "numerics": numerics_of(model),
        "jax_only": jax_only(model),
        "model": to_dict(model),
        "text": dataclasses.asdict(settings),
    }


def to_dict(model: ModelConfig) -> dict[str, Any]:
    """Every field of a config as JSON, without the run-time choices."""
    return dataclasses.asdict(model, dict_factory=lambda fields: {k: v for k, v in fields if k not in RUNTIME})


def from_dict(fields: Mapping[str, Any], kind: type[Config] | None = None) -> Config:
    """The inverse of `to_dict` (`kind` None: a whole model); a field this version does not know is a ValueError."""
    if kind is None:
        contextual = ReferenceContextualConfig if "numerics" in fields else ContextualConfig
        kind = contextual if "second_stage" in fields else ReferenceBiencoderConfig
    known, values = {field.name for field in dataclasses.fields(kind)}, {}
    for name, value in fields.items():
        if name not in RUNTIME and _FORMAT_1.get(name, ...) != value:
            value = from_dict(value, _INNER[name]) if name in _INNER else value
            values[name] = tuple(value) if isinstance(value, list) else value
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}; it was written by another version of cde_jax: use that")
    return build_config(kind, values)


def numerics_of(model: ModelConfig) -> str:
    """Which program's numbers a config gives: one of `NUMERICS`, or "cde_jax" for our own."""
    return getattr(model if isinstance(model, ContextualConfig) else model.encoder, "numerics", None) or "cde_jax"


def jax_only(model: ModelConfig) -> list[str]:
    """Settings that the PyTorch module and the ONNX graph do not know."""
    first = getattr(model, "first_stage", model)
    parts = (model, first, first.encoder, model.encoder)
    known = {"prenorm": False, "tokens_per_document": 1, "pool_slots": False, "pool_after_token": None}
    unknown = [name for name, value in known.items() if any(getattr(x, name, value) != value for x in parts)]
    return unknown + ["soft_prompt"] * (getattr(model, "soft_prompt", None) == 0)


def is_reference(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` has the reference's keys at its top level."""
    return config.get("architecture") in ("transductive", "biencoder") and "embedder" in config


def reference_keys(model: ModelConfig) -> dict[str, Any]:
    """The top level of `config.json` by the reference's keys, for readers of those."""
    contextual, first = isinstance(model, ContextualConfig), getattr(model, "first_stage", model)
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


def reference_config(config: Mapping[str, Any], numerics: str, *, null: bool, colon: Callable[[], int]) -> ModelConfig:
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
    keys, layers = config.get("backbone_config"), config.get(limit)
    if keys is None:
        name = config.get("dataset_backbone") or config["embedder"]
        name = "nomic-ai/nomic-embed-text-v1" if name.startswith("nomic-ai/nomic-embed-text-v1") else name
        if name not in BACKBONES:
            message = f"the backbone {name!r} is not among those whose shape is known here ({', '.join(BACKBONES)})"
            raise ValueError(f"{message}; put its own config.json under the key backbone_config")
        keys = BACKBONES[name]
    if keys.get("model_type") == "bert" and config["embedder"] == "bert-base-uncased":
        encoder = _nomic_encoder(keys, numerics)
    elif keys.get("model_type") == "bert" and config["architecture"] != "biencoder":  # it embeds the tokens twice
        raise ValueError("a contextual model on transformers' own BERT is not supported, a biencoder is")
    else:
        encoder = encoder_config(keys, numerics)
    return build_config(type(encoder), vars(encoder) | {"layers": min(encoder.layers, layers)}) if layers else encoder


def encoder_config(keys: Mapping[str, Any], numerics: str | None) -> EncoderConfig:
    """An encoder by the keys of transformers' bert and nomic_bert, or (any other type) of NomicBERT's own config."""
    if keys.get("model_type") == "bert":
        _check_supported(keys, {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False})
        fields = {field: keys[key] for key, field in TRANSFORMERS.items()}
        fields |= {"activation": "gelu", "positions": "learned", "attention_bias": True, "mlp_bias": (True, True)}
        return build_config(EncoderConfig, fields)
    if keys.get("model_type") != "nomic_bert" or "n_embd" in keys:
        return _nomic_encoder(keys, numerics)
    rope = keys.get("rope_parameters") or {}
    _check_supported({**keys, **rope}, {"rope_type": "default", "hidden_act": "silu"})
    optional = ("max_positions", "token_types", "norm_epsilon")  # with our defaults
    fields = {field: keys[key] for key, field in TRANSFORMERS.items() if key in keys or field not in optional}
    fields["rotary_base"] = rope.get("rope_theta", keys.get("rope_theta", 1000.0))
    return build_config(ReferenceEncoderConfig, fields | _numerics(numerics))


def _nomic_encoder(keys: Mapping[str, Any], numerics: str | None) -> EncoderConfig:
    _check_supported(keys, _NOMIC_SUPPORTED)
    base = {"rotary_emb_base": 1000 if numerics in ("training", None) else 10000}
    keys = _NOMIC_DEFAULTS | base | {key: keys[alias] for alias, key in _NOMIC_ALIASES.items() if alias in keys} | keys
    gated, width = not keys["activation_function"].startswith("gelu"), keys["n_embd"]
    inner = keys["n_inner"] or (int(8 * width / 3) if gated else 4 * width)
    fraction = keys["rotary_emb_fraction"]
    fields = {field: keys[key] for key, field in NOMIC.items()} | {
        "vocab_size": _round_up(keys["vocab_size"], keys["pad_vocab_size_multiple"]),
        "mlp_width": _round_up(inner, 256) if gated else inner,
        "activation": keys["activation_function"] if gated else "gelu",  # the reference's are all exact erf GELUs
        "positions": "rotary" if fraction > 0 else "learned",
        "rotary_fraction": fraction if fraction > 0 else 1.0,
        "mlp_bias": (keys["mlp_fc1_bias"], keys["mlp_fc2_bias"]),
    }
    return build_config(ReferenceEncoderConfig, fields | _numerics(numerics))


def _numerics(numerics: str | None) -> dict[str, str | None]:
    return {"numerics": None if numerics == "shipped-sequence" else numerics}  # it runs encoders as transformers does


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
