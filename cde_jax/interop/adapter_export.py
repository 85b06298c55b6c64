"""An adapter for others: as ONNX, and behind an encoder in a directory that sentence-transformers loads."""

from importlib.resources import files
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cde_jax.data.files import NewFolder, write_file

MODULE = "modeling_cde_jax_adapter.py"
Tables = dict[str, dict[str, Float[np.ndarray, "..."]]]  # as `Adapter.tables`: K, b and V by side; none: the identity


def write_onnx(tables: Tables, form: str, width: int, directory: Path) -> list[Path]:
    """Write `query.onnx` and `document.onnx`: `vectors`, float32 [n, width] → `adapted`, unit rows of this shape."""
    _check("onnx")
    import onnx
    from onnx import helper, numpy_helper

    written = []
    for side in ("query", "document"):
        table = {name: array if name == "b" else array.T for name, array in tables.get(side, {}).items()}
        nodes, last = [("LpNormalization", ["vectors"], "x", {"axis": -1, "p": 2})], "x"
        if table:
            if form != "linear":
                nodes += [("MatMul", ["x", "K"], "product", {}), ("Add", ["product", "b"], "logits", {})]
                activation = {"softmax": ("Softmax", {"axis": -1}), "mlp": ("Relu", {}), "low_rank": ("Identity", {})}
                operator, attributes = activation[form]
                nodes += [(operator, ["logits"], "hidden", attributes)]
            nodes += [("MatMul", ["x" if form == "linear" else "hidden", "V"], "residual", {})]
            nodes += [
                ("Add", ["x", "residual"], "moved", {}),
                ("LpNormalization", ["moved"], "y", {"axis": -1, "p": 2}),
            ]
            last = "y"
        nodes += [("Identity", [last], "adapted", {})]
        ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", width]) for n in ("vectors", "adapted")]
        graph = helper.make_graph(
            [helper.make_node(name, inputs, [output], **attributes) for name, inputs, output, attributes in nodes],
            f"{side} adapter",
            ends[:1],
            ends[1:],
            [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in table.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        written.append(directory / f"{side}.onnx")
        write_file(written[-1], model.SerializeToString())
    return written


def write_sentence_transformers(tables: Tables, form: str, width: int, encoder: str, directory: Path) -> None:
    """Write an encoder (a name or directory) with the adapter behind it.

    `SentenceTransformer(directory, trust_remote_code=True)` adapts in `encode_query` and `encode_document`; plain
    `encode` gives vectors as `encode_document` does.
    """
    _check("torch", "sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.base.modules import Normalize, Router
    except ImportError:  # before sentence-transformers 6
        from sentence_transformers.models import Normalize, Router
    source = files("cde_jax.interop").joinpath("adapter_module.py")
    spec = spec_from_file_location(MODULE.removesuffix(".py"), str(source))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model = SentenceTransformer(encoder, device="cpu")
    dimension = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    if (found := dimension()) != width:
        raise ValueError(f"{encoder}: expected an encoder of vectors of width {width}, got {found}")

    def residual(table: dict[str, Any]) -> Any:
        made = module.Residual(form, width, table["V"].shape[1])
        made.load_state_dict({name: torch.from_numpy(array) for name, array in table.items()})
        return made

    sides = [[residual(tables[side])] if side in tables else [Normalize()] for side in ("query", "document")]
    model.append(Router.for_query_document(*sides, default_route="document"))
    with NewFolder(directory, marker="modules.json") as new:
        model.save(str(new.path))
        (new.path / MODULE).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        new.put_in_place()


def _check(*names: str) -> None:
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"this export needs {', '.join(missing)}: install cde_jax[torch]")
