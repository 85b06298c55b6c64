"""What sentence-transformers keeps beside an encoder: modules, pooling, a head, prompts and lengths."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cde_jax.data.files import read_json
from cde_jax.interop import families
from cde_jax.interop.tensors import Tensor, tensors
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How texts become tokens; lengths count [CLS] and [SEP]."""

    query_prefix: str = ""
    document_prefix: str = ""
    query_length: int = 512
    document_length: int = 512


def transformer_folder(directory: Path) -> Path:
    """Where the encoder's config and weights are: the directory itself, or its Transformer module's folder."""
    for module in _modules(directory):
        if module["type"].endswith(".Transformer"):
            return directory / module["path"]
    return directory


def _modules(directory: Path) -> list[dict[str, Any]]:
    return read_json(directory / "modules.json") if (directory / "modules.json").is_file() else []


def with_modules(model: BiencoderConfig, directory: Path, weights: Mapping[str, Tensor]) -> BiencoderConfig:
    """Pooling and head of a sentence-transformers directory; mean pooling where there is no modules.json."""
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = _modules(directory)
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if odd := sorted(set(kinds) - set(known)):
        raise ValueError(f"{directory}/modules.json: unknown modules {', '.join(odd)}; known are {', '.join(known)}")
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Pooling":
            model = dataclasses.replace(model, pooling=_pooling(directory / module["path"] / "config.json"))
    if "mlp.2.weight" in weights:
        model = dataclasses.replace(model, head=True, output_width=weights["mlp.2.weight"].shape[0])
    return model


def _pooling(path: Path) -> str:
    config = read_json(path)
    legacy = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    modes = config.get("pooling_mode") or [
        legacy.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on is True
    ]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in ("mean", "cls"):
        raise ValueError(f"{path}: expected mean or cls pooling, got {', '.join(modes)}; others are not supported")
    return modes[0]


def head(directory: Path) -> dict[str, Tensor]:
    """The tensors of Linear, GELU, Linear that follow the pooling of a sentence-transformers directory."""
    dense = [directory / m["path"] for m in _modules(directory) if m["type"].endswith(".Dense")]
    activations = [read_json(path / "config.json")["activation_function"].rsplit(".", 1)[-1] for path in dense]
    if activations not in ([], ["GELU", "Identity"]):
        raise ValueError(
            f"{directory}/modules.json: expected no Dense modules, or one with GELU and one without activation, got "
            f"{', '.join(activations)}"
        )
    return {
        f"mlp.{2 * i}.{name.removeprefix('linear.')}": tensor
        for i, path in enumerate(dense)
        for name, tensor in tensors(path).items()
    }


def text_settings(
    directory: Path, config: Mapping[str, Any], model: BiencoderConfig | ContextualConfig
) -> TextSettings:
    """Prefixes and lengths of a directory: ours say their own, others have prompts and one length."""
    if "text" in config.get("cde_jax", {}):
        return TextSettings(**config["cde_jax"]["text"])
    path = directory / "config_sentence_transformers.json"
    prompts = read_json(path).get("prompts", {}) if path.is_file() else {}
    reference = families.is_reference(config) and not prompts
    encoder = model.second_stage if isinstance(model, ContextualConfig) else model.encoder
    length = config.get("max_seq_length") or min(512, encoder.max_positions)
    if (directory / "sentence_bert_config.json").is_file():
        length = read_json(directory / "sentence_bert_config.json").get("max_seq_length") or length
    query, document = ("search_query: ", "search_document: ") if reference else ("", "")
    return TextSettings(
        query_prefix=prompts.get("query", config.get("query_prompt", query)),
        document_prefix=prompts.get("document", config.get("document_prompt", document)),
        query_length=length,
        document_length=length,
    )
