"""Behind `tune validate` and `tune data`: what a run would do, without loading a weight.

`validate` reads the config, builds the model on meta and tokenises the data; the first step that fails says why.
`data` prints the report of the data and a few coloured examples. Both take any config of the shipped recipes.
"""

import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from yaml.nodes import MappingNode

from torchft.checks import counted
from torchft.config import (
    DataConfig,
    KtoOptions,
    LoraOptions,
    ModelConfig,
    OptimConfig,
    PreferenceOptions,
    RewardOptions,
    RunConfig,
    resolve_path,
)
from torchft.errors import UserError
from torchft.names import OWN_GROUPS, find_config, find_recipe, header_recipes, recipe_for
from torchft.parse import read_config
from torchft.strict_yaml import compose_file

if TYPE_CHECKING:  # these import torch, which a config with a typo shall not wait for
    import torch

    from torchft.data.chat_template import ChatTemplate
    from torchft.data.dataset import Dataset
    from torchft.data.loader import Loader
    from torchft.data.tokenizer import Tokenizer
    from torchft.modules.transformer import CausalLM

GIB = 2**30
INDENT = " " * 8
NF4_BYTES = 0.5 + 1 / 64 + 2 / (64 * 256)  # per weight: a code, an int8 scale per 64, a bf16 scale of those per 256
DENSE_BYTES = {"bfloat16": 2, "float32": 4}  # per weight, by model.dtype
# Per trained parameter: (value and AdamW's two moments, gradient), by optim.name.
TRAINED_BYTES = {"adamw": (12, 4), "adamw_8bit": (6, 4), "adamw_bf16": (6, 2)}


@dataclass
class WholeOptions:
    """The groups that all recipes share; a field of a recipe's own is not checked here but when the recipe starts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class FullRun(WholeOptions):
    """Those of full_finetune_distributed."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))


@dataclass
class Options(WholeOptions):
    """Those of the recipes that train adapters; with lora.rank=0, in dpo_distributed, there is none."""

    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass
class PreferenceRun(Options):
    """Those of dpo_distributed."""

    dpo: PreferenceOptions = field(default_factory=PreferenceOptions)


@dataclass
class KtoRun(Options):
    """Those of kto_distributed."""

    kto: KtoOptions = field(default_factory=KtoOptions)


@dataclass
class RewardRun(Options):
    """Those of reward_distributed."""

    reward: RewardOptions = field(default_factory=RewardOptions)


@dataclass
class AnyRun(RewardRun):
    """All groups that there are: what is none of them is a mistake whatever the recipe."""

    dpo: PreferenceOptions = field(default_factory=PreferenceOptions)
    kto: KtoOptions = field(default_factory=KtoOptions)


# Recipe: its options, and what it reads, one of torchft.data.layout.KINDS. All others are LoRA's, with "sft".
RUNS = {
    "full_finetune_distributed": (FullRun, "sft"),
    "dpo_distributed": (PreferenceRun, "pairs"),
    "kto_distributed": (KtoRun, "verdicts"),
    "reward_distributed": (RewardRun, "pairs"),
}


def recipe_of(config: str, overrides: list[str]) -> str:
    """The recipe of a config, in this order: by a group of options that only one recipe has; by the command in the file's
    header, which copies keep; by the end of its name; by such a group on the command line; by a group `lora`.

    Raises UserError where nothing tells, or ConfigError if the config has mistakes that no recipe would take.
    """
    file = find_config(config)
    node = compose_file(file)
    groups = [key.value for key, _ in node.value] if isinstance(node, MappingNode) else []
    overridden = [text.partition(".")[0] for text in overrides]
    told = [*_owners(groups), *header_recipes(file), recipe_for(config), *_owners(overridden)]
    told = [recipe for recipe in told if recipe] + ["lora_single_device"] * ("lora" in [*groups, *overridden])
    if not told:
        read_config(AnyRun, config, overrides, paths=False, pairs=False)
        raise UserError(f"{config} does not tell which recipe it is for: add --recipe lora_single_device, or another (tune ls)")
    return told[0]


