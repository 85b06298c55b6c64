"""A directory with a baked-in context as ONNX, by PyTorch's own exporter.

Inputs `input_ids` and `attention_mask`, int64 [B, L]; output `sentence_embedding`, float32 unit vectors [B, D].
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

ONE_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GB, above it they lie beside the graph


def check_can_write() -> None:
    """ValueError where PyTorch's exporter is not installed."""
    missing = [name for name in ("torch", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: install cde_jax[torch], or export without it (onnx=False)")


def write_onnx(directory: Path) -> None:
    """Write `onnx/model.onnx` beside the PyTorch module of a directory made by `baked.export_corpus`."""
    import torch
    from transformers import AutoModel

    class UnitVectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()

        def forward(self, input_ids, attention_mask):
            return torch.nn.functional.normalize(self.model(input_ids, attention_mask), dim=-1)

    (directory / "onnx").mkdir()
    names, free = ("input_ids", "attention_mask"), {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        torch.onnx.export(
            UnitVectors(),
            tuple(torch.ones(2, 8, dtype=torch.long) for _ in names),
            directory / "onnx" / "model.onnx",
            input_names=names,
            output_names=["sentence_embedding"],
            dynamic_shapes=dict.fromkeys(names, free),
            dynamo=True,
            external_data=(directory / "model.safetensors").stat().st_size > ONE_FILE,
            verbose=False,
        )
