"""Contextual text embeddings in PyTorch: the model of the directory that this file lies in.

Needs torch and transformers only. `config.json` describes the model under "cde_jax"; tensor names are those of
cde-small-v1. In two stages: vectors of a sample of the corpus, then texts that read these vectors as context.

    model = SentenceTransformer(DIR, trust_remote_code=True)
    context = model.encode(sample, prompt_name="document")
    vectors = model.encode(texts, prompt_name="query", dataset_embeddings=context)
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel

GATES = {"swiglu": F.silu, "geglu": F.gelu, "glu": torch.sigmoid}


class CdeConfig(PretrainedConfig):
    """`config.json` as it is; the model is described by `cde_jax["model"]`."""

    model_type = "cde_jax"


class Attention(nn.Module):
    """Self-attention that can also read the keys and values of a prefix (the context slots)."""

    def __init__(self, c):
        super().__init__()
        self.c, self.heads = c, c["heads"]
        self.Wqkv = nn.Linear(c["width"], 3 * c["width"], bias=c["attention_bias"])
        self.out_proj = nn.Linear(c["width"], c["width"], bias=c["attention_bias"])

    def forward(self, x, mask, positions, prefix=None):  # x [B, S, D], mask [B|1, H|1, S|1, P+S] added to the logits
        batch, length, _ = x.shape
        q, k, v = self.Wqkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, S, d]
        if self.c["positions"] == "rotary":
            q, k = (self.rotate(y, positions) for y in (q, k))
        own = k, v
        if prefix is not None:
            k, v = (torch.cat([p.expand(batch, -1, -1, -1), y], dim=2) for p, y in zip(prefix, own, strict=True))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(read.transpose(1, 2).reshape(x.shape)), own

    def rotate(self, x, positions):  # positions [B|1, S]; a token at -1 has none and is not turned
        dim = int(x.shape[-1] * self.c["rotary_fraction"])
        inverse = 1.0 / self.c["rotary_base"] ** (torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
        steps = positions.clamp(min=0)[:, None]
        if self.c["rotary_axis"] == "heads":
            heads = torch.arange(self.heads, device=x.device)[:, None]
            steps = torch.where(positions[:, None] < 0, 0, heads)
        angles = steps[..., None].float() * inverse
        cos, sin, turned, rest = angles.cos(), angles.sin(), x[..., :dim], x[..., dim:]
        if self.c["rotary_interleaved"]:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned, rest], dim=-1).to(x.dtype)


class Block(nn.Module):
    """One post-norm layer."""

    def __init__(self, c):
        super().__init__()
        width, inner, (bias_in, bias_out) = c["width"], c["mlp_width"], c["mlp_bias"]
        self.gate = GATES.get(c["activation"])
        self.attn = Attention(c)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=c["norm_epsilon"]) for _ in range(2))
        names = ("fc11", "fc12") if self.gate else ("fc1",)
        layers = {name: nn.Linear(width, inner, bias=bias_in) for name in names}
        self.mlp = nn.ModuleDict({**layers, "fc2": nn.Linear(inner, width, bias=bias_out)})

    def forward(self, x, mask, positions, prefix=None):
        read, keys_values = self.attn(x, mask, positions, prefix)
        x, m = self.norm1(x + read), self.mlp
        hidden = m["fc11"](x) * self.gate(m["fc12"](x)) if self.gate else F.gelu(m["fc1"](x))
        return self.norm2(x + m["fc2"](hidden)), keys_values


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, c):
        super().__init__()
        if c["prenorm"]:
            raise ValueError("pre-norm encoders run in cde_jax only; this module knows post-norm ones")
        self.c = c
        tables = {"word": c["vocab_size"], "token_type": c["token_types"]}
        tables |= {"position": c["max_positions"]} if c["positions"] == "learned" else {}
        self.embeddings = nn.ModuleDict(
            {f"{k}_embeddings": nn.Embedding(n, c["width"]) for k, n in tables.items() if n}
        )
        self.emb_ln = nn.LayerNorm(c["width"], eps=c["norm_epsilon"])
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(c) for _ in range(c["layers"]))})

    def positions(self, mask):
        skip = self.c["positions_skip_padding"]
        return (
            (mask.long().cumsum(1) - 1).clamp(min=0) if skip else torch.arange(mask.shape[1], device=mask.device)[None]
        )

    def embed(self, ids, mask, times_token_type=1):
        tables, x = self.embeddings, self.embeddings["word_embeddings"](ids)
        if "token_type_embeddings" in tables:
            x = x + times_token_type * tables["token_type_embeddings"].weight[0]
        return x + tables["position_embeddings"](self.positions(mask)) if "position_embeddings" in tables else x

    def run(self, x, mask, positions, prefix=None, bias=None):
        """Hidden states and each layer's keys and values; `bias` [layers, H, S|1, P+S] is added to the logits."""
        closed = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
        closed = closed.masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None]  # [B, 1, 1, P+S]
        x, kept = self.emb_ln(x), []
        for i, layer in enumerate(self.encoder["layers"]):
            # The lowest number plus a bias must not become -inf.
            logits = closed if bias is None else (closed + bias[i]).clamp(min=torch.finfo(x.dtype).min)
            x, keys_values = layer(x, logits, positions, prefix[i] if prefix else None)
            kept.append(keys_values)
        return x * mask[:, -x.shape[1] :, None] if self.c["zero_padding"] else x, kept

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.bool()
        return self.run(self.embed(input_ids, mask), mask, self.positions(mask))[0]


