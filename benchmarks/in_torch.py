"""The models of `shapes` in PyTorch: the exported module with the same weights, and the authors' code."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from shapes import Shape, Texts, build, config_of, random_batch
from torch.utils.checkpoint import checkpoint

from cde_jax.interop import torch_module
from cde_jax.interop.architectures import to_dict
from cde_jax.interop.weight_mapping import biencoder_mapping, contextual_mapping, to_torch
from cde_jax.interop.write import keys_values, parameters

DEVICE = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
# Fields of the authors' config that the shape does not give.
BACKBONE = {
    "n_positions": 2048, "max_trained_positions": 2048, "activation_function": "swiglu", "rotary_emb_fraction": 1.0,
    "rotary_emb_base": 1000, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "causal": False,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "type_vocab_size": 2, "prenorm": False,
    "pad_vocab_size_multiple": 1,
}  # fmt: skip


def exported(kind: str, shape: Shape) -> torch.nn.Module:
    """The exported module in float32, with the weights of `shapes.build`."""
    config = config_of(kind, shape, "float32")
    rules = biencoder_mapping(config.encoder, prefix="embedder.") if kind == "biencoder" else contextual_mapping(config)
    tensors = to_torch(rules, parameters(build(config)))
    module = torch_module.CdeModel(torch_module.CdeConfig(cde_jax={"model": to_dict(config), "jax_only": []}))
    module.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()})
    return module.to(DEVICE)


def exported_with_context(shape: Shape, context: Float[np.ndarray, "J D"]) -> torch.nn.Module:
    """The isolated module as `interop.write.export_corpus` writes it, with a fixed context and other random weights."""
    model = build(config_of("isolated", shape, "float32"))
    prefix = model.prepare_context(context).prefix
    config = {"model": to_dict(model.config), "jax_only": [], "corpus_slots": prefix.keys.shape[-1]}
    module = torch_module.CdeModel(torch_module.CdeConfig(cde_jax=config))
    module.second_stage_model.context.data = torch.from_numpy(keys_values(prefix))
    return module.to(DEVICE)


def reference(kind: str, shape: Shape, directory: str | Path) -> torch.nn.Module:
    """The authors' released model (cde/hf_model.py of a checkout of jxmorris12/cde), with random weights.

    It was written for transformers 4: put an older one first on PYTHONPATH (4.48.3 works), with einops.
    """
    file = Path(directory) / "cde" / "hf_model.py"
    if not file.is_file():
        raise SystemExit(f"--reference {directory}: expected a checkout of the authors' code, with cde/hf_model.py")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = _reference_model(file, kind, shape).to(DEVICE)
            text, context = (tensors((np.ones((n, 4), np.int32), np.ones((n, 4), bool))) for n in (1, shape.context))
            module(*text) if kind == "biencoder" else module(*text, *context)
    except Exception as error:  # whatever an import, or a library that has changed since, may raise
        raise SystemExit(
            f"--reference {directory}: the authors' code does not run with transformers {version('transformers')} and "
            f"torch {torch.__version__} ({type(error).__name__}: {error}); transformers 4.48.3 with einops runs it"
        ) from error
    return module


def _reference_model(file: Path, kind: str, shape: Shape) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("reference_hf_model", file)
    authors = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    backbone = authors.ContextualNomicBertConfig(
        vocab_size=shape.vocabulary, n_embd=shape.width, n_head=shape.heads, n_layer=shape.layers,
        n_inner=shape.mlp_width, **BACKBONE,
    )  # fmt: skip
    authors.load_embedder_and_tokenizer = lambda name: (authors.ContextualNomicBertModel(backbone), None)
    config = authors.ContextualModelConfig(
        embedder="nomic", embedding_output_dim=None, limit_layers=None, logit_scale=50.0, disable_dropout=True,
        pooling_strategy="mean", transductive_corpus_size=shape.context, transductive_tokens_per_document=1,
        transductive_sequence_dropout_prob=0.005, disable_transductive_rotary_embedding=True,
        max_seq_length=max(shape.query_length, shape.document_length),
    )  # fmt: skip
    return authors.BiEncoder(config) if kind == "biencoder" else authors.ContextualDocumentEmbeddingTransformer(config)


def tensors(texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask on the device, int64."""
    ids, mask = texts
    return torch.from_numpy(ids.astype(np.int64)).to(DEVICE), torch.from_numpy(mask.astype(np.int64)).to(DEVICE)


def peak_bytes() -> int:
    """Peak memory of the GPU's allocator, or of the process."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else harness.peak_bytes()


def compile_stages(module: torch.nn.Module) -> torch.nn.Module:
    """`torch.compile` of each stage: the stages are called one by one."""
    if not hasattr(module, "second_stage_model"):
        return torch.compile(module, dynamic=False)
    for name in ("first_stage_model", "second_stage_model"):
        if hasattr(module, name):
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    return module


def training_step(
    module: torch.nn.Module, shape: Shape, kind: str, dtype: str, chunk: int, compiled: bool = False
) -> Callable[[], float]:
    """A step of AdamW on InfoNCE over one random plan batch, as `training.step` does it; returns the loss.

    `chunk` texts at a time, recomputed in the backward pass; 0: all at once.
    """
    module = compile_stages(module.train()) if compiled else module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.01)
    texts = {name: tensors(pair) for name, pair in random_batch(shape).items()}

    def in_chunks(function, ids, mask):
        if not chunk:
            return function(ids, mask)
        parts = zip(ids.split(chunk), mask.split(chunk), strict=True)
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])

    def run() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            encode = module
            if kind != "biencoder":
                context = in_chunks(module.first_stage_model, *texts["context"])
                encode = partial(module.second_stage_model, dataset_embeddings=context)
            queries, documents = (in_chunks(encode, *texts[name]) for name in ("query", "document"))
        scores = F.normalize(queries.float(), dim=1) @ F.normalize(documents.float(), dim=1).T
        loss = F.cross_entropy(scores / 0.02, torch.arange(len(scores), device=DEVICE))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


def encoder(
    module: torch.nn.Module, texts: Texts, context: Float[np.ndarray, "J D"] | None, dtype: str, compiled: bool
) -> Callable[[], Any]:
    """A call that encodes the texts to unit vectors; `context`: vectors of the first stage, or None."""
    given = {} if context is None else {"dataset_embeddings": torch.from_numpy(context).to(DEVICE)}
    module = compile_stages(module.eval()) if compiled else module.eval()
    stage, (ids, mask) = getattr(module, "second_stage_model", module), tensors(texts)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            vectors = F.normalize(stage(ids, mask, **given).float(), dim=1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return vectors

    return run
