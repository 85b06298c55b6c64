"""Configurations: mistakes are named before anything is read, and every config file builds the model it promises."""

import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from cde_jax.config import Batching, flatten, from_config_dict, with_changes
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualEncoder
from cde_jax.stages.assemble import model_config
from cde_jax.stages.workdir import check_same_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
sys.path.insert(0, str(CONFIGS.parent))
NAMES = sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))


def load(name: str = "base", variant: str = "") -> ConfigDict:
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    return module.get_config(variant)


def changed(**keys) -> dict:
    """The base config with `section__key=value`, as a plain dict, which checks nothing itself."""
    config = load().to_dict()
    for name, value in keys.items():
        *sections, key = name.split("__")
        part = config
        for section in sections:
            part = part[section]
        part[key] = value
    return config


def refused(config) -> str:
    with pytest.raises(ValueError, match="the configuration cannot be used") as error:
        from_config_dict(config)
    return str(error.value)


# --- mistakes


def test_an_unknown_key_is_answered_with_the_nearest_known_one():
    assert "unknown key `train.learning_rat`: did you mean `train.learning_rate`?" in refused(
        changed(train__learning_rat=1.0)
    )
    assert "unknown key `model.init.first_stag`: did you mean `model.init.first_stage`?" in refused(
        changed(model__init__first_stag="x")
    )
    assert "unknown key `sed`: did you mean `seed`?" in refused(changed(sed=1))
    far = refused(changed(evaluate__xylophone=1))
    assert "unknown key `evaluate.xylophone`: known keys here: development, checkpoint, cutoff, baselines" in far


def test_every_mistake_is_told_at_once():
    message = refused(changed(sed=1, train__lr=0.1, data__paths=3))
    assert message.count("\n- ") == 3


def test_a_missing_key_is_named():
    config = changed()
    del config["train"]["temperature"], config["model"]["init"]
    message = refused(config)
    assert "`train.temperature` is missing: start from configs/base.py" in message
    assert "`model.init` is missing" in message


def test_a_section_that_is_no_section_is_named():
    assert "`train` must be a section of keys" in refused(changed(train=3))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train__learning_rate", "0.1", "float"),
        ("train__learning_rate", True, "float"),
        ("train__steps", 1.5, "int"),
        ("train__steps", True, "int"),
        ("train__share_negatives", 1, "bool"),
        ("data__source", 3, "str"),
        ("data__paths", "pairs.jsonl", "a tuple of texts"),
        ("data__paths", (3,), "a tuple of texts"),
        ("train__mesh", (2.0, 1), "a tuple of whole numbers"),
        ("train__mesh", 8, "a tuple of whole numbers"),
        ("batching__filter_margin", "none", "float | None"),
        ("seed", None, "int"),
    ],
)
def test_a_value_of_another_type_is_named(key, value, expected):
    message = refused(changed(**{key: value}))
    assert f"`{key.replace('__', '.')}` must be {expected}" in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize("mesh", [(8,), (-1, -1), (0, 1), (2, -2), (2, 2, 2)])
def test_a_mesh_is_two_numbers_of_devices_or_one_and_the_rest(mesh):
    assert "`train.mesh` must be (data, fsdp)" in refused(changed(train__mesh=mesh))
    assert from_config_dict(changed(train__mesh=[-1, 4])).train.mesh == (-1, 4)


def test_whole_numbers_lists_and_none_are_taken_where_they_fit():
    config = from_config_dict(changed(train__clip_norm=1, data__paths=["a.jsonl"], batching__filter_margin=None))
    assert config.train.clip_norm == 1.0 and isinstance(config.train.clip_norm, float)
    assert config.data.paths == ("a.jsonl",)
    assert config.batching.filter_margin is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("data__vocab_size", 10**12),
        ("data__vocab_size", 10),
        ("data__query_length", 2),
        ("batching__batch_size", 1),
        ("batching__cluster_size", 0),
        ("batching__hard_negatives", -1),
        ("batching__filter_margin", 2.5),
        ("batching__filter_margin", math.nan),
        ("model__context_size", -1),
        ("train__document_chunk", -2),
        ("train__batches_per_step", 0),
        ("train__learning_rate", -1.0),
        ("train__temperature", 0.0),
        ("train__temperature", math.nan),
        ("train__sequence_dropout", 1.1),
        ("train__log_every", 0),
        ("evaluate__cutoff", 0),
    ],
)
def test_a_value_outside_its_range_is_named_with_the_range(key, value):
    message = refused(changed(**{key: value}))
    assert f"`{key.replace('__', '.')}` must be ≥ " in message and f"got {value}" in message