def _owners(groups: list[str]) -> list[str]:
    return [f"{group}_distributed" for group in groups if group in OWN_GROUPS]


def options_for(config: str, overrides: list[str], recipe: str) -> tuple[str, type[WholeOptions], str]:
    """(recipe, its options, what it reads as in RUNS) of a config.

    `recipe`: a shipped one, or torchtune's name for it; "": see recipe_of.
    """
    recipe = find_recipe(recipe).stem if recipe else recipe_of(config, overrides)
    return recipe, *RUNS.get(recipe, (Options, "sft"))


def validate(config: str, overrides: list[str], recipe: str = "") -> None:
    """Prints what was checked, step by step. Raises ConfigError or UserError for the first step that fails.

    `recipe`: as in options_for.
    """
    recipe, options, kind = options_for(config, overrides, recipe)
    cfg = read_config(options, config, overrides)
    print(f"config  ok: {config}, for {recipe}", flush=True)  # up to here without torch: a typo is found in a moment
    check_machine(cfg)
    tokenizer, template = load_text(cfg)
    model, reports = build(cfg, tokenizer.added_ids)  # a model that cannot be trained is found before minutes of tokenising
    datasets = check_data(cfg, kind, tokenizer, template)
    check_model(cfg, model, reports, tokenizer, *datasets)


def show_data(config: str, overrides: list[str], examples: int, recipe: str = "") -> None:
    """Prints the report of a config's data, and its first `examples` training examples, trained tokens in colour.

    `recipe`: as in options_for.
    """
    from torchft.data.report import render_example, report, wants_color

    _, options, kind = options_for(config, overrides, recipe)
    cfg = read_config(options, config, overrides, training=False)
    tokenizer, template = load_text(cfg)
    loader, valid = load_data(cfg, kind, tokenizer, template)
    print(report(loader.dataset, loader))
    if warning := check_positions(cfg):
        print(warning)
    if valid is not None:
        print("\nheld-out rows, for valid_loss and answers")
        print(report(valid))
    for index in range(min(examples, len(loader.dataset))):
        print("\n" + render_example(loader.dataset, index, tokenizer, color=wants_color(sys.stdout)))


def check_positions(cfg: WholeOptions) -> str:
    """The warning of a run where data.max_seq_len is more than the model has seen, or why nothing can be said of it, or ""."""
    from torchft.fit import long_rows
    from torchft.models import model_config
    from torchft.models import read_config as read_model_config

    try:
        return long_rows(model_config(read_model_config(resolve_path(cfg.model.path))), cfg.data.max_seq_len)
    except ValueError as error:  # of a model that is not supported the data is shown all the same
        return f"not checked: whether data.max_seq_len={cfg.data.max_seq_len} is beyond the model's positions ({error})"


def load_text(cfg: WholeOptions) -> tuple["Tokenizer", "ChatTemplate | None"]:
    """(tokenizer with data.new_tokens, chat template), as a recipe makes them."""
    from torchft.adapter import tokenizer_folder
    from torchft.data.chat_template import load_template
    from torchft.data.tokenizer import load_tokenizer

    adapter = cfg.lora.adapter if isinstance(cfg, Options) else ""
    tokenizer = load_tokenizer(tokenizer_folder(resolve_path(cfg.model.path), adapter))
    return tokenizer, load_template(cfg.data.chat_template, tokenizer, cfg.data.new_tokens)


def load_data(
    cfg: WholeOptions, kind: str, tokenizer: "Tokenizer", template: "ChatTemplate | None"
) -> tuple["Loader", "Dataset | None"]:
    """(loader of the training data, validation data or None), as a recipe makes them."""
    from torchft.data.dataset import build_datasets
    from torchft.data.loader import Loader

    train, valid = build_datasets(cfg.data, tokenizer, template, cfg.run.seed, kind=kind)
    return Loader(train, cfg.data, cfg.run), valid


