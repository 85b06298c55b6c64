"""Every attention kernel in bfloat16 against float32, on the device that is here: a JSON line for each.

    python benchmarks/kernels.py [--shapes large]

`error` is the largest of a kernel's values and gradients, relative to the largest number of an array, with a shared
prefix; `cosine` the smallest between the vectors of a text, of whole models. `ok` says whether both are as they should
be, `skipped` why a kernel cannot run here.
"""

import jax
import numpy as np
from flax import nnx
from harness import emit
from jaxtyping import Float
from shapes import PACKAGES, SHAPES, Shape, arguments, build, config_of, context_vectors, random_texts

from cde_jax.models.attention import attend, kernel_error

ERROR, COSINE, TEXTS = 0.05, 0.99, 8


def main() -> None:
    """Check each kernel at each shape."""
    args = arguments(__doc__, ["tiny"]).parse_args()
    for name in args.shapes:
        expected = {kind: vectors(kind, SHAPES[name], "float32", "xla") for kind in args.models}
        for kernel in ("xla", "blocks", "cudnn"):
            line = {"benchmark": "kernels", "shape": name, "attention": kernel}
            try:
                line["error"] = round(error(kernel, SHAPES[name]), 4)
                for kind in args.models:
                    encoded = vectors(kind, SHAPES[name], "bfloat16", kernel)
                    line[f"cosine_{kind}"] = round(float((encoded * expected[kind]).sum(axis=1).min()), 5)
                cosines = [value for key, value in line.items() if key.startswith("cosine")]
                line["ok"] = line["error"] <= ERROR and min(cosines, default=1.0) >= COSINE
            except ValueError as reason:
                line["skipped"] = str(reason)
            emit(line, *PACKAGES)


def error(kernel: str, shape: Shape) -> float:
    """Of texts of many lengths, beside as many slots as the shape has context documents and soft prompt tokens."""

    def run(queries, keys, values, mask, prefix, bias, slots):
        return attend(queries, keys, values, mask, prefix=prefix, bias=bias, slots=slots, kernel=kernel)

    head_dim = shape.width // shape.heads
    sizes = {"texts": TEXTS, "length": shape.document_length, "slots": shape.context + 8}
    return kernel_error(run, **sizes, heads=shape.heads, head_dim=head_dim)


def vectors(kind: str, shape: Shape, dtype: str, kernel: str) -> Float[np.ndarray, "n D"]:
    """Unit vectors of texts of many lengths."""
    model = build(config_of(kind, shape, dtype, attention=kernel))
    ids, mask = random_texts(TEXTS, shape.document_length, shape.vocabulary)
    mask = np.arange(mask.shape[1]) < np.linspace(1, mask.shape[1], TEXTS, dtype=int)[:, None]
    context = None if kind == "biencoder" else context_vectors(shape)
    with jax.default_matmul_precision("highest"):
        encoded = np.asarray(nnx.jit(lambda model: model.embed(ids, mask, context))(model))
    return encoded / np.linalg.norm(encoded, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