@pytest.mark.parametrize(
    "key",
    [
        "data__source",
        "data__packages",
        "batching__method",
        "batching__packing",
        "batching__context_source",
        "model__kind",
        "model__context_attention",
        "model__backbone",
        "model__dtype",
        "evaluate__checkpoint",
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_those_that_do(key):
    message = refused(changed(**{key: "other"}))
    assert f"`{key.replace('__', '.')}` must be one of '" in message and "got 'other'" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__source": "jsonl"}, "`data.paths` is empty: name the jsonl files"),
        ({"model__context_size": 0}, "`model.context_size` is 0, so there is no context"),
        ({"model__max_positions": 100}, "texts of 512 tokens do not fit `model.max_positions` = 100"),
        ({"model__heads": 7}, "`model.width` 768 is not a multiple of `model.heads` 7"),
        ({"train__steps": 10}, "`train.warmup_steps` 1000 must be fewer than `train.steps` 10"),
        ({"evaluate__development": ("x",)}, "`evaluate.development` x: not among the evaluation sets ()"),
        ({"evaluate__development": "x"}, "`evaluate.development` must be a tuple of texts, e.g. ('a',), got 'x'"),
        ({"data__evaluation": ("a/set", "b/set/")}, "these come twice: set"),
        ({"data__held_out": ("scipy",), "data__evaluation": ("a/scipy",)}, "these come twice: scipy"),
        ({"data__source": "jsonl", "data__paths": (" ",)}, "an empty path is in `data.paths`"),
        ({"model__vocab_size": 100}, "`model.vocab_size` 100 has no room for the `data.vocab_size` 8192 tokens"),
        ({"model__width": 60, "model__heads": 4}, "`model.width` / `model.heads` is 15: rotary positions need"),
        ({"batching__domain_weights": ("sea",)}, "`batching.domain_weights` must have the form"),
        ({"batching__domain_weights": ("sea=-1",)}, "`batching.domain_weights` must have the form"),
        ({"batching__domain_weights": ("sea=nan",)}, "`batching.domain_weights` must have the form"),
        ({"batching__domain_weights": ("sea=1", "sea=2")}, "names a domain twice"),
        ({"batching__surrogate_prompts": ("one",)}, "`batching.surrogate_prompts` must be empty or"),
    ],
)
def test_keys_that_do_not_go_together_are_named(changes, words):
    assert words in refused(changed(**changes))


def test_held_out_packages_are_evaluation_sets_of_docstrings_only():
    changes = {"data__held_out": ("scipy",), "evaluate__development": ("scipy",)}
    assert from_config_dict(changed(**changes)).data.evaluation_names == ("scipy",)
    assert "scipy: not among the evaluation sets ()" in refused(
        changed(data__source="jsonl", data__paths=("a",), **changes)
    )


def test_settings_without_effect_are_named():
    assert from_config_dict(changed()).unused() == []
    other_source = changed(
        data__paths=("a",), data__columns=("query=q",), batching__mine_last=3, batching__mine_first=1
    )
    unused = ["data.paths", "data.columns", "batching.mine_first", "batching.mine_last"]
    assert from_config_dict(other_source).unused() == unused
    jsonl = changed(data__source="jsonl", data__paths=("a",), data__packages="installed", data__collections=("bge",))
    assert from_config_dict(jsonl).unused() == ["data.packages", "data.collections"]
    pretrained = changed(data__tokenizer="x", data__vocab_size=99, batching__surrogate="checkpoint:x")
    pretrained["batching"]["surrogate_width"] = 9
    assert from_config_dict(pretrained).unused() == ["data.vocab_size", "batching.surrogate_width"]


@pytest.mark.parametrize(
    ("surrogate", "prompts", "other", "other_prompts", "same"),
    [
        ("lsa", (), "", (), True),
        ("lsa", (), "lsa", (), True),
        ("lsa", (), "checkpoint:x", (), False),
        ("sentence-transformers:x", ("a", "b"), "", (), True),
        ("sentence-transformers:x", ("a", "b"), "", ("c", "d"), False),
        ("sentence-transformers:x", ("a", "b"), "sentence-transformers:x", ("a", "b"), True),
        ("sentence-transformers:x", ("a", "b"), "sentence-transformers:x", (), False),
    ],
)
def test_a_filter_of_its_own_is_another_model_or_other_prompts(surrogate, prompts, other, other_prompts, same):
    b = Batching(surrogate=surrogate, surrogate_prompts=prompts, filter_surrogate=other, filter_prompts=other_prompts)
    assert b.filter_is_surrogate == same


def test_changes_by_dotted_names_leave_the_original_alone():
    config = load()
    made = with_changes(config, {"train.steps": 3, "train.warmup_steps": 1, "model.init.layers": 2, "seed": 9})
    assert (made["train"]["steps"], made["model"]["init"]["layers"], made["seed"]) == (3, 2, 9)
    assert (config.train.steps, config.seed) == (0, 0)
    checked = from_config_dict(made)
    assert with_changes(checked, {}) == checked.as_dict() and checked.train.steps == 3
    for name, hint in {
        "train.stpes": "did you mean `train.steps`",
        "trian.steps": "did you mean `train.steps`",
        "train": "",
        "train.steps.x": "",
        "xyz": "known keys here: seed, data",
    }.items():
        with pytest.raises(ValueError, match=f"unknown key `{name}`.*{hint}"):
            with_changes(config, {name: 1})


