"""Contextual text embeddings in PyTorch: the model of the directory that this file lies in.

Needs torch and transformers only. `config.json` describes the model under "cde_jax"; tensor names are those of
cde-small-v1. In two stages: vectors of a sample of the corpus, then of texts with these as their context.

    model = SentenceTransformer(DIR, trust_remote_code=True)
    context = model.encode(sample, prompt_name="document")
    vectors = model.encode(texts, prompt_name="query", dataset_embeddings=context)
"""
# ruff: noqa: D102, D103

import shutil

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

GATES = {"swiglu": F.silu, "geglu": F.gelu, "glu": torch.sigmoid}


class CdeConfig(PretrainedConfig):
    """`config.json` as it is; the model is described by `cde_jax["model"]`."""

    model_type = "cde_jax"


class Block(nn.Module):
    """One post-norm layer, which attends also to the keys and values of a prefix (the context slots)."""

    def __init__(self, c):
        super().__init__()
        width, inner, (bias_in, bias_out) = c["width"], c["mlp_width"], c["mlp_bias"]
        self.c, self.heads, self.gate = c, c["heads"], GATES.get(c["activation"])
        sizes = {"Wqkv": 3 * width, "out_proj": width}
        self.attn = nn.ModuleDict({name: nn.Linear(width, n, c["attention_bias"]) for name, n in sizes.items()})
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=c["norm_epsilon"]), nn.LayerNorm(width, eps=c["norm_epsilon"])
        layers = {name: nn.Linear(width, inner, bias_in) for name in (("fc11", "fc12") if self.gate else ("fc1",))}
        self.mlp = nn.ModuleDict({**layers, "fc2": nn.Linear(inner, width, bias_out)})

    def forward(self, x, logits, positions, prefix=None):  # x [B, S, D]; logits [B, H|1, S|1, P + S] are added
        output, keys_values = self.attention(x, logits, positions, prefix)
        x, m = self.norm1(x + output), self.mlp
        hidden = m["fc11"](x) * self.gate(m["fc12"](x)) if self.gate else F.gelu(m["fc1"](x))
        return self.norm2(x + m["fc2"](hidden)), keys_values

    def attention(self, x, logits, positions, prefix):
        q, k, v = self.attn["Wqkv"](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, S, d]
        if self.c["positions"] == "rotary":
            q, k = self.rotate(q, positions), self.rotate(k, positions)
        own = k, v
        if prefix is not None:
            k, v = (torch.cat([p.expand(x.shape[0], -1, -1, -1), y], dim=2) for p, y in zip(prefix, own, strict=True))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=logits)
        output = output.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # a copy that exporters keep
        return self.attn["out_proj"](output.flatten(2)), own

    def rotate(self, x, positions):  # positions [B, S]; a token at 0 is not turned
        dim, device = int(x.shape[-1] * self.c.get("rotary_fraction", 1.0)), x.device
        inverse = 1.0 / self.c["rotary_base"] ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        steps = positions.clamp(min=0)[:, None]
        if self.c.get("numerics") == "shipped":  # cde-small-v1's own file turns by the index of the head
            steps = torch.where(positions[:, None] < 0, 0, torch.arange(self.heads, device=device)[:, None])
        angles = steps[..., None].float() * inverse
        cos, sin, turned, rest = angles.cos(), angles.sin(), x[..., :dim], x[..., dim:]
        pairs = self.c.get("rotary_interleaved", False)
        a, b = (turned[..., ::2], turned[..., 1::2]) if pairs else turned.chunk(2, dim=-1)
        turned = [a * cos - b * sin, b * cos + a * sin]
        turned = torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)
        return torch.cat([turned, rest], dim=-1).to(x.dtype)


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, c):
        super().__init__()
        tables = {"word": c["vocab_size"], "token_type": c["token_types"]}
        tables |= {"position": c["max_positions"]} if c["positions"] == "learned" else {}
        self.embeddings = nn.ModuleDict(
            {f"{k}_embeddings": nn.Embedding(n, c["width"]) for k, n in tables.items() if n}
        )
        self.emb_ln = nn.LayerNorm(c["width"], eps=c["norm_epsilon"])
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(c) for _ in range(c["layers"]))})

    def positions(self, mask):
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape[0], -1)

    def token_type(self):
        return self.embeddings["token_type_embeddings"].weight[0] if "token_type_embeddings" in self.embeddings else 0

    def embed(self, ids, mask):
        tables, x = self.embeddings, self.embeddings["word_embeddings"](ids) + self.token_type()
        return x + tables["position_embeddings"](self.positions(mask)) if "position_embeddings" in tables else x

    def run(self, x, mask, positions, prefix=None, bias=None):
        """Hidden states and each layer's keys and values; `bias` [layers, H, S|1, P + S] is added to the logits."""
        lowest = torch.finfo(x.dtype).min
        closed = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, lowest)[:, None, None]
        x, all_keys_values = self.emb_ln(x), []
        for i, layer in enumerate(self.encoder["layers"]):
            logits = closed if bias is None else (closed + bias[i]).clamp(min=lowest)
            x, keys_values = layer(x, logits, positions, None if prefix is None else prefix[i])
            all_keys_values.append(keys_values)
        return x, all_keys_values

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.bool()
        return self.run(self.embed(input_ids, mask), mask, self.positions(mask))[0]


