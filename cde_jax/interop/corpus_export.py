"""A contextual encoder with the context of one corpus as constants: a plain one-input model, for PyTorch and ONNX.

A server that knows nothing of context can run it: token ids and a mask go in, a unit vector comes out. Isolated
models keep the slots' keys and values, joint ones the slots themselves; the first stage is left out.
"""

import warnings
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float

from cde_jax.data.files import NewFolder
from cde_jax.interop.export_config import jax_only
from cde_jax.interop.modules import TextSettings
from cde_jax.interop.weight_mapping import contextual_mapping, to_torch
from cde_jax.interop.write import MODULE, parameters, write_modules, write_texts, write_with_module
from cde_jax.models.contextual import ContextCache, ContextualEncoder

_LEFT_OUT = ("first_stage_model.", "second_stage_model.prompt_projection.", "second_stage_model.sequence_dropout")
_ONE_FILE = 1_800_000_000  # bytes of weights in an ONNX graph; protobuf ends at 2 GB, above it they lie beside it


def export_corpus(
    model: ContextualEncoder,
    context: Float[Array, "J D"] | Float[np.ndarray, "J D"] | ContextCache | None,
    directory: str | Path,
    *,
    tokenizer: str | Path,
    settings: TextSettings,
    card: str | None = None,
    onnx: bool = True,
) -> None:
    """Write `model` with `context` as a directory of a model without a context input.

    `context` is the first stage's vectors, or what `model.prepare_context` makes of them; None means null slots.

    `SentenceTransformer(directory, trust_remote_code=True).encode(texts, prompt_name=…)` and `onnx/model.onnx`
    (`input_ids`, `attention_mask`, int64 [B, L] → `sentence_embedding`, float32 [B, D]) give the unit vectors of
    `model.embed(…, context)`.

    Raises:
      ValueError: the model has settings that run in JAX only; `onnx` without PyTorch's exporter.
    """
    missing = [name for name in ("torch", "onnx", "onnxscript") if onnx and find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: install cde_jax[torch], or export without it (onnx=False)")
    config = model.config
    if unsupported := jax_only(config):
        raise ValueError(f"settings that run in JAX only cannot be exported with a context: {', '.join(unsupported)}")
    cache = context if isinstance(context, ContextCache) else model.prepare_context(context)
    tensors = to_torch(contextual_mapping(config), parameters(model))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LEFT_OUT)}
    if cache.prefix is None:
        constant = np.asarray(cache.slots, np.float32)  # [P, D]
    else:
        constant = np.stack([np.asarray(x, np.float32).transpose(0, 2, 1, 3) for x in cache.prefix], axis=1)
    tensors["second_stage_model.context"] = np.ascontiguousarray(constant)  # isolated: [layers, 2, H, P, d]
    with NewFolder(directory, marker="config.json") as new:
        write_texts(new.path, config, settings, Path(tokenizer), card)
        write_with_module(new.path, config, settings, tensors, corpus_slots=cache.slots.shape[-2])
        write_modules(new.path, [f"{MODULE.removesuffix('.py')}.Transformer", "sentence_transformers.models.Normalize"])
        if onnx:
            _write_onnx(new.path)
        new.put_in_place()


def _write_onnx(directory: Path) -> None:
    """Write `onnx/model.onnx` of the model in `directory`, by PyTorch's own exporter."""
    import torch

    spec = spec_from_file_location("modeling_cde_jax", directory / MODULE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    class UnitVectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = module.CdeModel.from_pretrained(directory).eval()

        def forward(self, input_ids, attention_mask):
            return torch.nn.functional.normalize(self.model(input_ids, attention_mask), dim=-1)

    (directory / "onnx").mkdir()
    names, dynamic = ("input_ids", "attention_mask"), {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        torch.onnx.export(
            UnitVectors(),
            tuple(torch.ones(2, 8, dtype=torch.long) for _ in names),
            directory / "onnx" / "model.onnx",
            input_names=names,
            output_names=["sentence_embedding"],
            dynamic_shapes=dict.fromkeys(names, dynamic),
            dynamo=True,
            external_data=(directory / "model.safetensors").stat().st_size > _ONE_FILE,
            verbose=False,
        )