def mean_pool(hidden, mask):
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def mlp(inner, outputs, activation, width):
    return nn.Sequential(nn.Linear(width, inner), activation, nn.Linear(inner, outputs))


class FirstStage(nn.Module):
    """A text to one vector, without context."""

    def __init__(self, c):
        super().__init__()
        if c["tokens_per_document"] > 1:
            raise ValueError("several vectors per context document run in cde_jax only; this module gives one")
        self.pooling, width = c["pooling"], c["encoder"]["width"]
        self.embedder = Encoder(c["encoder"])
        self.mlp = mlp(width, c["output_width"] or width, nn.GELU(), width) if c["head"] else nn.Identity()

    def forward(self, input_ids, attention_mask, **_):
        hidden = self.embedder(input_ids, attention_mask)
        return self.mlp(hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, attention_mask))


class SecondStage(nn.Module):
    """Texts that read context vectors; `joint` or `isolated` attention."""

    def __init__(self, c):
        super().__init__()
        if c["pool_slots"] or c["pool_after_token"] is not None:
            raise ValueError("pooling of slots or without instructions runs in cde_jax only")
        self.c, width = c, c["second_stage"]["width"]
        self.backbone = Encoder(c["second_stage"])
        self.prompt_projection = mlp(width, width * c["soft_prompt"], nn.ReLU(), width)
        self.output_projection = mlp(width, width, nn.ReLU(), width)
        if c["null_embedding"]:
            self.sequence_dropout_null_embedding = nn.Parameter(torch.zeros(width))
        if c["slot_bias"] is not None:
            self.slot_bias = nn.Parameter(torch.zeros(c["second_stage"]["layers"], c["second_stage"]["heads"]))

    def slots(self, context):  # [J, D] or [B, J, D] → [1|B, P, D]
        c, size = self.c, self.c["context_size"]
        if c["fixed_context"] == "exactly" and context.shape[-2] < size:
            raise ValueError(f"this model reads exactly {size} context vectors, got {context.shape[-2]}")
        context = context if c["fixed_context"] == "no" else context[..., :size, :]
        context = context if context.ndim == 3 else context[None]
        prompt = self.prompt_projection(context.new_ones(context.shape[-1])).view(1, c["soft_prompt"], -1)
        slots = torch.cat([context, prompt.expand(len(context), -1, -1)], dim=1)
        times = c["slot_token_types"]
        return slots + times * self.backbone.embeddings["token_type_embeddings"].weight[0] if times else slots

    def prefix(self, slots):
        """Keys and values of the slots, layer by layer (isolated attention only)."""
        seen = slots.new_ones(slots.shape[:2], dtype=torch.bool)
        return self.backbone.run(slots, seen, slots.new_full(slots.shape[:2], -1, dtype=torch.long))[1]

    def forward(self, input_ids, attention_mask, dataset_embeddings=None, null_dataset_embedding=False, **_):
        weight = self.output_projection[0].weight
        if dataset_embeddings is None or null_dataset_embedding:
            dataset_embeddings = self.sequence_dropout_null_embedding.expand(self.c["context_size"], -1)
        slots = self.slots(torch.as_tensor(dataset_embeddings).to(weight))
        isolated = self.c["context_attention"] == "isolated"
        return self.read(input_ids, attention_mask, slots, self.prefix(slots) if isolated else None)

    def read(self, input_ids, attention_mask, slots, prefix):
        c, mask = self.c, attention_mask.bool()
        (batch, length), count = mask.shape, slots.shape[1]
        x = self.backbone.embed(input_ids, mask, c["text_token_types"])
        seen = torch.cat([mask.new_ones(batch, count), mask], dim=1)
        positions, bias = self.backbone.positions(mask).expand(batch, -1), None
        if c["slot_bias"] is not None:  # from text to slots
            bias = F.pad(self.slot_bias[..., None, None].expand(-1, -1, length, count), (0, length))
        if prefix is not None:
            hidden, _ = self.backbone.run(x, seen, positions, prefix, bias)
        else:
            of_slots = torch.arange(count, device=mask.device).expand(batch, -1)
            if c["absolute_positions"]:
                positions = torch.cat([of_slots, count + positions], dim=1)
                positions = positions.masked_fill(positions < c["rotary_start"], -1)
            else:
                positions = torch.cat([torch.full_like(of_slots, -1), positions], dim=1)
            bias = bias if bias is None else F.pad(bias, (0, 0, count, 0))
            x = torch.cat([slots.expand(batch, -1, -1), x], dim=1)
            hidden = self.backbone.run(x, seen, positions, bias=bias)[0][:, count:]
        pooled = mean_pool(hidden, mask)
        projected = self.output_projection(pooled)
        return pooled + projected if c["residual_output"] else projected


