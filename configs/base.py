"""Every key of a run, declared and commented once. The other configs override.

The values here are those of the paper's large setting where it has one (arXiv 2410.02525, section 5 and appendix).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The defaults. `variant` is a comma-separated choice, e.g. `joint,random`; see `apply_variant`."""
    c = ConfigDict()
    c.seed = 0  # the one seed of data order, clusters, parameters, context draws and dropout

    c.data = ConfigDict()
    # "docstrings" of installed packages; "jsonl" files of pairs; "tfds": published collections in their own formats;
    # "huggingface": data sets or Parquet files by name or path.
    c.data.source = "docstrings"
    c.data.paths = ()  # jsonl: files or folders of {"query", "document", "domain"?, "negatives"?} lines, plain or .gz
    c.data.collections = ()  # tfds: names from the table in data/sources/collections.py; `paths` is their one folder
    c.data.columns = ()  # huggingface: columns under other names, ("query=question", "document=answer")
    c.data.packages = "core"  # docstrings: of our "core" dependencies (repeatable), or of all "installed" packages
    c.data.standard_library = False  # docstrings: read Python's own too (they differ between Python versions)
    c.data.held_out = ()  # docstrings: packages kept out of training as evaluation sets
    c.data.evaluation = ()  # folders of evaluation sets in BEIR form
    c.data.tokenizer = "wordpiece"  # "wordpiece" trained on the pairs, or a pretrained one by name or path
    c.data.vocab_size = 8192  # tokens of a trained WordPiece
    c.data.query_prefix = "search_query: "  # put before every query
    c.data.document_prefix = "search_document: "  # put before every document, context documents too
    c.data.query_length = 512  # tokens kept of a query, [CLS] and [SEP] included
    c.data.document_length = 512  # tokens kept of a document

    c.batching = ConfigDict()
    c.batching.surrogate = "lsa"  # model that places pairs: "lsa", "sentence-transformers:NAME", "checkpoint:DIR"
    c.batching.surrogate_prompts = ()  # what it wants before (queries, documents); (): what is saved with the model
    c.batching.filter_surrogate = ""  # model that finds false and hard negatives; "": the same
    c.batching.filter_prompts = ()  # the same for that model; nomic-embed: ("search_query: ", "search_document: ")
    c.batching.surrogate_width = 128  # dimensions of the LSA vectors
    c.batching.method = "clustered"  # batches from "clustered" neighbourhoods, or "random" within a domain
    c.batching.batch_size = 512  # B, queries of a plan batch: the unit of contrast
    c.batching.cluster_size = 512  # pairs of a cluster, on average
    c.batching.cluster_dimensions = 0  # of the vectors that are clustered, reduced by SVD; 0: all
    c.batching.cluster_rows = 2**20  # pairs of a domain that clusters are trained on; the others are assigned to them
    c.batching.iterations = 100  # of k-means, at most
    c.batching.tries = 3  # k-means from several seeds; the best is kept
    c.batching.packing = "tsp"  # clusters follow each other at "random", or by a greedy tour to the nearest ("tsp")
    c.batching.epochs = 3  # arrangements of all pairs in the plan, each different
    c.batching.domain_weights = ()  # ("NAME=0.5",): half of that domain's batches in an epoch; 2: each row twice
    c.batching.hard_negatives = 0  # K per query, from the data's own negatives, then from mined ones, then at random
    c.batching.mine_first = 0  # mined: documents of these ranks among the query's nearest in its domain, from 1; …
    c.batching.mine_last = 0  # … to this one; 0: none are mined
    c.batching.mine_margin = 0.05  # … and only where f(q, d′) ≤ f(q, d) − margin
    # ε of the false-negative filter (paper eq. 4) on the surrogate's cosine: documents at least this much closer to
    # the query than its own document are no negatives. None: only equal texts are masked.
    c.batching.filter_margin = 0.0
    c.batching.context_source = "batch"  # of context documents: the plan batch (paper) or its "domain"
    c.batching.threads = 4  # that read batches
    c.batching.workers = 0  # processes that read batches instead of threads; 0: none
    c.batching.prefetch = 8  # batches ready ahead

    c.model = ConfigDict()
    c.model.kind = "contextual"  # "contextual" (two stages), or a plain "biencoder"
    c.model.context_attention = "isolated"  # "isolated": slots are computed once per context; "joint": as the paper
    c.model.context_size = 512  # J context documents
    c.model.backbone = "nomic"  # "nomic": rotary positions, SwiGLU, no biases; "bert"
    c.model.vocab_size = 0  # rows of the token embeddings; 0: as many as the tokenizer has
    c.model.width = 768  # D
    c.model.layers = 12  # of the second stage (and of a biencoder)
    c.model.first_stage_layers = 0  # of the first stage; 0: as many as the second
    c.model.heads = 12
    c.model.mlp_width = 3072  # hidden width of the MLP
    c.model.max_positions = 2048  # longest text
    # Of a biencoder: an MLP with a residual on its vector, as a contextual model's second stage always has. Without it
    # the export is a plain encoder, which needs no code of ours.
    c.model.head = False
    c.model.soft_prompt = 8  # learned tokens between slots and text; 0: none
    # First value of a learned bias per layer and head from text to slots: training starts as a biencoder and opens
    # to context as it earns something. None: no such bias (the paper).
    c.model.slot_bias = -5.0
    c.model.dtype = "auto"  # of the computation: bfloat16 on accelerators and float32 on CPU, or either by name
    # What runs attention: "xla"; "blocks", a few texts at a time (CPU); "cudnn", fused (NVIDIA GPUs in bfloat16;
    # written from its documentation, not yet run there); or "auto": "blocks" on CPU, else "xla".
    c.model.attention = "auto"
    # What each layer computes again in the backward pass: "none"; "full", everything: less memory, about a third more
    # time; "dots", all but products with weights and attention; "auto", by the platform.
    c.model.remat = "auto"
    c.model.init = ConfigDict()
    c.model.init.first_stage = ""  # pretrained encoder (name or path) the first stage starts from; "": random
    c.model.init.second_stage = ""  # … the second stage, or the biencoder
    c.model.init.layers = 0  # only its first layers; 0: all

    c.train = ConfigDict()
    c.train.steps = 0  # 0: once through the plan
    c.train.devices = 0  # how many share a step; 0: all there are
    c.train.batches_per_step = 1  # G plan batches per step, shared by the devices
    c.train.learning_rate = 2e-5  # peak, of AdamW
    c.train.first_stage_rate = 1.0  # the first stage's learning rate as a share of it; 0: the first stage is frozen
    c.train.warmup_steps = 1000  # linear, then linear decay to zero
    c.train.weight_decay = 0.01  # of matrices
    c.train.clip_norm = 1.0  # global norm of the gradient
    c.train.temperature = 0.02  # τ
    c.train.sequence_dropout = 0.005  # p that a context document is replaced by the null embedding
    c.train.share_negatives = False  # contrast across all plan batches of a step instead of within each
    # Padded lengths that texts run at, chosen to fit the plan; 1: the longest only. With more, queries and documents
    # are sorted by length into common chunks, as many tokens each as `document_chunk` texts of the longest length
    # (0: a fitting number, 8192 on accelerators), recomputed in the backward pass. Each length takes time to compile.
    c.train.text_lengths = 12
    # Texts encoded at once, recomputed in the backward pass; 0: all, nothing recomputed; -1: as many as the device's
    # memory holds, by the compiler's count (`memory_gib`, or 0.9 of what the device says it has; a CPU does not say).
    c.train.query_chunk = 0
    c.train.document_chunk = 0
    c.train.context_chunk = 0
    c.train.memory_gib = 0.0  # that a step may need, for chunks of -1; 0: what the device has
    c.train.peak_tflops = 0.0  # of a device, for the utilisation in metrics.jsonl; 0: its maker's number, if known
    c.train.profile_steps = 0  # so many steps are traced by jax.profiler, from the 4th of a run on, into profile/
    c.train.log_every = 10  # steps between lines of metrics.jsonl
    c.train.checkpoint_every = 500  # steps; 0: only at the end
    c.train.evaluate_every = 0  # steps between scores on the development set; 0: only at the end

    c.evaluate = ConfigDict()
    # Evaluation set whose score picks the best checkpoint and which is not reported; "": the newest is the best.
    c.evaluate.development = ""
    c.evaluate.checkpoint = "best"  # "best" or "newest" is evaluated and exported
    c.evaluate.cutoff = 10  # k of NDCG@k
    c.evaluate.baselines = True  # BM25 and the LSA surrogate beside the model
    return apply_variant(c, variant)


def apply_variant(c: ConfigDict, variant: str) -> ConfigDict:
    """Choose the model (biencoder, contextual = the paper's joint attention, isolated) and the batches."""
    for name in filter(None, variant.split(",")):
        if name == "biencoder":
            c.model.kind = "biencoder"
        elif name in ("contextual", "joint", "isolated"):
            c.model.kind = "contextual"
            c.model.context_attention = "isolated" if name == "isolated" else "joint"
        elif name in ("random", "clustered"):
            c.batching.method = name
        else:
            known = "biencoder, contextual (also: joint), isolated; random, clustered"
            raise ValueError(f"unknown variant {name!r}: known are {known}, joined by commas, e.g. :isolated,clustered")
    return c
