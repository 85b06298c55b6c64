"""What sentence-transformers keeps beside an encoder: modules, pooling, a head, prompts and lengths."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cde_jax.data.files import read_json
from cde_jax.interop.architectures import is_reference
from cde_jax.interop.tensors import Tensor, path_inside, read_object, tensors
from cde_jax.models.contextual import BiencoderConfig, ContextualConfig

MAX_LENGTH = 1_000_000  # tokens; no text setting is larger


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How texts become tokens; lengths count [CLS] and [SEP]."""

    query_prefix: str = ""
    document_prefix: str = ""
    query_length: int = 512
    document_length: int = 512

    def __post_init__(self):
        for field, value in dataclasses.asdict(self).items():
            if field.endswith("length") and not (type(value) is int and 1 <= value <= MAX_LENGTH):
                raise ValueError(f"{field}: expected 1 to {MAX_LENGTH} tokens, got {value!r:.80}")
            if field.endswith("prefix") and not isinstance(value, str):
                raise ValueError(f"{field}: expected a text, got {value!r:.80}")


def transformer_folder(directory: Path) -> Path:
    """Where the encoder's config and weights are: the directory itself, or its Transformer module's folder."""
    folders = [folder for kind, folder in _modules(directory) if kind == "Transformer"]
    return folders[0] if folders else directory


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Class name and folder of each of sentence-transformers' modules."""
    path = directory / "modules.json"
    if not path.is_file():
        return []
    modules = read_json(path)
    if not (isinstance(modules, list) and all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules)):
        raise ValueError(f"{path}: expected a list of objects with type and path")
    return [(str(m["type"]).rsplit(".", 1)[-1], path_inside(directory, m["path"], path)) for m in modules]


def with_modules(model: BiencoderConfig, directory: Path, weights: Mapping[str, Tensor]) -> BiencoderConfig:
    """Pooling and head of a sentence-transformers directory; mean pooling where there is no modules.json."""
    supported, modules = ("Transformer", "Pooling", "Dense", "Normalize"), _modules(directory)
    if unknown := sorted({kind for kind, _ in modules} - set(supported)):
        raise ValueError(
            f"{directory}/modules.json: unknown modules {', '.join(unknown)}; supported are {', '.join(supported)}"
        )
    for kind, folder in modules:
        if kind == "Pooling":
            model = dataclasses.replace(model, pooling=_pooling(folder / "config.json"))
    if "mlp.2.weight" in weights:
        model = dataclasses.replace(model, head=True, output_width=weights["mlp.2.weight"].shape[0])
    return model


def _pooling(path: Path) -> str:
    config = read_object(path)
    legacy = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    modes = config.get("pooling_mode") or [
        legacy.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on is True
    ]
    modes = modes if isinstance(modes, list) else [modes]
    if modes not in (["mean"], ["cls"]):
        raise ValueError(f"{path}: expected mean or cls pooling, got {', '.join(map(str, modes))}")
    return modes[0]


def head(directory: Path) -> dict[str, Tensor]:
    """The tensors of Linear, GELU, Linear that follow the pooling of a sentence-transformers directory."""
    folders = [folder for kind, folder in _modules(directory) if kind == "Dense"]
    activations = [
        str(read_object(folder / "config.json").get("activation_function")).rsplit(".", 1)[-1] for folder in folders
    ]
    if activations not in ([], ["GELU", "Identity"]):
        raise ValueError(
            f"{directory}/modules.json: expected no Dense modules, or one with GELU and one without activation, got "
            f"{', '.join(activations)}"
        )
    return {
        f"mlp.{2 * i}.{name.removeprefix('linear.')}": tensor
        for i, folder in enumerate(folders)
        for name, tensor in tensors(folder).items()
    }


def text_settings(
    directory: Path, config: Mapping[str, Any], model: BiencoderConfig | ContextualConfig
) -> TextSettings:
    """Prefixes and lengths of a directory: our exports have their own, others have prompts and one length."""
    if "text" in config.get("cde_jax", {}):
        return TextSettings(**config["cde_jax"]["text"])
    path = directory / "config_sentence_transformers.json"
    prompts = (read_object(path).get("prompts") or {}) if path.is_file() else {}
    length = config.get("max_seq_length") or min(512, model.encoder.max_positions)
    if (directory / "sentence_bert_config.json").is_file():
        length = read_object(directory / "sentence_bert_config.json").get("max_seq_length") or length
    reference = is_reference(config) and not prompts
    query, document = ("search_query: ", "search_document: ") if reference else ("", "")
    return TextSettings(
        query_prefix=prompts.get("query", config.get("query_prompt", query)),
        document_prefix=prompts.get("document", config.get("document_prompt", document)),
        query_length=length,
        document_length=length,
    )
