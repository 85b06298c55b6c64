"""What a `config.json` describes: our configs from those of the reference, NomicBERT and BERT."""

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
SUPPORTED = (
    "cde-small-v1's layout (architecture: transductive or biencoder)",
    "nomic_bert (nomic-ai's and transformers' own keys)",
    "bert",
    "exports of cde_jax",
)

_NOMIC = {
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_inner": 3072,
    "vocab_size": 30528,
    "n_positions": 2048,
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-12,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_base": 1000,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "type_vocab_size": 2,
    "pad_vocab_size_multiple": 64,
}
# For directories that name their backbone and leave its config out.
BACKBONES = {
    "nomic-ai/nomic-bert-2048": _NOMIC,
    "nomic-ai/nomic-embed-text-v1": {**_NOMIC, "n_positions": 8192},
    # The reference reads BERT's config with NomicBERT's class, which knows no layer_norm_eps: GPT-2's 1e-5 stays.
    "bert-base-uncased": {"n_positions": 512, "vocab_size": 30522, "layer_norm_epsilon": 1e-5},
}
# How NomicBERT's config class, a GPT-2 config, reads keys that are written the other way.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
_UNSUPPORTED = {
    "causal": False,
    "use_rms_norm": False,
    "parallel_block": False,
    "norm_mlp": False,
    "num_heads_kv": None,
    "rotary_emb_scale_base": None,
}

# Smallest and largest value of a size; sizes that are not listed: 1 to 10 million.
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
        wrong = not _has_type(value, hints[name])
        if wrong or (type(value) is int and not low <= value <= high) or (name in _POSITIVE and not value > 0):
            expected = f"{low} to {high}" if type(value) is int else f"a value of {hints[name]}"
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    return simplified(kind(**fields))


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


def reference_encoder(config: Mapping[str, Any], numerics: str | None, layers: int | None = None) -> EncoderConfig:
    """An encoder by NomicBERT's own keys (`n_embd`, …), with the defaults of the reference's config class."""

    def get(key: str, default: Any) -> Any:
        return config[key] if key in config else config.get(_ALIASES.get(key, key), default)

    odd = [key for key, expected in _UNSUPPORTED.items() if config.get(key, expected) not in (expected, None)]
    if odd:
        raise ValueError(
            f"backbone config: {', '.join(f'{key}={config[key]}' for key in odd)} is not supported; cde_jax runs "
            f"bidirectional NomicBERT with LayerNorm and plain multi-head attention"
        )
    width, activation = get("n_embd", 768), get("activation_function", "gelu_new")
    activation = "gelu" if activation.startswith("gelu") else activation  # the reference's are all exact erf GELUs
    if activation not in ("gelu", "swiglu", "geglu", "glu"):
        raise ValueError(f"backbone config: expected activation_function gelu…, swiglu, geglu or glu, got {activation}")
    gated = activation != "gelu"
    inner = get("n_inner", None) or (int(8 * width / 3) if gated else 4 * width)
    fraction = get("rotary_emb_fraction", 0.0)
    fields = {
        "vocab_size": _round_up(get("vocab_size", 50257), get("pad_vocab_size_multiple", 1)),
        "width": width,
        "layers": _limited(get("n_layer", 12), layers),
        "heads": get("n_head", 12),
        "mlp_width": _round_up(inner, 256) if gated else inner,
        "activation": activation,
        "positions": "rotary" if fraction > 0 else "learned",
        "max_positions": get("n_positions", 1024),
        "rotary_base": float(get("rotary_emb_base", 1000 if numerics in ("training", None) else 10000)),
        "rotary_fraction": float(fraction) if fraction > 0 else 1.0,
        "rotary_interleaved": get("rotary_emb_interleaved", False),
        "token_types": get("type_vocab_size", 2),
        "attention_bias": get("qkv_proj_bias", True),
        "mlp_bias": (get("mlp_fc1_bias", True), get("mlp_fc2_bias", True)),
        "norm_epsilon": float(get("layer_norm_epsilon", 1e-5)),
        "prenorm": get("prenorm", False),
    }
    return build_config(ReferenceEncoderConfig, fields | _encoder_numerics(numerics))


