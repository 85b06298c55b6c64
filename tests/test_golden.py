"""Held to the numbers of the PyTorch reference (`../shared/golden`), as both of its programs compute them."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from safetensors.numpy import load_file, save_file

from cde_jax.interop.read import load_model
from cde_jax.interop.weight_mapping import biencoder_mapping, contextual_mapping, to_torch
from cde_jax.interop.write import parameters

TOLERANCE = 2e-5
FILES = {"shipped": "outputs", "shipped-sequence": "outputs_seqrotary", "training": "outputs"}
SHIPPED = [(case, numerics) for case in ("cde_hf_tiny", "cde_hf_small") for numerics in ("shipped", "shipped-sequence")]
CASES = [*SHIPPED, ("cde_train_residual", "training")]


def directory(tmp_path: Path, config: dict, weights: Path, *, drop: str | None = None, **changes) -> Path:
    """A model directory as people publish it, from the parts of a golden case."""
    keys = config.get("model_config", {"model_type": "nomic_bert", **config["backbone_config"]})
    keys = {**keys, "backbone_config": config["backbone_config"], "tokens": config.get("tokens", {}), **changes}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    if drop is None:
        shutil.copyfile(weights, tmp_path / "model.safetensors")
    else:
        tensors = {name: x for name, x in load_file(weights).items() if not name.endswith(drop)}
        save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def golden(case: str) -> tuple[Path, dict, dict]:
    folder = shared("golden") / case
    config = json.loads((folder / "config.json").read_text())
    return folder, config, dict(np.load(folder / "inputs.npz"))


def weights_of(folder: Path, config: dict) -> Path:
    return folder / config.get("weights_from", "weights.safetensors").split(" ")[0]


def tokens(inputs: dict, name: str) -> tuple[jax.Array, jax.Array]:
    prefix = f"{name}." if name else ""
    return jnp.asarray(inputs[f"{prefix}input_ids"], jnp.int32), jnp.asarray(inputs[f"{prefix}attention_mask"] > 0)


def load(tmp_path: Path, case: str, numerics: str, **changes):
    folder, config, inputs = golden(case)
    model = load_model(directory(tmp_path, config, weights_of(folder, config), **changes), numerics=numerics)
    return model, inputs, dict(np.load(folder / f"{FILES[numerics]}.npz"))


@jax.jit
def embed_context(model, ids, mask):
    return model.embed_context(ids, mask)


@jax.jit
def embed(model, ids, mask, context=None):
    return model.embed(ids, mask, context)


def close(actual, reference, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == reference.shape
    np.testing.assert_allclose(np.asarray(actual, np.float64), reference, rtol=0, atol=tolerance)


def normalised(x) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@jax.jit
def layers(encoder, x, mask, angles) -> dict[str, jax.Array]:
    """Hidden states as the golden files name them."""
    hidden = {"emb_ln": encoder.norm(x)}
    graph, blocks = nnx.split(encoder.blocks)
    rows = hidden["emb_ln"].reshape(-1, x.shape[-1])
    for i in range(encoder.config.layers):
        rows, _ = nnx.merge(graph, jax.tree.map(lambda parameter, i=i: parameter[i], blocks))(rows, mask, angles)
        hidden[f"layer_{i}"] = rows.reshape(x.shape)
    return hidden


def compare_layers(actual: dict, outputs: dict, prefix: str, mask) -> None:
    for name, hidden in actual.items():
        reference = outputs[f"{prefix}/{name}"]
        if reference.ndim == 2:  # the training code keeps real tokens only
            hidden = hidden[np.asarray(mask)]
        close(hidden, reference)


@pytest.mark.parametrize(("case", "numerics"), CASES)
def test_first_stage_gives_the_references_vectors_and_hidden_states(tmp_path, case, numerics):
    model, inputs, outputs = load(tmp_path, case, numerics)
    ids, mask = tokens(inputs, "context")
    close(embed_context(model, ids, mask), outputs["first_stage"])
    close(embed_context(model, *tokens(inputs, "extra_context")), outputs["too_many/first_stage_extra"])
    if numerics != "training":
        close(embed_context(model, *tokens(inputs, "empty")), outputs["empty_context_row/first_stage"])
    if "first_stage/emb_ln" in outputs:
        encoder = model.first_stage.encoder
        hidden = layers(encoder, encoder.embed_tokens(ids, mask), mask, encoder.angles(encoder.positions(mask)))
        compare_layers(hidden, outputs, "first_stage", mask)


@pytest.mark.parametrize(("case", "numerics"), CASES)
def test_second_stage_gives_the_references_vectors(tmp_path, case, numerics):
    model, inputs, outputs = load(tmp_path, case, numerics)
    ids, mask = tokens(inputs, "text")
    context = jnp.asarray(outputs["first_stage"])
    vectors = embed(model, ids, mask, context)
    close(vectors, outputs["base/pooled"])
    close(normalised(np.asarray(vectors)), outputs["base/normalized"])
    close(embed(model, ids, mask, jnp.asarray(inputs["per_example.embeddings"])), outputs["per_example/pooled"])
    more = jnp.concatenate([context, outputs["too_many/first_stage_extra"]])
    close(embed(model, ids, mask, more), outputs["too_many/pooled"])
    close(embed(model, *tokens(inputs, "empty"), context), outputs["empty_text_row/pooled"])


@pytest.mark.parametrize(("case", "numerics"), CASES)
def test_second_stage_gives_the_references_hidden_states(tmp_path, case, numerics):
    model, inputs, outputs = load(tmp_path, case, numerics)
    ids, mask = tokens(inputs, "text")
    cache = model.prepare_context(jnp.asarray(outputs["first_stage"]))
    close(cache.slots, outputs["base/prefix"])
    close(model.hidden(ids, mask, cache)[:, cache.slots.shape[-2] :], outputs["base/text_hidden_states"])
    x, seen, positions = model.joint_sequence(model.encoder.embed_tokens(ids, mask), mask, cache.slots)
    compare_layers(layers(model.encoder, x, seen, model.encoder.angles(positions)), outputs, "base", seen)


@pytest.mark.parametrize(("case", "numerics"), [c for c in CASES if c[0] != "cde_hf_small"])
def test_null_slots_stand_in_for_missing_and_dropped_context(tmp_path, case, numerics):
    model, inputs, outputs = load(tmp_path, case, numerics)
    ids, mask = tokens(inputs, "text")
    close(embed(model, ids, mask, None), outputs["null/pooled"])
    probability = golden(case)[1]["model_config"]["transductive_sequence_dropout_prob"]
    dropped = inputs["dropout.uniform"] < probability
    np.testing.assert_array_equal(dropped, outputs["sequence_dropout/mask"])
    context = jnp.broadcast_to(outputs["first_stage"], (*dropped.shape, outputs["first_stage"].shape[1]))
    cache = model.prepare_context(context, jnp.asarray(~dropped))
    close(embed(model, ids, mask, cache), outputs["sequence_dropout/pooled"])


def test_weights_without_null_embedding_say_so_when_context_is_missing(tmp_path):
    model, inputs, _ = load(tmp_path, "cde_hf_small", "shipped")
    with pytest.raises(ValueError, match="no null embedding"):
        model.embed(*tokens(inputs, "text"), None)


@pytest.mark.parametrize(("case", "numerics"), SHIPPED)
def test_shipped_program_refuses_too_few_contexts(tmp_path, case, numerics):
    model, inputs, outputs = load(tmp_path, case, numerics)
    with pytest.raises(ValueError, match=f"exactly {len(outputs['first_stage'])}"):
        model.embed(*tokens(inputs, "text"), jnp.asarray(outputs["first_stage"][:-1]))


def test_training_program_takes_too_few_contexts(tmp_path):
    model, inputs, outputs = load(tmp_path, "cde_train_residual", "training")
    context = jnp.asarray(outputs["first_stage"][:-2])
    close(embed(model, *tokens(inputs, "text"), context), outputs["too_few/pooled"])


@pytest.mark.parametrize("case", ["cde_hf_tiny", "cde_hf_small"])
@pytest.mark.parametrize(("axis", "numerics"), [("heads", "shipped"), ("seq", "shipped-sequence")])
def test_rotary_can_turn_context_slots_too(tmp_path, case, axis, numerics):
    model, inputs, outputs = load(tmp_path, case, numerics, disable_transductive_rotary_embedding=False)
    expected = np.load(golden(case)[0] / "outputs_rotary_on_context.npz")[f"{axis}/pooled"]
    close(embed(model, *tokens(inputs, "text"), jnp.asarray(outputs["first_stage"])), expected)


@pytest.mark.parametrize("variant", ["pool_all", "no_instruction", "no_instruction_pool_all", "rotary_on_context"])
def test_variants_of_the_training_program(tmp_path, variant):
    changes = golden("cde_train_residual")[1]["variants"][variant]
    model, inputs, outputs = load(tmp_path, "cde_train_residual", "training", **changes)
    context = jnp.asarray(outputs["first_stage"])
    close(embed(model, *tokens(inputs, "text"), context), outputs[f"{variant}/pooled"])


@pytest.mark.parametrize("numerics", ["shipped", "shipped-sequence"])
def test_several_tokens_per_context_document(tmp_path, numerics):
    model, inputs, outputs = load(tmp_path, "cde_hf_multitoken", numerics)
    ids, mask = tokens(inputs, "text")
    context = embed_context(model, *tokens(inputs, "context"))  # [documents × tokens, D]
    documents, pieces, width = outputs["first_stage"].shape
    close(context.reshape(documents, pieces, width), outputs["first_stage"])
    cache = model.prepare_context(context)
    close(embed(model, ids, mask, cache), outputs["base/pooled"])
    close(model.hidden(ids, mask, cache)[:, cache.slots.shape[-2] :], outputs["base/text_hidden_states"])
    # In training each text draws its own documents.
    own = context.reshape(documents, pieces, width)[inputs["train_mode.R"]].reshape(len(ids), -1, width)
    close(embed(model, ids, mask, own), outputs["train_mode_no_dropout/pooled"])
    present = jnp.asarray(inputs["train_mode.uniform"] >= 0.25)
    close(embed(model, ids, mask, model.prepare_context(own, present)), outputs["train_mode/pooled"])


@pytest.mark.parametrize(
    ("file", "numerics"),
    [("outputs", "shipped"), ("outputs_seqrotary", "shipped-sequence"), ("outputs_train", "training")],
)
def test_biencoders_of_the_reference(tmp_path, file, numerics):
    folder, config, inputs = golden("biencoder_tiny")
    model = load_model(directory(tmp_path, config, folder / "weights.safetensors"), numerics=numerics)
    outputs = np.load(folder / f"{file}.npz")
    ids, mask = tokens(inputs, "")
    vectors = embed(model, ids, mask)
    close(model.encoder(ids, mask), outputs["hidden_states"])
    close(vectors, outputs["pooled"])
    close(normalised(np.asarray(vectors)), outputs["normalized"])


VARIANTS = (
    "swiglu",
    "swiglu_with_token_types",
    "rotary_half",
    "rotary_interleaved",
    "rotary_base_10000",
    "geglu",
    "glu",
    "prenorm",
    "small_embeddings_eps",
    "gelu_biases_pooler",
)


@pytest.mark.parametrize(("axis", "numerics"), [("heads", "shipped"), ("seq", None)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nomicbert_and_its_variants(tmp_path, variant, axis, numerics):
    folder, config, inputs = golden("nomicbert_only")
    config = config["variants"][variant]
    path = directory(tmp_path, config, folder / config["weights_file"])
    scale = config["scale_word_and_token_type_embeddings_by"]
    if scale != 1:
        weights = load_file(path / "model.safetensors")
        save_file({k: v * scale if "_embeddings." in k else v for k, v in weights.items()}, path / "model.safetensors")
    types = jnp.asarray(inputs["token_type_ids"], jnp.int32) if config["token_type_ids"] else None
    hidden = load_model(path, numerics=numerics).encoder(*tokens(inputs, ""), type_ids=types)
    close(hidden, np.load(folder / "outputs.npz")[f"{variant}/{axis}/last_hidden_state"])


def contrastive(queries, documents, labels, masked, temperature: float = 50.0):
    """The reference's loss on cosine scores, with pairs that must not count as negatives masked out."""
    queries, documents = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    scores = jnp.where(masked, -1e10, temperature * queries @ documents.T)
    return -jax.nn.log_softmax(scores, axis=1)[labels].mean()


