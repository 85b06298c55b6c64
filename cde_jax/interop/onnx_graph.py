"""The second stage with its context baked in as an ONNX graph, written node by node: no tracing, no torch.

Inputs `input_ids` and `attention_mask`, int64 [B, L]; output `sentence_embedding`, float32 unit vectors [B, D].
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cde_jax.models.contextual import ContextualConfig
from cde_jax.models.encoder import EncoderConfig

OPSET, IR = 17, 9  # LayerNormalization came with 17; onnxruntime has run these since 1.14
_LOWEST = float(np.finfo(np.float32).min)
_PROTOBUF = 1_900_000_000  # bytes that one protobuf file can hold; larger weights go to a file beside it
_BACKBONE = "second_stage_model.backbone."


class Graph:
    """Nodes and constants of a graph under construction; every value is known by its name."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, **attributes) -> str | list[str]:
        """Append a node; the names of its outputs."""
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: np.ndarray | list | float | int) -> str:
        """Store a constant: floats as float32, integers as int64."""
        array = np.asarray(array)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def linear(self, x: str, tensors: Mapping[str, np.ndarray], name: str) -> str:
        """x Wᵀ + b with torch's weight [out, in]."""
        y = self("MatMul", x, self.constant(tensors[f"{name}.weight"].T))
        return self("Add", y, self.constant(tensors[f"{name}.bias"])) if f"{name}.bias" in tensors else y

    def norm(self, x: str, tensors: Mapping[str, np.ndarray], name: str, epsilon: float) -> str:
        """LayerNorm over the last axis."""
        scale, bias = (self.constant(tensors[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def activation(self, x: str, kind: str) -> str:
        """silu, sigmoid or exact gelu."""
        if kind == "gelu":
            inner = self("Erf", self("Mul", x, self.constant(2.0**-0.5)))
            return self("Mul", self("Mul", x, self.constant(0.5)), self("Add", inner, self.constant(1.0)))
        gate = self("Sigmoid", x)
        return gate if kind == "sigmoid" else self("Mul", x, gate)


def write_onnx(path: Path, config: ContextualConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the graph of a baked-in model (`baked.export_corpus`) from its torch-named tensors."""
    g, encoder, context = Graph(), config.second_stage, tensors["second_stage_model.context"]
    isolated = context.ndim == 5
    slots = context.shape[3] if isolated else context.shape[0]
    mask = g("Cast", "attention_mask", to=TensorProto.FLOAT)  # [B, L]
    batch, length = (g("Slice", g("Shape", mask), *(g.constant([n]) for n in (i, i + 1))) for i in (0, 1))
    steps = g("Range", g.constant(0), g("Squeeze", length), g.constant(1))  # [L]
    x = _embed(g, config, tensors, steps)
    if not isolated:
        size = g("Concat", batch, g.constant([1, 1]), axis=0)
        x = g("Concat", g("Expand", g.constant(context[None]), size), x, axis=1)
    ones = g("Expand", g.constant(np.ones((1, slots))), g("Concat", batch, g.constant([1]), axis=0))
    seen = g("Concat", ones, mask, axis=1)  # [B, P + L]
    closed = g("Mul", g("Sub", g.constant(1.0), seen), g.constant(_LOWEST))
    closed = g("Unsqueeze", closed, g.constant([1, 2]))  # [B, 1, 1, P + L]
    angles = _angles(g, config, 0 if isolated else slots, steps) if encoder.positions == "rotary" else None
    x = g.norm(x, tensors, f"{_BACKBONE}emb_ln", encoder.norm_epsilon)
    for i in range(encoder.layers):
        logits = closed
        if config.slot_bias is not None:
            bias = tensors["second_stage_model.slot_bias"][i][:, None, None]
            logits = g("Add", closed, _slot_bias(g, bias, slots, length, rows=0 if isolated else slots))
        x = _layer(g, encoder, tensors, i, x, logits, angles, context[i] if isolated else None)
    if not isolated:
        x = g("Slice", x, g.constant([slots]), g.constant([np.iinfo(np.int64).max]), g.constant([1]))
    _finish(g, config, tensors, x, mask)
    graph = helper.make_graph(
        g.nodes,
        "cde_jax",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "L"]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["B", encoder.width])],
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    large = sum(x.nbytes for x in tensors.values()) > _PROTOBUF
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}_data" if large else None)


def _embed(g: Graph, config: ContextualConfig, tensors: Mapping[str, np.ndarray], steps: str) -> str:
    """Embeddings of the text, [B, L, D], before the norm."""
    prefix = f"{_BACKBONE}embeddings."
    x = g("Gather", g.constant(tensors[f"{prefix}word_embeddings.weight"]), "input_ids")
    if config.second_stage.token_types:
        row = tensors[f"{prefix}token_type_embeddings.weight"][0]
        x = g("Add", x, g.constant(config.text_token_types * row))
    if config.second_stage.positions == "learned":
        table = g.constant(tensors[f"{prefix}position_embeddings.weight"])
        x = g("Add", x, g("Gather", table, steps))
    return x


def _angles(g: Graph, config: ContextualConfig, slots: int, steps: str) -> tuple[str, str]:
    """Cosines and sines [1|H, S, r]; a position of 0 is not turned."""
    c = config.second_stage
    dim = int(c.head_dim * c.rotary_fraction)
    inverse = (1.0 / np.float32(c.rotary_base) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)
    turned = g("Add", g("Mul", steps, g.constant(0)), g.constant(1))  # 1 for each text token
    if slots:
        index = np.arange(slots)
        start = config.rotary_start if config.absolute_positions else slots
        turned = g("Concat", g.constant((index >= start).astype(int)), turned, axis=0)
        first = index if config.absolute_positions else np.zeros(slots, int)
        steps = g("Add", steps, g.constant(slots)) if config.absolute_positions else steps
        steps = g("Concat", g.constant(first), steps, axis=0)
    if c.rotary_axis == "heads":
        steps = g("Mul", turned, g.constant(np.arange(c.heads)[:, None]))  # [H, S]
    else:
        steps = g("Unsqueeze", g("Mul", steps, turned), g.constant([0]))  # [1, S]
    steps = g("Unsqueeze", g("Cast", steps, to=TensorProto.FLOAT), g.constant([-1]))
    angles = g("Mul", steps, g.constant(inverse))
    return g("Cos", angles), g("Sin", angles)


def _rotate(g: Graph, c: EncoderConfig, x: str, angles: tuple[str, str]) -> str:
    """Turn the first features of each head; x is [B, H, S, d]."""
    cos, sin = angles
    dim = int(c.head_dim * c.rotary_fraction)
    order = np.arange(dim).reshape(-1, 2).T.reshape(-1) if c.rotary_interleaved else np.arange(dim)
    half, parts = dim // 2, []
    for features in (order[:half], order[half:], np.arange(dim, c.head_dim)):
        parts.append(g("Gather", x, g.constant(features), axis=-1) if len(features) else None)
    a, b, rest = parts
    turned = (
        g("Sub", g("Mul", a, cos), g("Mul", b, sin)),
        g("Add", g("Mul", b, cos), g("Mul", a, sin)),
    )
    # Queries and keys are permuted alike, so their products need no way back from the order of halves.
    return g("Concat", *turned, *([rest] if rest else []), axis=-1)


def _slot_bias(g: Graph, bias: np.ndarray, slots: int, length: str, rows: int) -> str:
    """The bias [H, 1, 1] from text rows to slot columns: [H, 1, P + L], or [H, P + L, P + L] in one sequence."""
    heads = len(bias)
    rest = g("Expand", g.constant(np.zeros((1, 1, 1))), g("Concat", g.constant([heads, 1]), length, axis=0))
    row = g("Concat", g.constant(np.broadcast_to(bias, (heads, 1, slots))), rest, axis=2)
    if not rows:
        return row
    text = g("Expand", g.constant(np.ones((1, 1))), g("Concat", length, g.constant([1]), axis=0))
    return g("Mul", row, g("Concat", g.constant(np.zeros((rows, 1))), text, axis=0))


def _layer(
    g: Graph,
    c: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    index: int,
    x: str,
    logits: str,
    angles: tuple[str, str] | None,
    prefix: np.ndarray | None,
) -> str:
    """One post-norm layer; `prefix` [2, H, P, d] are keys and values of the context."""
    name = f"{_BACKBONE}encoder.layers.{index}."
    qkv = g("Reshape", g.linear(x, tensors, f"{name}attn.Wqkv"), g.constant([0, 0, 3, c.heads, c.head_dim]))
    q, k, v = g("Split", g("Transpose", qkv, perm=[2, 0, 3, 1, 4]), axis=0, outputs=3)
    q, k, v = (g("Squeeze", y, g.constant([0])) for y in (q, k, v))  # [B, H, S, d]
    if angles:
        q, k = _rotate(g, c, q, angles), _rotate(g, c, k, angles)
    if prefix is not None:
        size = g("Concat", g("Slice", g("Shape", k), g.constant([0]), g.constant([1])), g.constant([1, 1, 1]), axis=0)
        keys, values = prefix
        if angles and c.rotary_interleaved:
            dim = int(c.head_dim * c.rotary_fraction)
            order = np.concatenate([np.arange(dim).reshape(-1, 2).T.reshape(-1), np.arange(dim, c.head_dim)])
            keys = keys[..., order]
        k = g("Concat", g("Expand", g.constant(keys[None]), size), k, axis=2)
        v = g("Concat", g("Expand", g.constant(values[None]), size), v, axis=2)
    scores = g("MatMul", g("Mul", q, g.constant(c.head_dim**-0.5)), g("Transpose", k, perm=[0, 1, 3, 2]))
    read = g("MatMul", g("Softmax", g("Add", scores, logits), axis=-1), v)
    read = g("Reshape", g("Transpose", read, perm=[0, 2, 1, 3]), g.constant([0, 0, c.width]))
    x = g("Add", x, g.linear(read, tensors, f"{name}attn.out_proj"))
    x = g.norm(x, tensors, f"{name}norm1", c.norm_epsilon)
    if c.gated:
        gate = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}[c.activation]
        value, gated = (g.linear(x, tensors, f"{name}mlp.{part}") for part in ("fc11", "fc12"))
        hidden = g("Mul", value, g.activation(gated, gate))
    else:
        hidden = g.activation(g.linear(x, tensors, f"{name}mlp.fc1"), "gelu")
    x = g("Add", x, g.linear(hidden, tensors, f"{name}mlp.fc2"))
    return g.norm(x, tensors, f"{name}norm2", c.norm_epsilon)


def _finish(g: Graph, config: ContextualConfig, tensors: Mapping[str, np.ndarray], hidden: str, mask: str) -> None:
    """Mean over the text, output projection, unit length."""
    weights = g("Unsqueeze", mask, g.constant([-1]))  # [B, L, 1]
    axes, once = g.constant([1]), {"keepdims": 0}
    count = g("Max", g("ReduceSum", weights, axes, **once), g.constant(1e-9))
    pooled = g("Div", g("ReduceSum", g("Mul", hidden, weights), axes, **once), count)
    name = "second_stage_model.output_projection"
    vectors = g.linear(g("Relu", g.linear(pooled, tensors, f"{name}.0")), tensors, f"{name}.2")
    vectors = g("Add", vectors, pooled) if config.residual_output else vectors
    length = g("Sqrt", g("ReduceSum", g("Mul", vectors, vectors), g.constant([-1])))
    g.nodes.append(helper.make_node("Div", [vectors, g("Max", length, g.constant(1e-12))], ["sentence_embedding"]))
