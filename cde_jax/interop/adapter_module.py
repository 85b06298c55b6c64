"""The residual of a cde_jax adapter as a module of sentence-transformers: x → (x + V a(K x + b)), as unit rows.

Needs torch and sentence-transformers only; it lies beside the modules.json of an export.
"""
# ruff: noqa: D102

import torch
from torch.nn.functional import normalize

try:
    from sentence_transformers.base.modules.module import Module
except ImportError:  # before sentence-transformers 6
    from sentence_transformers.models import Module


class Residual(Module):
    """One side of an adapter; "linear" is V x."""

    config_keys = ("form", "width", "hidden")

    def __init__(self, form, width, hidden):
        super().__init__()
        self.form, self.width, self.hidden = form, width, hidden
        if form != "linear":
            self.K = torch.nn.Parameter(torch.zeros(hidden, width))
            self.b = torch.nn.Parameter(torch.zeros(hidden))
        self.V = torch.nn.Parameter(torch.zeros(width, hidden))

    def forward(self, features, **kwargs):
        x = h = normalize(features["sentence_embedding"], dim=-1)
        if self.form != "linear":
            h = x @ self.K.T + self.b
            h = {"softmax": lambda z: z.softmax(dim=-1), "mlp": torch.relu, "low_rank": lambda z: z}[self.form](h)
        return features | {"sentence_embedding": normalize(x + h @ self.V.T, dim=-1)}

    def get_embedding_dimension(self):
        return self.width

    get_sentence_embedding_dimension = get_embedding_dimension

    def save(self, output_path, *args, safe_serialization=True, **kwargs):
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path, subfolder="", **kwargs):
        names = ("token", "cache_folder", "revision", "local_files_only")
        where = {"subfolder": subfolder, **{name: kwargs[name] for name in names if name in kwargs}}
        config = cls.load_config(model_name_or_path, **where)
        return cls.load_torch_weights(model_name_or_path, model=cls(**config), **where)