class CdeModel(PreTrainedModel):
    """Both stages (or a biencoder's one); tensor names are the reference's."""

    config_class = CdeConfig

    def __init__(self, config):
        super().__init__(config)
        c = config.cde_jax["model"]
        if "second_stage" in c:
            self.first_stage_model, self.second_stage_model = FirstStage(c["first_stage"]), SecondStage(c)
        else:
            stage = FirstStage(c)
            self.embedder, self.mlp, self.pooling = stage.embedder, stage.mlp, stage.pooling
        self.post_init()

    def _init_weights(self, module):
        """Nothing: the weights come from the directory."""

    def forward(
        self,
        input_ids,
        attention_mask,
        dataset_input_ids=None,
        dataset_attention_mask=None,
        dataset_embeddings=None,
        **_,
    ):
        """Vectors [B, D], not normalised; context as tokens or as first-stage vectors, null slots without any."""
        if not hasattr(self, "second_stage_model"):
            return FirstStage.forward(self, input_ids, attention_mask)
        if dataset_input_ids is not None:
            dataset_embeddings = self.first_stage_model(dataset_input_ids, dataset_attention_mask)
        return self.second_stage_model(input_ids, attention_mask, dataset_embeddings)


class Transformer(nn.Module):
    """sentence-transformers' module: the first stage, or with `dataset_embeddings` the second."""

    def __init__(self, path):
        super().__init__()
        self.auto_model = AutoModel.from_pretrained(path, trust_remote_code=True)
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        self.config = self.auto_model.config
        self.max_seq_length = self.config.max_seq_length

    @classmethod
    def load(cls, path):
        return cls(path)

    def save(self, path, *_, **__):
        self.auto_model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def preprocess(self, inputs, prompt=None, **_):
        texts = [(prompt or "") + text for text in inputs]
        return self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt")

    tokenize = preprocess

    def forward(self, features, dataset_embeddings=None, **_):
        model, tokens = self.auto_model, (features["input_ids"], features["attention_mask"])
        if hasattr(model, "second_stage_model") and dataset_embeddings is None:
            model = model.first_stage_model
        extra = {} if dataset_embeddings is None else {"dataset_embeddings": dataset_embeddings}
        return {**features, "sentence_embedding": model(*tokens, **extra)}

    def get_embedding_dimension(self):
        model = self.config.cde_jax["model"]
        return model.get("output_width") or model.get("second_stage", model.get("encoder"))["width"]

    get_sentence_embedding_dimension = get_embedding_dimension
