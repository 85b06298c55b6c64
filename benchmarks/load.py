"""Time and memory of loading the paper's model shape: NomicBERT-base twice, 281 million parameters.

    python benchmarks/load.py [--directory=DIR]

Without a directory it writes one with random weights to a temporary folder (1.1 GB) and removes it afterwards.
A fresh process imports the library and starts the backend; from there on it counts seconds and the growth of its
peak resident memory (ru_maxrss) while `load_model` runs, until the parameters are on the device. One JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import json, os, resource, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from flax import nnx
from cde_jax.interop.read import load_model
jnp.zeros(8).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
model = load_model(sys.argv[1])
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": peak() - before, "parameters": sum(x.size for x in leaves)}))
"""


def write_directory(directory: Path) -> None:
    """A directory laid out like cde-small-v1 with random weights."""
    import numpy as np
    from flax import nnx
    from safetensors.numpy import save_file

    from cde_jax.interop.families import reference_model
    from cde_jax.interop.rules import contextual_rules, torch_shapes
    from cde_jax.models.contextual import ContextualEncoder

    keys = {
        "architecture": "transductive",
        "embedder": "nomic-ai/nomic-bert-2048",
        "transductive_corpus_size": 512,
        "transductive_sequence_dropout_prob": 0.005,
    }
    (directory / "config.json").write_text(json.dumps(keys))
    config = reference_model(keys, "shipped", null=True, colon=lambda: 0, source="benchmark")
    abstract = nnx.state(nnx.eval_shape(lambda: ContextualEncoder(config, rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.02)
        for name, shape in torch_shapes(contextual_rules(config), shapes).items()
    }
    save_file(tensors, directory / "model.safetensors")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        return write_directory(arguments.write)
    directory = arguments.directory
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None:
            directory = Path(scratch)
            # By a process of its own: Linux hands the peak memory of a parent on to its children.
            subprocess.run([sys.executable, __file__, f"--write={directory}"], check=True)
        ran = subprocess.run([sys.executable, "-c", MEASURE, directory], capture_output=True, text=True, check=True)
        result = json.loads(ran.stdout.splitlines()[-1])
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    print(json.dumps({"benchmark": "load", **result, "file_bytes": size, "memory_ratio": result["bytes"] / size}))


if __name__ == "__main__":
    main()
