"""XLA's YNNPACK fusions give wrong numbers on CPU in some versions of jaxlib; importing the package turns them off."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
AFFECTED = version("jaxlib").startswith(("0.10.2", "0.11."))
# jax-ml/jax#39103: the last row under jit, to be 32768² = 1073741824.
WRONG_ROWS = """
import jax, jax.numpy as jnp
rows = jnp.stack([jnp.arange(32_769, dtype=jnp.float32)] + [jnp.zeros(32_769)] * 2, axis=1)
squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
print(float(squares[-1]))
"""


def run(code: str, flags: str = "") -> str:
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr.strip()


@pytest.mark.skipif(not AFFECTED, reason="this jaxlib is not affected")
def test_the_reproduction_is_right_after_importing_the_package():
    assert run("import cde_jax" + WRONG_ROWS) == str(32768.0**2)


@pytest.mark.skipif(version("jaxlib") != "0.10.2", reason="reproduced with jaxlib 0.10.2")
def test_the_reproduction_is_wrong_without_the_flag():
    assert run(WRONG_ROWS) != str(32768.0**2)  # if this fails the workaround can go


@pytest.mark.skipif(not AFFECTED, reason="this jaxlib is not affected")
@pytest.mark.parametrize(
    ("before", "after"),
    [("", f"{FLAG}="), ("--xla_foo=1", f"--xla_foo=1 {FLAG}="), (f"{FLAG}=-reduce", f"{FLAG}=-reduce")],
)
def test_other_flags_and_the_users_own_choice_are_kept(before, after):
    assert run("import cde_jax, os; print(os.environ['XLA_FLAGS'])", before) == after


@pytest.mark.skipif(not AFFECTED, reason="this jaxlib is not affected")
def test_importing_too_late_warns():
    assert "import cde_jax first" in run("import jax; jax.devices(); import cde_jax")
    assert run("import jax; import cde_jax; jax.devices()") == ""


@pytest.mark.parametrize(
    ("plugin", "before", "after"),
    [
        (None, "--xla_foo=1", "--xla_foo=1"),
        ("jax_cuda13_plugin", "--xla_foo=1", "--xla_foo=1 --xla_gpu_deterministic_ops=true"),
        ("jax_cuda13_plugin", "--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false"),
        ("jax_cuda12_plugin", "--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_exclude_nondeterministic_ops"),
    ],
)
def test_training_is_deterministic_where_there_is_a_gpu_and_the_user_said_nothing(plugin, before, after, tmp_path):
    if plugin:
        (tmp_path / f"{plugin}.py").touch()
    code = (
        f"import sys, os; sys.path.insert(0, {str(tmp_path)!r}); import cde_jax; os.environ['XLA_FLAGS'] = {before!r}"
    )
    assert run(f"{code}; cde_jax.deterministic_gpu(); print(os.environ['XLA_FLAGS'])") == after


# The loss and the norm of each gradient for each kind of model, over 16,384 tokens.
MODELS = """
import jax, numpy as np
from flax import nnx
from cde_jax.models.contextual import Biencoder, BiencoderConfig, ContextualConfig, ContextualEncoder
from cde_jax.models.encoder import EncoderConfig
from cde_jax.training.losses import info_nce
encoder = EncoderConfig(vocab_size=100, width=32, layers=1, heads=2, mlp_width=64)
ids = np.random.default_rng(0).integers(0, 100, (512, 32))
mask = np.ones_like(ids, bool)
for kind in ("biencoder", "isolated", "joint"):
    if kind == "biencoder":
        model = Biencoder(BiencoderConfig(encoder), rngs=nnx.Rngs(params=0))
    else:
        shape = ContextualConfig(BiencoderConfig(encoder, head=True), encoder, 16, kind, slot_bias=None)
        model = ContextualEncoder(shape, rngs=nnx.Rngs(params=0))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        model = nnx.merge(graph, params)
        context = None if kind == "biencoder" else model.embed_context(ids[:16], mask[:16])
        vectors = model.embed(ids, mask, context)
        return info_nce(vectors[:256], vectors[256:], None, 0.02)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    print(float(value), *(float(np.linalg.norm(x)) for x in jax.tree.leaves(gradients)))
"""


@pytest.mark.slow
@pytest.mark.skipif(version("jaxlib") != "0.10.2", reason="the fault is jaxlib 0.10.2's")
def test_models_losses_and_gradients_agree_with_and_without_the_fusions():
    with_fusions, without = (run(MODELS, flags) for flags in (f"{FLAG}=+reduce", f"{FLAG}="))
    numbers = [[[float(x) for x in line.split()] for line in out.splitlines()] for out in (with_fusions, without)]
    assert len(numbers[0]) == 3
    for a, b in zip(*numbers, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