def test_what_is_no_configuration_is_refused():
    assert "expected a ConfigDict (of get_config) or a nested dict, got int" in refused(3)
    assert "`train.clip_norm` must be float" in refused(changed(train__clip_norm=10**400))


def test_development_sets_may_be_folders_of_the_evaluation_sets():
    config = from_config_dict(changed(data__evaluation=("sets/tiny/",), evaluate__development=("tiny",)))
    assert config.evaluate.development == ("tiny",)


def test_an_unknown_variant_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown variant 'isolatd': known are biencoder, contextual .*isolated; random"
    ):
        load("demo", "isolatd,random")


# --- one work directory, one run


def test_another_configuration_is_listed_key_by_key_and_free_keys_may_differ():
    before = from_config_dict(load()).as_dict()
    now = from_config_dict(
        changed(train__log_every=3, batching__threads=1, evaluate__cutoff=5, train__checkpoint_every=7)
    ).as_dict()
    check_same_run(now, before, "runs/x")
    now = from_config_dict(
        changed(seed=4, train__temperature=0.5, data__held_out=("a",), train__log_every=3, train__learning_rate=0.5)
    ).as_dict()
    with pytest.raises(ValueError, match="runs/x holds a run with another configuration") as error:
        check_same_run(now, before, "runs/x")
    listed = [line for line in str(error.value).splitlines() if line.startswith("- ")]
    assert listed == [
        "- data.held_out: () there, ['a'] now",
        "- seed: 0 there, 4 now",
        "- train.temperature: 0.02 there, 0.5 now",
    ]
    assert "another --workdir" in str(error.value) and "--rebuild" in str(error.value)


def test_a_config_read_back_from_json_is_the_same_run(tmp_path):
    from cde_jax.data.files import read_json, write_json

    config = from_config_dict(changed(data__held_out=("a", "b"))).as_dict()
    write_json(tmp_path / "config.json", config)
    check_same_run(config, read_json(tmp_path / "config.json"), "x")


def test_flat_names_are_those_of_the_command_line():
    assert flatten({"a": {"b": {"c": 1}}, "d": ()}) == {"a.b.c": 1, "d": ()}


# --- every config file


def shapes(config):
    shape = model_config(config.model, 30522, "float32")
    kind = Biencoder if isinstance(shape, BiencoderConfig) else ContextualEncoder
    return nnx.eval_shape(lambda: kind(shape, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("head", [False, True])
def test_a_biencoder_has_a_residual_head_where_the_config_says_so(head):
    model = shapes(from_config_dict(changed(model__kind="biencoder", model__head=head)))
    assert (model.config.head, model.config.residual, hasattr(model, "head_out")) == (head, head, head)


def count(model) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def checked(name: str, variant: str):
    config = load(name, variant)
    if config.data.source == "jsonl":
        config.data.paths = ("pairs.jsonl",)
    return from_config_dict(config)


def test_there_are_config_files():
    assert {"base", "demo", "small", "large"} <= set(NAMES)


@pytest.mark.parametrize("batches", ["random", "clustered"])
@pytest.mark.parametrize("kind", ["biencoder", "contextual", "isolated"])
@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_its_model(name, kind, batches):
    config = checked(name, f"{kind},{batches}")
    assert config.batching.method == batches
    model = shapes(config)
    assert isinstance(model, Biencoder if kind == "biencoder" else ContextualEncoder)
    if kind != "biencoder":
        assert model.config.context_attention == ("joint" if kind == "contextual" else "isolated")
        assert model.config.context_size == config.model.context_size
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype("float32")}


@pytest.mark.parametrize(("variant", "millions"), [("contextual", 281), ("isolated", 281), ("biencoder", 137)])
def test_large_has_as_many_parameters_as_the_published_model(variant, millions):
    parameters = count(shapes(checked("large", variant)))
    print(f"large, {variant}: {parameters:,} parameters")
    assert abs(parameters / 1e6 / millions - 1) < 0.005


@pytest.mark.parametrize("name", ["small", "large"])
def test_the_paper_s_settings_have_its_surrogates_and_lsa_as_a_variant(name):
    b = checked(name, "clustered").batching
    assert b.surrogate.endswith("gtr-t5-base") and b.filter_surrogate.endswith("nomic-embed-text-v1")
    assert not b.filter_is_surrogate
    b = checked(name, "lsa").batching
    assert (b.surrogate, b.filter_surrogate, b.filter_prompts) == ("lsa", "", ()) and b.filter_is_surrogate


def test_small_is_the_paper_s_small_setting():
    config = checked("small", "contextual,clustered")
    assert (config.model.layers, config.data.document_length, config.model.context_size) == (6, 64, 64)


def test_large_is_the_paper_s_large_setting():
    config = checked("large", "contextual,clustered")
    assert (config.data.document_length, config.model.context_size, config.batching.epochs) == (512, 512, 3)
    t = config.train
    assert (t.temperature, t.learning_rate, t.warmup_steps, t.sequence_dropout) == (0.02, 2e-5, 1000, 0.005)