def check_machine(cfg: WholeOptions) -> None:
    """Finds the checkpoint to continue from, which is said, and the compiler that some options need, as a recipe does."""
    import torch

    from torchft.checkpoint import find_checkpoint
    from torchft.optim import build_optimizer

    find_checkpoint(cfg.run.out, cfg.run.resume, asdict(cfg))
    if cfg.optim.name == "adamw_8bit":
        build_optimizer({"any": torch.nn.Parameter(torch.zeros(1, device=_device()))}, cfg.optim)


def check_data(
    cfg: WholeOptions, kind: str, tokenizer: "Tokenizer", template: "ChatTemplate | None"
) -> tuple["Dataset", "Dataset | None"]:
    """Tokenises all data and prints what the run would read. Returns (training data, validation data)."""
    from torchft.data.report import summary

    loader, valid = load_data(cfg, kind, tokenizer, template)
    held_out = 0 if valid is None else len(valid)
    print(f"data    ok: {counted(len(loader.dataset), 'example')}, {held_out:,} held out")
    print(textwrap.indent(summary(loader, valid), INDENT), flush=True)
    return loader.dataset, valid


def check_model(
    cfg: WholeOptions, model: "CausalLM", reports: list[str], tokenizer: "Tokenizer", *datasets: "Dataset | None"
) -> None:
    """Prints the parameters of a model on meta, what is trained, and the memory and disk that they take.

    Raises UserError if the model has no row for an id of the data, or there is too little disk.
    """
    from torchft.fit import check_ids, long_rows
    from torchft.modules.host_embedding import host_tables
    from torchft.modules.lora import trainable_parameters

    check_ids(model.config, tokenizer, *datasets)
    trained = sum(param.numel() for param in trainable_parameters(model).values())
    total = sum(param.numel() for param in model.parameters())
    print(f"model   ok: {total:,} parameters, {trained:,} of them trained")
    if cfg.model.activation_checkpointing == "auto":
        reports.append("model.activation_checkpointing=auto: on a GPU, two steps show how many blocks must be recomputed")
    if cfg.model.shard != "auto":
        processes = f", on a number of processes that {cfg.model.shard} divides" if cfg.model.shard.isdecimal() else ""
        reports.append(f"model.shard={cfg.model.shard}: for recipes on several processes alone{processes}")
    if warning := long_rows(model.config, cfg.data.max_seq_len):
        reports.append(warning)
    for line in reports:
        print(textwrap.indent(line, INDENT))
    copied = isinstance(cfg, PreferenceRun) and cfg.dpo.reference == "copy"  # as torchft/reference.py loads it
    copy_bytes = total * DENSE_BYTES[cfg.model.dtype] if copied else 0
    frozen = size(frozen_bytes(model, cfg.model.dtype) + copy_bytes)
    what = "the frozen copy" if copied else "frozen weights"
    saved_bytes, gradient_bytes = TRAINED_BYTES[cfg.optim.name]
    trained_size = size(trained * (saved_bytes + gradient_bytes * (not cfg.optim.in_backward)))
    in_cpu_memory = sum(table.numel() for table in host_tables(model)) * DENSE_BYTES[cfg.model.dtype]
    also = f" (and {size(in_cpu_memory)} of CPU memory)" * bool(in_cpu_memory)
    if "weights" in cfg.model.offload:
        print(textwrap.indent(offloaded_memory(model, cfg.model.dtype), INDENT))
    else:
        print(f"{INDENT}memory: {frozen}{also} for {what}, {trained_size} for what is trained; activations come on top")
    # beyond keep_last: the checkpoint being written, and the best one
    check_disk(Path(cfg.run.out), trained * saved_bytes * (cfg.run.keep_last + 2))


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(cfg: WholeOptions, new_ids: range) -> tuple["CausalLM", list[str]]:
    """The model of a config on meta, with its adapters and storage types, and what was done to it, in lines.

    Raises UserError for what cannot be trained, or compiled, as the config wants.
    """
    from torchft.device import compile_blocks

    try:
        model, reports = _build(cfg, new_ids)
        compile_blocks(model, cfg.model.compile, _device(), reports.append)
    except UserError:
        raise
    except ValueError as error:  # torchft.models and torchft.modules do not know UserError
        raise UserError(str(error)) from None
    return model, reports


