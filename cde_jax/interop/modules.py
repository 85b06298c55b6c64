"""The files of a model directory beside its config.json: tensors, sentence-transformers' modules, prompts and lengths.

Directories are untrusted: a file that they name outside of themselves is not read.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - so that NumPy knows bfloat16
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from cde_jax.data.files import read_json
from cde_jax.interop.architectures import is_reference
from cde_jax.interop.reference_model import ModelConfig
from cde_jax.models.contextual import BiencoderConfig

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
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


class Tensor(NamedTuple):
    """Where one tensor is stored."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def load(self) -> Shaped[np.ndarray, "..."]:
        """The tensor in its stored dtype. The file is mapped for this tensor only, so mapped pages do not add up."""
        with safe_open(self.path, framework="numpy") as file:
            return file.get_tensor(self.name)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name: `model.safetensors`, or the shards that its index names.

    A directory that has only a pickle is refused, with the way to convert it.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return _tensors_of(directory / "model.safetensors")
    if not index.is_file():
        refuse_pickles(directory)
        files = ", ".join(sorted(os.listdir(directory))) if directory.is_dir() else ""
        raise ValueError(f"{directory}: expected model.safetensors, got {files or 'nothing'}")
    weight_map = read_json(index, keys=["weight_map"])["weight_map"]
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected an object weight_map (tensor → file), got {type(weight_map).__name__}")
    weight_map = {name: path_inside(directory, file, index) for name, file in weight_map.items()}
    shards = {path: _tensors_of(path) for path in sorted(set(weight_map.values()))}
    if missing := [f"{name} in {path}" for name, path in weight_map.items() if name not in shards[path]]:
        raise ValueError(f"{index}: {len(missing)} tensors are not in the files it names, first {missing[0]}")
    return {name: shards[path][name] for name, path in weight_map.items()}


def _tensors_of(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, there is none")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: Tensor(path, name, tuple(x.get_shape())) for name, x in slices.items()}
            unknown = sorted({x.get_dtype() for x in slices.values()} - set(DTYPES))
    except (SafetensorError, OSError) as error:
        advice = "truncated or altered; copy or download it again"
        raise ValueError(f"{path}: not readable as safetensors ({error}): {advice}") from None
    if unknown:
        known = f"cde_jax reads {', '.join(DTYPES)}: save the weights as float32 or bfloat16"
        raise ValueError(f"{path}: tensors of type {', '.join(unknown)}; {known}")
    return found


def refuse_pickles(path: Path) -> None:
    """A ValueError for a pickle, or a directory with one: loading it would run whatever code it holds."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    pickles = [file for file in files if file.suffix in PICKLES and file.name != "training_args.bin"]
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded, and cde_jax reads safetensors only; "
            f"convert it once, where you trust it: `weights = torch.load('{pickles[0].name}', weights_only=True); "
            f"safetensors.torch.save_file({{k: v.clone().contiguous() for k, v in weights.items()}}, "
            f"'model.safetensors')`"
        )


def path_inside(directory: Path, name: Any, source: Path) -> Path:
    """`directory / name`; a ValueError if `source` names a path outside the directory, also by a symbolic link.

    The files of a snapshot in the hub's cache are links into its folder `blobs`.
    """
    roots = [directory.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{source}: expected the name of a file or folder, got {name!r}")
    path = (directory / name).resolve()
    named_outside = Path(name).is_absolute() or ".." in Path(name).parts
    if named_outside or not any(path.is_relative_to(root) for root in roots):
        raise ValueError(f"{source}: names {name!r}, which is outside the directory {directory}; it was not read")
    return directory / name


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Class name and folder of each of sentence-transformers' modules; none without modules.json."""
    path = directory / "modules.json"
    modules = read_json(path) if path.is_file() else []
    if not (isinstance(modules, list) and all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules)):
        raise ValueError(f"{path}: expected a list of objects with type and path")
    return [(str(m["type"]).rsplit(".", 1)[-1], path_inside(directory, m["path"], path)) for m in modules]


def transformer_folder(directory: Path) -> Path:
    """Where the encoder's config and weights are: the directory itself, or its Transformer module's folder."""
    return next((folder for kind, folder in _modules(directory) if kind == "Transformer"), directory)


def head(directory: Path) -> dict[str, Tensor]:
    """The tensors of Linear, GELU, Linear that follow the pooling of a sentence-transformers directory."""
    folders = [folder for kind, folder in _modules(directory) if kind == "Dense"]
    configs = [read_json(folder / "config.json", dict) for folder in folders]
    activations = [str(config.get("activation_function")).rsplit(".", 1)[-1] for config in configs]
    if activations not in ([], ["GELU", "Identity"]):
        expected = "expected no Dense modules, or one with GELU and one without activation"
        raise ValueError(f"{directory}/modules.json: {expected}, got {', '.join(activations)}")
    return {
        f"mlp.{2 * i}.{name.removeprefix('linear.')}": tensor
        for i, folder in enumerate(folders)
        for name, tensor in tensors(folder).items()
    }


def with_modules(model: BiencoderConfig, directory: Path, weights: Mapping[str, Tensor]) -> BiencoderConfig:
    """Pooling and head of a sentence-transformers directory; mean pooling where there is no modules.json."""
    supported, modules = ("Transformer", "Pooling", "Dense", "Normalize"), _modules(directory)
    if unknown := sorted({kind for kind, _ in modules} - set(supported)):
        message = f"{directory}/modules.json: unknown modules {', '.join(unknown)}"
        raise ValueError(f"{message}; supported are {', '.join(supported)}")
    for path in (folder / "config.json" for kind, folder in modules if kind == "Pooling"):
        config = read_json(path, dict)
        legacy = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        on = [legacy.get(key, key) for key, x in config.items() if key.startswith("pooling_mode_") and x is True]
        modes = config.get("pooling_mode") or on
        modes = modes if isinstance(modes, list) else [modes]
        if modes not in (["mean"], ["cls"]):
            raise ValueError(f"{path}: expected mean or cls pooling, got {', '.join(map(str, modes))}")
        model = dataclasses.replace(model, pooling=modes[0])
    if "mlp.2.weight" in weights:
        model = dataclasses.replace(model, head=True, output_width=weights["mlp.2.weight"].shape[0])
    return model


def text_settings(directory: Path, config: Mapping[str, Any], model: ModelConfig) -> TextSettings:
    """Prefixes and lengths of a directory: our exports have their own, others have prompts and one length."""
    if "text" in config.get("cde_jax", {}):
        return TextSettings(**config["cde_jax"]["text"])
    path, lengths = directory / "config_sentence_transformers.json", directory / "sentence_bert_config.json"
    prompts = (read_json(path, dict).get("prompts") or {}) if path.is_file() else {}
    length = read_json(lengths, dict).get("max_seq_length") if lengths.is_file() else None
    length = length or config.get("max_seq_length") or min(512, model.encoder.max_positions)
    reference = is_reference(config) and not prompts
    query, document = ("search_query: ", "search_document: ") if reference else ("", "")
    return TextSettings(
        query_prefix=prompts.get("query", config.get("query_prompt", query)),
        document_prefix=prompts.get("document", config.get("document_prompt", document)),
        query_length=length,
        document_length=length,
    )
