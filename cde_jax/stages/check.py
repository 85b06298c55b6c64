"""Checks before expensive work: what the configuration, a first look at the inputs and the counted pairs can tell.

Each imports what it needs, so that training can be checked where only JAX is installed.
"""

import logging
from collections.abc import Sequence

from cde_jax.config import Config, Train
from cde_jax.data.sources import beir
from cde_jax.data.store import Store
from cde_jax.data.tokens import Tokenizer

log = logging.getLogger(__name__)


def check_inputs(config: Config, stages: Sequence[str]) -> None:
    """Raises ValueError, before anything is written, for what these stages could not use."""
    d, b = config.data, config.batching
    if unused := config.unused():
        log.warning("these settings have no effect with the other ones: %s", ", ".join(unused))
    if "prepare" in stages:
        from cde_jax.batching.surrogate import check_surrogate

        check_surrogate(b.surrogate, b.surrogate_prompts)
        if not b.filter_is_surrogate:
            check_surrogate(b.filter_surrogate or b.surrogate, b.filter_prompts)
        if d.tokenizer != "wordpiece":
            check_vocabulary(config, Tokenizer.load(d.tokenizer).vocab_size)
    if {"prepare", "evaluate"} & set(stages):
        beir.read_sets(d.evaluation)
    if "train" in stages:
        from cde_jax.stages.assemble import check_runtime

        check_runtime(config)
        check_initial_encoders(config)


def check_vocabulary(config: Config, tokens: int) -> None:
    """Raises ValueError for a tokenizer with more tokens than the model has embeddings."""
    if 0 < config.model.vocab_size < tokens:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, `model.vocab_size` is {config.model.vocab_size}: raise it, or set it "
            "to 0 for as many as the tokenizer has"
        )


def check_pairs(config: Config, pairs: Store, training: bool) -> None:
    """Raises ValueError, as soon as pairs are counted, for sizes and weights that do not fit them.

    training: also for a warm-up and pretrained encoders that do not.
    """
    from cde_jax.batching.build import check_sizes

    check_vocabulary(config, pairs.manifest["vocab_size"])
    batches = check_sizes(config.batching, {domain["name"]: domain["pairs"] for domain in pairs.manifest["domains"]})
    if training:
        check_steps(config.train, batches)
        check_initial_encoders(config, pairs.manifest["vocab_size"])


def check_steps(train: Train, batches: int) -> int:
    """The steps of a run. Raises ValueError for a plan too short for one, or for the warm-up."""
    once = batches // train.batches_per_step
    steps = train.steps or once
    if steps < 1:
        raise ValueError(
            f"the plan has {batches} batches, fewer than the {train.batches_per_step} of one step: lower "
            "train.batches_per_step or batching.batch_size, raise batching.epochs, or give more data"
        )
    if train.warmup_steps >= steps:
        raise ValueError(
            f"`train.warmup_steps` {train.warmup_steps} must be fewer than the {steps} steps of the plan's {batches} "
            "batches: lower it, raise batching.epochs, or give more data"
        )
    if steps > once:
        log.warning("train.steps %d are more than the %d of the plan, which is repeated", steps, once)
    return steps


def check_initial_encoders(config: Config, vocab_size: int | None = None) -> None:
    """Raises ValueError for encoders of `model.init` that are not there or of another shape than the config's model.

    vocab_size: of the tokenizer, where it is known.
    """
    m, d = config.model, config.data
    names = {"second_stage": m.init.second_stage, "first_stage": m.init.first_stage if m.kind == "contextual" else ""}
    for stage, name in names.items():
        if name:
            from cde_jax.interop.read import open_encoder
            from cde_jax.stages.assemble import encoder_config

            layers = m.layers if stage == "second_stage" else m.first_stage_layers or m.layers
            actual, *_ = open_encoder(name, m.init.layers or None)
            if vocab_size is None:  # a WordPiece of at most so many tokens is still to be trained
                vocab_size = min(actual.vocab_size, d.vocab_size) if d.tokenizer == "wordpiece" else None
            expected = encoder_config(m, vocab_size or actual.vocab_size, layers, "float32")
            different = [
                f"{field}: the config says {value!r}, the checkpoint {other!r}"
                for field, value in vars(expected).items()
                if field not in ("dtype", "remat", "attention") and value != (other := getattr(actual, field))
            ]
            if different:
                raise ValueError(
                    f"model.init.{stage} {name!r} is of another shape than the config's model: {'; '.join(different)}. "
                    "Set model.* to the checkpoint's shape"
                )