def _build(cfg: WholeOptions, new_ids: range) -> tuple["CausalLM", list[str]]:
    import torch

    from torchft.adapter import add_adapter
    from torchft.models import build_model, build_reward_model
    from torchft.models import read_config as read_model_config
    from torchft.modules.vocab import grow_vocab
    from torchft.storage import store_frozen

    with torch.device("meta"):
        make = build_reward_model if isinstance(cfg, RewardRun) else build_model
        model = make(read_model_config(resolve_path(cfg.model.path)))
    reports = []
    if balance := model.model.balance:
        reports.append(f"the router's auxiliary loss is trained, times {balance.coef:g} (config.json: output_router_logits)")
    if isinstance(cfg, Options) and cfg.lora.rank:
        reports.append(str(add_adapter(model, cfg.lora, new_ids)[1]))
    else:
        grow_vocab(model, new_ids)
    if isinstance(cfg, RewardRun):
        model.score.requires_grad_(True)
    if new_ids:
        rows = f"{model.config.vocab_size:,} rows"
        reports.append(f"{counted(len(new_ids), 'token')} added: embed_tokens and lm_head have {rows}")
    return model, reports + store_frozen(model, cfg.model.quantize, cfg.model.offload)


def frozen_bytes(model: "CausalLM", dtype: str) -> float:
    """Bytes that the frozen weights take on the device: NF4 in 4 bits, FP8 and int8 in 8, the others in `dtype`; with their
    scales. An embedding in CPU memory takes none.

    Where nothing is recomputed, fused FP8 blocks keep each weight's transpose too, see torchft/fused_fp8.py; `auto` counts it.
    """
    from torchft.modules.fp8 import is_fp8
    from torchft.modules.host_embedding import frozen_on_device
    from torchft.modules.int8_head import is_int8
    from torchft.modules.nf4 import NF4Tensor

    dense = DENSE_BYTES[dtype]

    def each(param: "torch.Tensor") -> float:
        if isinstance(param, NF4Tensor):
            return NF4_BYTES
        return 1 + 4 / param.shape[1] if is_fp8(param) or is_int8(param) else dense  # a fp32 scale per row

    return sum(param.numel() * each(param) for param in frozen_on_device(model))


def offloaded_memory(model: "CausalLM", dtype: str) -> str:
    """What model.offload=[weights] takes on the device and on the host, and how much travels between them, in lines.

    The device holds tables and two blocks (one is on its way) in `dtype`, and their gradients; of the larger of these the fp32
    values too, as they come from the host, or as sums of gradients that go there.
    """
    from torchft.model_dir import available_memory

    width = DENSE_BYTES[dtype]
    total = sum(param.numel() for param in model.parameters())
    blocks = [sum(param.numel() for param in block.parameters()) for block in model.model.layers]
    tables, two = total - sum(blocks), 2 * max(blocks)
    on_device = 2 * width * (tables + two) + 8 * max(tables, two)
    free = available_memory()
    return (
        f"memory: on each device about {size(on_device)} for what is gathered; activations come on top\n"
        f"        in CPU memory {size(16 * total)} over all processes, half of it pinned; a checkpoint's copy, if it fits, is "
        f"{size(12 * total)} more (free on this machine: {size(free)})\n"
        f"        per forward and backward {size(12 * total - 4 * tables)} travel between them, over all processes"
    )


def check_disk(out: Path, needed: int) -> None:
    """Raises UserError if fewer than `needed` bytes are free where `out` will be."""
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"run.out: its checkpoints take {size(needed)}, {size(free)} are free at {existing}")
    print(f"disk    ok: {size(needed)} for checkpoints, {size(free)} are free at {existing}")


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"
