"""A contextual encoder with the context of one corpus baked in: a plain one-input model, for PyTorch and ONNX.

A server that knows nothing of context can run it: token ids and a mask go in, a unit vector comes out. Isolated
models keep the slots' keys and values, joint ones the slots themselves; the first stage stays at home.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cde_jax.data.files import NewFolder, write_json
from cde_jax.interop import ours
from cde_jax.interop.onnx import check_can_write, write_onnx
from cde_jax.interop.read import TextSettings
from cde_jax.interop.rules import contextual_rules, to_torch
from cde_jax.interop.write import (
    MODULE,
    copy_tokenizer,
    parameters,
    reference_directory,
    save_tensors,
    write_card,
    write_sentence_transformers,
)
from cde_jax.models.contextual import ContextCache, ContextualEncoder

_LEFT_OUT = ("first_stage_model.", "second_stage_model.prompt_projection.", "second_stage_model.sequence_dropout")


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
    (`input_ids`, `attention_mask` → `sentence_embedding`) give the unit vectors of `model.embed(…, context)`.

    Raises:
      ValueError: the model has settings that run in JAX only; `onnx` without PyTorch's exporter.
    """
    if onnx:
        check_can_write()
    config = model.config
    if odd := ours.jax_only(config):
        raise ValueError(f"these settings run in JAX only and cannot be exported with a context: {', '.join(odd)}")
    cache = context
    if not isinstance(context, ContextCache):
        cache = model.prepare_context(None if context is None else jnp.asarray(context, jnp.float32))
    rules = contextual_rules(config)
    tensors = {k: v for k, v in to_torch(rules, parameters(model)).items() if not k.startswith(_LEFT_OUT)}
    if cache.prefix is None:
        baked = np.asarray(cache.slots, np.float32)
    else:  # [layers, 2, H, P, d]
        baked = np.stack([np.asarray(x, np.float32).transpose(0, 2, 1, 3) for x in cache.prefix], axis=1)
    tensors["second_stage_model.context"] = np.ascontiguousarray(baked)
    with NewFolder(directory, marker="config.json") as new:
        copy_tokenizer(Path(tokenizer), new.path, config.second_stage.vocab_size)
        reference_directory(new.path, config, settings, baked=cache.slots.shape[-2])
        save_tensors(new.path / "model.safetensors", tensors)
        module = {"path": "", "type": f"{MODULE.removesuffix('.py')}.Transformer"}
        normalize = {"path": "1_Normalize", "type": "sentence_transformers.models.Normalize"}
        (new.path / "1_Normalize").mkdir()
        modules = [{"idx": i, "name": str(i), **entry} for i, entry in enumerate((module, normalize))]
        write_json(new.path / "modules.json", modules)
        write_sentence_transformers(new.path, settings)
        if onnx:
            write_onnx(new.path)
        write_card(new.path, config, card)
        new.put_in_place()