@pytest.mark.parametrize(
    ("case", "numerics"),
    [
        ("hf_heads", "shipped"),
        ("hf_seq", "shipped-sequence"),
        ("train_sequence_dropout", "training"),
        ("train_plain", "training"),
    ],
)
def test_gradients_of_every_parameter(tmp_path, case, numerics):
    folder = shared("golden") / "grads"
    config = json.loads((folder / "config.json").read_text())["cases"][case]
    inputs = dict(np.load(folder / config["inputs"]))
    weights = (folder / config["weights_from"].split(" ")[0]).resolve()
    drop = "sequence_dropout_null_embedding" if "without" in config["weights_from"] else None
    model = load_model(directory(tmp_path, config, weights, drop=drop), numerics=numerics)
    probability = config["model_config"]["transductive_sequence_dropout_prob"]

    def embed_texts(model, name, context):
        if probability:
            present = jnp.asarray(inputs[f"{name}.uniform"] >= probability)
            context = model.prepare_context(jnp.broadcast_to(context, (*present.shape, context.shape[-1])), present)
        return model.embed(*tokens(inputs, name), context)

    def loss(model):
        context = model.embed_context(*tokens(inputs, "context"))
        queries, documents = embed_texts(model, "query", context), embed_texts(model, "document", context)
        return contrastive(queries, documents, inputs["one_hot_labels"], inputs["duplicate_labels"] > 0)

    value, gradients = jax.jit(nnx.value_and_grad(loss))(model)
    expected = np.load(folder / f"{case}_outputs.npz")
    close(value, expected["loss"])
    actual = to_torch(contextual_mapping(model.config), parameters(gradients))
    file = folder / f"{case}_grads.safetensors"
    if file.exists():
        reference = load_file(file)
        assert actual.keys() == reference.keys()
        for name, gradient in reference.items():
            error = np.abs(actual[name] - gradient).max() / np.abs(gradient).max()
            assert error <= 1e-4, name
    for name, norm in config["measured"]["grad_norm"].items():
        assert abs(np.linalg.norm(actual[name]) - norm) <= 1e-4 * norm, name


def test_every_tensor_of_a_biencoder_has_one_rule(tmp_path):
    folder, config, _ = golden("biencoder_tiny")
    model = load_model(directory(tmp_path, config, folder / "weights.safetensors"))
    written = to_torch(biencoder_mapping(model.config.encoder, prefix="embedder."), parameters(model))
    stored = load_file(folder / "weights.safetensors")
    assert written.keys() == stored.keys()
    assert all(written[name].tobytes() == stored[name].tobytes() for name in stored)
    assert not [name for name in written if re.search(r"\{\}", name)]
