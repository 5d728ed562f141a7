"""The options of every recipe: five groups of typed, defaulted fields.

`torchft.parse.parse` merges a YAML file and dotted `key=value` overrides into these dataclasses; `torchft/checks.py`
holds which values are accepted. A YAML holds only what differs from the defaults below.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torchft.errors import UserError


@dataclass
class ModelConfig:
    """Which weights, in which storage, and how memory is traded for time."""

    path: str = ""  # a Hugging Face model directory, or builtin:tiny_llama
    weights: str = "pretrained"  # pretrained | random (for measuring: needs config.json and a tokenizer, never exported)
    dtype: str = "bfloat16"  # of the frozen base: bfloat16 | float32
    quantize: str = "none"  # frozen linears: none | nf4 (QLoRA: 4 bits) | nf4_int8_head (lm_head in 8 too) | fp8 (fast on Hopper)
    activation_checkpointing: str = "none"  # none | full | every_<n>: every n-th block is recomputed | auto: what does not fit
    offload: list[str] = field(default_factory=list)  # to CPU memory: activations or block_inputs (of recomputed blocks), embeddings, weights
    compile: str = "auto"  # auto (on for CUDA, off on CPU) | on | off; of blocks that are not fused
    kernels: dict[str, str] = field(default_factory=dict)  # to switch one off: {rope: eager}; all names: torchft/checks.py
    shard: str = "auto"  # each weight over how many processes: all | <n> | auto (1 where a frozen base and its adapters fit, else all)


@dataclass
class LoraOptions:
    """The adapter. Ranks and scales as in Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

    rank: int = 16  # 0, in dpo_distributed alone: no adapter, all weights are trained
    alpha: float = 32.0  # the update is scaled by alpha / rank, or alpha / sqrt(rank) with rslora
    dropout: float = 0.0  # on the adapter's input
    rslora: bool = False  # https://arxiv.org/abs/2312.03732
    dora: bool = False  # https://arxiv.org/abs/2402.09353
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # leaf names; all-linear: not lm_head, routers
    modules_to_save: list[str] = field(default_factory=list)  # trained whole beside the adapter: embed_tokens, lm_head
    adapter: str = ""  # a PEFT adapter directory to train further; it decides the fields above


@dataclass
class SourceConfig:
    """One data file or hub dataset. `data.train: file.jsonl` is short for `data.train: [{path: file.jsonl}]`."""

    path: str = ""  # local .json .jsonl .csv .parquet .txt, builtin:..., or a hub dataset as ORG/NAME
    weight: float = 1.0  # how often each row is used per epoch: 2.0 = twice, 0.5 = a random half
    split: str = "train"  # of a hub dataset
    format: str = "auto"  # auto | instruct | messages | sharegpt | text | preference | kto
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the file's, e.g. {instruction: question}


@dataclass
class DataConfig:
    """What is read, how it becomes tokens, and which of them are trained."""

    train: list[SourceConfig] = field(default_factory=list)
    valid: list[SourceConfig] = field(default_factory=list)  # empty: no validation unless valid_fraction is set
    valid_fraction: float = 0.0  # share of the training rows held out instead
    chat_template: str = ""  # "" = the tokenizer's own; chatml | alpaca | a .jinja file
    new_tokens: list[str] = field(default_factory=list)  # added to the tokenizer; beside adapters their rows alone are trained
    train_on: str = "all"  # all assistant turns | last
    max_seq_len: int = 2048  # tokens per row
    packing: bool = True  # several examples per row, kept apart by the attention mask
    truncation: str = "drop"  # drop | right: what happens to examples longer than max_seq_len
    max_bad_rows: float = 0.01  # share of unusable rows above which the run is refused


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    name: str = "adamw"  # adamw (16 bytes a parameter, gradient included) | adamw_8bit (10; C compiler) | adamw_bf16 (8)
    in_backward: bool = False  # update each parameter as soon as its gradient is there, and free it: 4 bytes (bf16: 2) less
    lr: float = 2e-4
    schedule: str = "cosine"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 10
    min_lr_ratio: float = 0.0  # the schedule ends at lr * min_lr_ratio
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # global norm; 0 = no clipping, the norm is still logged


@dataclass
class RunConfig:
    """How long, how often, where to."""

    out: str = "out"  # directory for checkpoints, logs and the result
    seed: int = 0
    epochs: int = 1
    max_steps: int = 0  # optimizer steps; 0 = no limit. The first of epochs and max_steps reached ends the run
    global_batch_size: int = 8  # rows per optimizer step over all processes
    micro_batch_size: int = 1  # upper bound on rows per forward and process
    log_every: int = 1  # optimizer steps, as all of the following
    eval_every: int = 0  # 0 = only at the end
    save_every: int = 0  # 0 = only at the end
    keep_last: int = 2  # checkpoints kept
    keep_best: bool = False  # also keep the one with the lowest validation loss, and export it
    resume: str = "never"  # never | auto (newest checkpoint that verifies, else fresh) | a checkpoint directory
    sample_rows: int = 3  # validation prompts answered and printed at each validation
    exact_match_rows: int = 0  # validation rows answered greedily and scored before and after training
    max_new_tokens: int = 128  # for those answers
    deterministic: bool = False  # torch.use_deterministic_algorithms: bit-exact resume on GPU, slower
    trackers: list[str] = field(default_factory=list)  # beside the log: tensorboard, "wandb:PROJECT"
    profile_steps: int = 0  # torch profiler over this many steps, after two of which CUDA's allocations are recorded


@dataclass
class PreferenceOptions:
    """What is learned from a pair of answers: of dpo_distributed alone. Formulas: torchft/losses.py."""

    loss: str = "sigmoid"  # sigmoid (DPO) | robust | ipo | hinge | apo_zero | apo_down; without a reference: simpo | orpo | cpo
    beta: float = 0.1  # per nat: how strongly the reference holds; tau in IPO, lambda in ORPO
    label_smoothing: float = 0.0  # share of labels taken to be wrong, with sigmoid and robust
    gamma: float = 0.0  # the margin that SimPO asks for, in units of the reward
    sft_weight: float = 0.0  # of the chosen answer's cross entropy per token, added to the loss
    reference: str = "auto"  # with lora.rank=0: precomputed (auto; torchft/reference.py) | copy (a second model, model.dtype)


@dataclass
class KtoOptions:
    """What is learned from single answers that are good or bad: of kto_distributed alone."""

    beta: float = 0.1  # per nat: how strongly the reference holds
    desirable_weight: float = 1.0  # lambda_D; the paper wants lambda_D n_D / (lambda_U n_U) within 1 to 3/2
    undesirable_weight: float = 1.0  # lambda_U


@dataclass
class RewardOptions:
    """What a reward model learns from pairs: of reward_distributed alone."""

    center_weight: float = 0.0  # of (chosen + rejected)^2, which holds the scores near zero; 0.01 is usual


ASSETS = Path(__file__).resolve().parent / "assets"


def resolve_path(text: str) -> Path:
    """The file or directory that a config's path means: `builtin:NAME` is shipped with torchft, `~` is the user's home.

    Raises UserError for a builtin that does not exist.
    """
    if not text.startswith("builtin:"):
        return Path(text).expanduser()
    path = (ASSETS / text.removeprefix("builtin:")).resolve()
    if path == ASSETS or not path.is_relative_to(ASSETS) or not path.exists():
        shipped = sorted(f"builtin:{entry.relative_to(ASSETS)}" for entry in ASSETS.glob("*") if entry.is_dir())
        raise UserError(f"{text} is not shipped with torchft; there are {', '.join(shipped)} and the files in them")
    return path