def native_encoder(config: Mapping[str, Any], numerics: str | None, layers: int | None = None) -> EncoderConfig:
    """An encoder by transformers' own nomic_bert keys."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"nomic_bert config: expected default rotary embeddings and silu, got {rope} and "
            f"{config.get('hidden_act')}; other kinds are not supported"
        )
    fields = {
        **_transformers_sizes(config, layers),
        "max_positions": config.get("max_position_embeddings", 2048),
        "rotary_base": float(rope.get("rope_theta", config.get("rope_theta", 1000.0))),
        "token_types": config.get("type_vocab_size", 2),
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
    }
    return build_config(ReferenceEncoderConfig, fields | _encoder_numerics(numerics))


def bert_encoder(config: Mapping[str, Any], layers: int | None = None) -> EncoderConfig:
    """An encoder by BERT's keys."""
    expected = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    odd = [f"{key}={config[key]}" for key, value in expected.items() if config.get(key, value) != value]
    if odd:
        raise ValueError(f"bert config: {', '.join(odd)} is not supported; cde_jax runs plain BERT with exact GELU")
    fields = {
        **_transformers_sizes(config, layers),
        "activation": "gelu",
        "positions": "learned",
        "max_positions": config["max_position_embeddings"],
        "token_types": config["type_vocab_size"],
        "attention_bias": True,
        "mlp_bias": (True, True),
        "norm_epsilon": config["layer_norm_eps"],
    }
    return build_config(EncoderConfig, fields)


def _transformers_sizes(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": _limited(config["num_hidden_layers"], layers),
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
    }


def _limited(layers: int, limit: int | None) -> int:
    return min(layers, limit) if limit else layers


def _encoder_numerics(numerics: str | None) -> dict[str, Any]:
    """ "shipped-sequence" changes nothing in an encoder."""
    return {"numerics": numerics} if numerics in ("shipped", "training") else {}


def plain_encoder(config: Mapping[str, Any], numerics: str | None) -> EncoderConfig:
    """The encoder of a plain Hugging Face `config.json`; the error for an unknown model type lists the known ones."""
    model_type = config.get("model_type")
    if model_type == "bert":
        return bert_encoder(config)
    if model_type == "nomic_bert":
        return (reference_encoder if "n_embd" in config else native_encoder)(config, numerics)
    raise ValueError(
        f"unknown model_type {model_type!r} (architecture {config.get('architecture')!r}); supported are "
        f"{'; '.join(SUPPORTED)}"
    )


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
    if config.get("autoregressive_backbone"):
        raise ValueError("autoregressive backbones are not supported; cde_jax runs bidirectional encoders")
    if config.get("pooling_strategy", "mean") != "mean":
        raise ValueError(f"expected pooling_strategy mean, got {config['pooling_strategy']}")
    contextual = config["architecture"] == "transductive"
    vectors = config.get("transductive_tokens_per_document", 1)
    first = {
        "encoder": _backbone(config, numerics, "limit_layers_first_stage" if contextual else "limit_layers"),
        "head": True,
        "output_width": None if contextual else config.get("embedding_output_dim"),
        "tokens_per_document": vectors,
    }
    first_stage = build_config(ReferenceBiencoderConfig, first)
    if not contextual:
        return first_stage
    training, documents = numerics == "training", config.get("transductive_corpus_size", 1)
    skip_instruction = training and config.get("pool_ignore_instruction_tokens", False)
    second = {
        "first_stage": first_stage,
        "second_stage": _backbone(config, numerics, "limit_layers"),
        "context_size": documents,
        "context_attention": "joint",
        "slot_bias": None,
        "null_embedding": null or config.get("transductive_sequence_dropout_prob", 0.0) > 0,
        "numerics": numerics,
        "rotary_start": documents * vectors if config.get("disable_transductive_rotary_embedding", True) else 0,
        "tie_token_embeddings": config.get("transductive_tie_token_embeddings", False),
        "pool_slots": training and not config.get("pool_ignore_contextual_tokens", True),
        "pool_after_token": colon() if skip_instruction else None,
    }
    return build_config(ReferenceContextualConfig, second)


def _backbone(config: Mapping[str, Any], numerics: str, limit: str) -> EncoderConfig:
    backbone, layers = config.get("backbone_config"), config.get(limit)
    if backbone is None:
        name = config.get("dataset_backbone") or config["embedder"]
        name = "nomic-ai/nomic-embed-text-v1" if name.startswith("nomic-ai/nomic-embed-text-v1") else name
        if name not in BACKBONES:
            raise ValueError(
                f"the backbone {name!r} is not among those whose shape is known here "
                f"({', '.join(BACKBONES)}); put its own config.json under the key backbone_config"
            )
        backbone = BACKBONES[name]
    elif backbone.get("model_type") == "nomic_bert" and "n_embd" not in backbone:
        return native_encoder(backbone, numerics, layers)
    elif backbone.get("model_type") == "bert" and config["embedder"] != "bert-base-uncased":
        if config["architecture"] != "biencoder":  # the reference embeds the tokens of such a second stage twice
            raise ValueError("a contextual model on transformers' own BERT is not supported, a biencoder is")
        return bert_encoder(backbone, layers)
    return reference_encoder(backbone, numerics, layers)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