def mean_pool(hidden, mask):
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def mlp(width, inner, outputs, activation):
    return nn.Sequential(nn.Linear(width, inner), activation, nn.Linear(inner, outputs))


class FirstStage(nn.Module):
    """A text to one vector, without context."""

    def __init__(self, c):
        super().__init__()
        self.pooling, self.residual, width = c["pooling"], c["residual"], c["encoder"]["width"]
        self.embedder = Encoder(c["encoder"])
        self.mlp = mlp(width, width, c["output_width"] or width, nn.GELU()) if c["head"] else nn.Identity()

    def forward(self, input_ids, attention_mask, **_):
        hidden = self.embedder(input_ids, attention_mask)
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, attention_mask)
        return self.mlp(pooled) + (pooled if self.residual else 0)


class SecondStage(nn.Module):
    """Texts that attend to context vectors, by joint or isolated attention.

    With `corpus_slots` P, the context of a corpus is part of the weights. "numerics" names a program of the reference:
    the file that ships with cde-small-v1 ("shipped", "shipped-sequence") or the authors' training code ("training").
    """

    def __init__(self, c, corpus_slots=0):
        super().__init__()
        self.c, self.corpus_slots, e = c, corpus_slots, c["second_stage"]
        self.isolated, width = c["context_attention"] == "isolated", e["width"]
        self.numerics, self.shipped = c.get("numerics"), str(c.get("numerics")).startswith("shipped")
        self.backbone = Encoder(e)
        self.output_projection = mlp(width, width, width, nn.ReLU())
        if c["slot_bias"] is not None:
            self.slot_bias = nn.Parameter(torch.zeros(e["layers"], e["heads"]))
        if corpus_slots and self.isolated:  # keys and values, layer by layer
            self.context = nn.Parameter(torch.zeros(e["layers"], 2, e["heads"], corpus_slots, width // e["heads"]))
        elif corpus_slots:
            self.context = nn.Parameter(torch.zeros(corpus_slots, width))
        else:
            self.prompt_projection = mlp(width, width, width * c["soft_prompt"], nn.ReLU())
        if c["null_embedding"] and not corpus_slots:
            self.sequence_dropout_null_embedding = nn.Parameter(torch.zeros(width))

    def prepare(self, context):  # [J, D] or [B, J, D]; None: null slots
        """Slots [1|B, P, D] (joint), or their keys and values, layer by layer (isolated)."""
        if self.corpus_slots:
            return (None, self.context) if self.isolated else (self.context[None], None)
        size, width = self.c["context_size"], self.c["second_stage"]["width"]
        if context is None:
            context = self.sequence_dropout_null_embedding.expand(size, -1)
        context = torch.as_tensor(context).to(self.output_projection[0].weight)
        if self.shipped and context.shape[-2] < size:
            raise ValueError(f"this model needs exactly {size} context vectors, got {context.shape[-2]}")
        context = context[..., :size, :] if self.numerics else context
        context = context if context.ndim == 3 else context[None]
        prompt = self.prompt_projection(context.new_ones(width)).view(1, -1, width)
        slots = torch.cat([context, prompt.expand(context.shape[0], -1, -1)], dim=1)
        if not self.isolated:
            return slots, None
        seen = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
        return None, self.backbone.run(slots, seen, -1 * seen.long())[1]

    def forward(self, input_ids, attention_mask, dataset_embeddings=None, null_dataset_embedding=False, **_):
        c, mask = self.c, attention_mask.bool()
        slots, prefix = self.prepare(None if null_dataset_embedding else dataset_embeddings)
        (batch, length), count = mask.shape, (prefix[0][0] if slots is None else slots).shape[-2]
        x, positions, bias = self.backbone.embed(input_ids, mask), self.backbone.positions(mask), None
        seen = torch.cat([mask.new_ones(batch, count), mask], dim=1)
        if c["slot_bias"] is not None:  # from text to slots
            bias = F.pad(self.slot_bias[..., None, None].expand(-1, -1, length, count), (0, length))
        if slots is not None:  # joint: one sequence
            x, positions = torch.cat([slots.expand(batch, -1, -1), x], dim=1), self.backbone.positions(seen)
            if self.numerics:  # positions count from the first slot on
                positions = positions.masked_fill(positions < c["rotary_start"], -1)
            else:
                positions = (positions - count).clamp(min=-1)
            bias = None if bias is None else F.pad(bias, (0, 0, count, 0))
        x = x + self.backbone.token_type() if self.shipped else x  # to the text for the second time
        hidden = self.backbone.run(x, seen, positions, prefix, bias)[0][:, -length:]
        pooled = mean_pool(hidden, mask)
        return self.output_projection(pooled) + (0 if self.shipped else pooled)


class CdeModel(PreTrainedModel):
    """Both stages, the second alone with the context of a corpus, or a biencoder; the reference's tensor names."""

    config_class = CdeConfig

    def __init__(self, config):
        super().__init__(config)
        c = config.cde_jax["model"]
        if unknown := config.cde_jax["jax_only"]:
            raise ValueError(f"these settings of the model run in cde_jax only: {', '.join(unknown)}")
        if "second_stage" not in c:
            stage = FirstStage(c)
            self.embedder, self.mlp = stage.embedder, stage.mlp
            self.pooling, self.residual = stage.pooling, stage.residual
        else:
            corpus_slots = config.cde_jax.get("corpus_slots", 0)
            self.second_stage_model = SecondStage(c, corpus_slots)
            if not corpus_slots:
                self.first_stage_model = FirstStage(c["first_stage"])
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the weights come from the directory."""

    def forward(self, input_ids, attention_mask, dataset_input_ids=None, dataset_attention_mask=None, **context):
        """Vectors [B, D], not normalised; context as tokens or as `dataset_embeddings`, null slots without any."""
        if not hasattr(self, "second_stage_model"):
            return FirstStage.forward(self, input_ids, attention_mask)
        if dataset_input_ids is not None:
            context["dataset_embeddings"] = self.first_stage_model(dataset_input_ids, dataset_attention_mask)
        return self.second_stage_model(input_ids, attention_mask, **context)


class Transformer(nn.Module):
    """sentence-transformers' module: the first stage, or with `dataset_embeddings` (or a corpus' own) the second."""

    save_in_root = True

    def __init__(self, path):
        super().__init__()
        self.auto_model = CdeModel.from_pretrained(path)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        self.config, self.max_seq_length = self.auto_model.config, self.auto_model.config.max_seq_length

    @classmethod
    def load(cls, path):
        return cls(path)

    def save(self, path, *_, **__):
        shutil.copy(__file__, path)
        self.auto_model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def preprocess(self, inputs, prompt=None, **_):
        texts, length = [(prompt or "") + text for text in inputs], self.max_seq_length
        return self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    tokenize = preprocess

    def forward(self, features, dataset_embeddings=None, **_):
        model, context = self.auto_model, {"dataset_embeddings": dataset_embeddings}
        if dataset_embeddings is None and hasattr(model, "first_stage_model"):
            model = model.first_stage_model
        vectors = model(features["input_ids"], features["attention_mask"], **context)
        return {**features, "sentence_embedding": vectors}

    def get_embedding_dimension(self):
        c = self.config.cde_jax["model"]
        return c.get("output_width") or c.get("second_stage", c.get("encoder"))["width"]

    get_sentence_embedding_dimension = get_embedding_dimension
