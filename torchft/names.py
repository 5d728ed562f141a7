"""Find recipes and configs: by shipped name, by path, or by the name that torchtune had for them.

Both are found by listing folders, torchft/recipes and torchft/configs; there is no list to keep. torchtune's option
names are here, each with what to write instead, so that notes and articles keep working; our earlier and other trainers' too.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from torchft.checks import nearest
from torchft.errors import ConfigError, UserError

RECIPES = Path(__file__).resolve().parent / "recipes"
CONFIGS = Path(__file__).resolve().parent / "configs"
NOT_YAML = (".py", ".jsonl", ".csv", ".parquet", ".txt")  # what is given in place of a config by mistake

# A config's method is the last part of its name: llama3_1/8B_qlora is for every recipe that starts with lora_.
METHODS = {"lora": ("lora", "qlora", "lora_fp8"), "full": ("full",), "dpo": ("dpo",), "kto": ("kto",), "reward": ("reward",)}

RECIPE_ALIASES = {
    "lora_finetune_single_device": "lora_single_device",
    "lora_finetune_distributed": "lora_distributed",
    "full_finetune_single_device": "full_finetune_distributed",  # one recipe, which runs on one process too
    "lora_dpo_single_device": "dpo_distributed",
    "lora_dpo_distributed": "dpo_distributed",
}
FULL_DPO = "full_dpo_distributed"  # torchtune's too, but no alias: with a config for LoRA it would train an adapter

OWN_GROUPS = ("dpo", "kto", "reward")  # each of the options of one recipe alone, which is called after it: dpo_distributed

MOVED_KEYS = {  # what our own options were called before -> now, and what is said of it
    "lora.new_tokens": ("data.new_tokens", "is called data.new_tokens now, for all recipes"),
    "model.offload_activations": ("model.offload", "is model.offload=[activations] now"),
}

_ADAPTER_MODULES = "lora.target_modules, a list of leaf names such as q_proj, down_proj, or all-linear"
_BATCH = "run.micro_batch_size (rows per forward) and run.global_batch_size (rows per optimizer step over all processes)"
OLD_KEYS = {  # torchtune's option -> ours, or why it is not needed
    "model._component_": "remove it: the config.json in model.path decides the architecture",
    "model.lora_attn_modules": _ADAPTER_MODULES,
    "model.apply_lora_to_mlp": _ADAPTER_MODULES,
    "model.apply_lora_to_output": "lora.target_modules with lm_head in it",
    "model.lora_rank": "lora.rank",
    "model.lora_alpha": "lora.alpha",
    "model.lora_dropout": "lora.dropout",
    "model.use_dora": "lora.dora",
    "model.quantize_base": "model.quantize=nf4",
    "tokenizer": "remove it: the tokenizer is read from model.path",
    "tokenizer.max_seq_len": "data.max_seq_len",
    "tokenizer.prompt_template": "data.chat_template",
    "checkpointer": "model.path (what is read) and run.out (where checkpoints and the result go)",
    "checkpointer.checkpoint_dir": "model.path",
    "checkpointer.output_dir": "run.out",
    "checkpointer.adapter_checkpoint": "lora.adapter, a PEFT adapter directory",
    "checkpointer.recipe_checkpoint": "run.resume=auto",
    "output_dir": "run.out",
    "resume_from_checkpoint": "run.resume=auto",
    "save_adapter_weights_only": "remove it: only the adapter is saved; `tune merge` writes a whole model",
    "dataset": "data.train, a file, a hub dataset's name or a list of them",
    "dataset.source": "data.train",
    "dataset.data_files": "data.train",
    "dataset.packed": "data.packing",
    "dataset.split": "data.train with an entry {path: ..., split: ...}",
    "dataset.column_map": "data.train with an entry {path: ..., columns: {instruction: question}}",
    "dataset.conversation_style": "data.train with an entry {path: ..., format: sharegpt}",
    "dataset.train_on_input": "remove it: the assistant's turns are trained, all of them or the last (data.train_on)",
    "dataset_val": "data.valid",
    "run_val_every_n_steps": "run.eval_every",
    "batch_size": _BATCH,
    "batch_size_val": "run.micro_batch_size",
    "gradient_accumulation_steps": _BATCH + "; the accumulation follows from them",
    "max_steps_per_epoch": "run.max_steps, which counts over the whole run",
    "seed": "run.seed",
    "epochs": "run.epochs",
    "shuffle": "remove it: rows are always shuffled, by run.seed",
    "optimizer": "optim.name: adamw, adamw_8bit or adamw_bf16",
    "optimizer.lr": "optim.lr",
    "optimizer.weight_decay": "optim.weight_decay",
    "optimizer.betas": "optim.betas",
    "optimizer.eps": "optim.eps",
    "optimizer.fused": "remove it: AdamW is fused where the device has it",
    "optimizer_in_bwd": "optim.in_backward",
    "lr_scheduler": "optim.schedule: constant, linear or cosine",
    "lr_scheduler.num_warmup_steps": "optim.warmup_steps",
    "loss": "remove it: the loss is cross entropy that never holds the logits, and in dpo_distributed dpo.loss with dpo.beta",
    "clip_grad_norm": "optim.max_grad_norm",
    "compile": "model.compile: auto, on or off",
    "dtype": "model.dtype: bfloat16 or float32",
    "device": "remove it: CUDA is used where there is one, else the CPU",
    "enable_activation_checkpointing": "model.activation_checkpointing=full",
    "enable_activation_offloading": "model.offload=[activations]",
    "ac_mode": "model.activation_checkpointing: none, full, auto or every_<n>",
    "ac_option": "model.activation_checkpointing=every_<n>",
    "metric_logger": "run.trackers=[tensorboard] or [wandb:PROJECT]; a JSONL log is always written to run.out",
    "metric_logger.project": "run.trackers=[wandb:PROJECT]",
    "log_every_n_steps": "run.log_every",
    "log_peak_memory_stats": "remove it: peak memory is always logged",
    "log_level": "remove it: there is one level",
    "profiler": "run.profile_steps",
    "save_every_n_steps": "run.save_every",
    "keep_last_n_checkpoints": "run.keep_last",
}

# Ours -> what Hugging Face's Trainer, Axolotl and LLaMA-Factory call it, where the nearest spelling would be something else.
FOREIGN_NAMES = {
    "model.path": "base_model base_model_config model_name model_name_or_path model_id",
    "model.dtype": "bf16 fp16 fp32 tf32 torch_dtype pure_bf16",
    "model.quantize=nf4": "load_in_4bit quantization_bit quantization_method bnb_4bit_quant_type",
    "model.activation_checkpointing=full": "gradient_checkpointing",
    "model.shard": "fsdp deepspeed",
    "lora.rank": "lora_r peft_lora_r r",
    "lora.target_modules": "lora_target lora_target_modules lora_target_linear",
    "lora.adapter": "lora_model_dir adapter_name_or_path adapter_path",
    "lora.dora": "use_dora peft_use_dora",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "data.train": "datasets dataset_dir dataset_name dataset_path train_file train_dataset train_data data_path",
    "data.valid": "eval_dataset test_datasets validation_file valid_file",
    "data.valid_fraction": "val_set_size val_size test_size",
    "data.max_seq_len": "cutoff_len sequence_len max_length max_seq_length model_max_length block_size",
    "data.packing": "sample_packing neat_packing packed",
    "data.chat_template": "template prompt_template",
    "optim.lr": "learning_rate",
    "optim.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "optim.warmup_steps": "warmup_ratio num_warmup_steps warmup",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.eps": "adam_epsilon",
    "optim.max_grad_norm": "gradient_clipping grad_clip clip_grad",
    "run.out": "output_dir save_dir logging_dir",
    "run.epochs": "num_train_epochs num_epochs n_epochs",
    "run.micro_batch_size": "per_device_train_batch_size per_device_eval_batch_size eval_batch_size train_batch_size",
    "run.global_batch_size": "gradient_accumulation_steps accumulate_grad_batches",
    "run.log_every": "logging_steps",
    "run.save_every": "save_steps saves_per_epoch save_strategy",
    "run.eval_every": "eval_steps evals_per_epoch eval_strategy evaluation_strategy",
    "run.keep_last": "save_total_limit",
    "run.keep_best": "load_best_model_at_end",
    "run.trackers": "report_to wandb use_wandb wandb_project tensorboard use_tensorboard",
}


def recipe_names() -> list[str]:
    """Shipped recipes, sorted: `lora_single_device`, ..."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if not path.stem.startswith("_"))


def config_names() -> list[str]:
    """Shipped configs by family, then size: `llama3_2/1B_lora`, `llama3_2/1B_qlora`, `llama3_2/3B_lora`, ..."""
    names = [str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml")]
    return sorted(names, key=_by_size)


def configs_for(recipe: str) -> list[str]:
    """The shipped configs that a shipped recipe takes, by the method in their names."""
    methods = METHODS.get(recipe.split("_")[0], ())
    ends = tuple(f"{sign}{method}" for method in methods for sign in "_/")
    return [name for name in config_names() if name.endswith(ends)]


def recipe_for(config: str) -> str:
    """The recipe that a config is for, by the method that its name or file name ends in; "" without one."""
    name = _without_torchtune_suffix(config.removesuffix(".yaml").removesuffix(".yml"))
    method = re.split(r"[_/]", name)[-1]
    recipes = [recipe for recipe in reversed(recipe_names()) if method in METHODS.get(recipe.split("_")[0], ())]
    return next(iter(recipes), "")


def forgotten_config(argument: str) -> str:
    """What to write for a config's name or file that stands among the options without `--config`; "" for anything else."""
    config = "=" not in argument and (argument.endswith((".yaml", ".yml")) or argument in config_names())
    return f"write --config {argument}" if config else ""


def header_recipes(config: Path) -> list[str]:
    """The shipped recipes that the commands in a config's comments run; [] of a file that cannot be read."""
    try:
        text = config.read_text(encoding="utf-8", errors="replace")
    except OSError:  # whoever reads its options says so
        return []
    commands = re.findall(r"^# +tune run [^#\n]*?(\w+) --config", text, re.MULTILINE)
    recipes = [RECIPE_ALIASES.get(command, command) for command in commands]
    return [recipe for recipe in recipes if recipe in recipe_names()]


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name, torchtune's name, or path. Raises UserError naming what exists, or what to type."""
    shipped = recipe_names()
    target = RECIPE_ALIASES.get(name, name)
    if target in shipped:
        return RECIPES / f"{target}.py"
    if (config := _without_torchtune_suffix(name)) in config_names():
        raise UserError(f"{name} is a config: tune run {recipe_for(config)} --config {config}")
    if name.endswith((".yaml", ".yml")):
        raise UserError(f"{name} is a config: tune run RECIPE --config {name} (`tune ls` lists the recipes)")
    if name.endswith(".py") or "/" in name:
        if os.path.isfile(name):
            return Path(name)
        raise UserError(f"there is no recipe file {name} (looked in {Path.cwd()})")
    if name == FULL_DPO:
        what = "dpo_distributed with lora.rank=0, as the configs have it that end in _full_dpo"
        raise UserError(f"{name} is torchtune's name for {what}: tune run dpo_distributed --config llama3_1/8B_full_dpo")
    hint = _nearest(name, shipped)
    raise UserError(f"there is no recipe {name!r}, neither a shipped name nor the path of a .py file; {hint}")


def find_config(name: str) -> Path:
    """The file of a config given by name, torchtune's name, or path. Raises ConfigError naming the nearest."""
    shipped = config_names()
    for candidate in (name, _without_torchtune_suffix(name)):
        if candidate in shipped:
            return CONFIGS / f"{candidate}.yaml"
    instead = "give a .yaml file or a config's name from `tune ls`"
    if name in recipe_names():
        raise ConfigError(f"{name} is a recipe, no config; {instead}")
    if os.path.isfile(name):
        if name.endswith(NOT_YAML):
            raise ConfigError(f"{name} is no YAML config; {instead}")
        return Path(name)
    if os.path.isdir(name):
        raise ConfigError(f"{name} is a directory; {instead}")
    bare = _without_torchtune_suffix(name.removesuffix(".yaml"))
    if name.endswith((".yaml", ".yml")) and bare not in shipped:
        raise ConfigError(f"there is no config file {name} (looked in {Path.cwd()})")
    hint = f"did you mean the shipped config {bare}?" if bare in shipped else _nearest(bare, shipped)
    raise ConfigError(f"there is no config {name!r}, neither a file (looked in {Path.cwd()}) nor a shipped name; {hint}")


def find_recipe_or_config(name: str) -> Path:
    """The file of either. The names of shipped recipes have no /, those of configs do. Raises UserError for neither."""
    if "/" in name or name.endswith((".py", ".yaml", ".yml")):
        return find_recipe(name) if name.endswith(".py") else find_config(name)
    if name in [*recipe_names(), *RECIPE_ALIASES, FULL_DPO]:
        return find_recipe(name)
    close = difflib.get_close_matches(name[:60], [*recipe_names(), *config_names()], 2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "`tune ls` lists them"
    raise UserError(f"neither a recipe nor a config is called {name!r}; {hint}")


def old_key_advice(key: str) -> str:
    """What to do about an option that had another name, that only torchtune has, or that names code; "" for any other key."""
    if key in MOVED_KEYS:
        return MOVED_KEYS[key][1]
    group, _, leaf = key.rpartition(".")
    advice = OLD_KEYS.get(key, OLD_KEYS.get(group.partition(".")[0], ""))
    advice = advice if advice.startswith("remove it") or not advice else f"use {advice}"
    if leaf in ("_component_", "_target_") or key.startswith("_") or "._" in key:
        advice = advice or "to use code of your own, edit a copy of the recipe (tune cp)"
        return f"is refused, nothing in a config is imported or executed; {advice}"
    return f"is torchtune's; {advice}" if advice else ""


def group_advice(key: str, groups: Iterable[str]) -> str:
    """Whose the group of an option is that is not among `groups`, those of the recipe that runs; "" for any other key."""
    group = key.partition(".")[0]
    if group in groups or group not in ("lora", *OWN_GROUPS):
        return ""
    owner = "recipes that train adapters, such as lora_single_device" if group == "lora" else f"{group}_distributed alone"
    return f"is not an option here, the group {group} belongs to {owner}: run that, or remove it"


def nearest_option(key: str, options: list[str]) -> str:
    """The option that a key most likely means: as other trainers call it, by its last part, by a similar spelling; "" for none."""
    group, leaf = key.rpartition(".")[0], key.rpartition(".")[2][:40]
    same_leaf = [option for option in options if option.rpartition(".")[2] == leaf]
    by_leaf = {option.rpartition(".")[2]: option for option in options}
    in_group = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == group}
    close = in_group.get(nearest(leaf, list(in_group)), "") if in_group else nearest(key, options)
    close_leaf = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, cutoff=0.7)]
    found = [foreign_option(key, options), *same_leaf, close, *close_leaf]
    return next(filter(None, found), "")


def foreign_option(key: str, options: list[str]) -> str:
    """The option that other trainers call as the last part of `key`, as FOREIGN_NAMES has it; "" where none does."""
    leaf = key.rpartition(".")[2]
    known = [ours for ours, names in FOREIGN_NAMES.items() if leaf in names.split()]
    return next((ours for ours in known if ours.partition("=")[0] in options), "")


def nearest_group(key: str, groups: list[str], options: list[str]) -> str:
    """The group that a mistyped key without a dot most likely means; "" where none is near or an option is called so."""
    if "." in key or foreign_option(key, options) or any(option.rpartition(".")[2] == key for option in options):
        return ""
    return next(iter(difflib.get_close_matches(key[:60], groups, 1, cutoff=0.75)), "")


def _without_torchtune_suffix(name: str) -> str:
    """torchtune named configs after recipes too: llama3_1/8B_lora_single_device; early ones wrote 0_5B for 0.5B."""
    name = re.sub(r"_(single_device|distributed)$", "", name)
    name = re.sub(r"_lora_dpo$", "_dpo", name)
    return re.sub(r"/(\d+)_(\d+B_)", r"/\1.\2", name)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:60], known, 1, cutoff=0.6)
    more = ", ... (tune ls)" if len(known) > 8 else ""
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known[:8])}{more}"


def _by_size(name: str) -> tuple[str, float, str]:
    family, _, rest = name.partition("/")
    size = re.search(r"(\d+(\.\d+)?)B_", rest)
    return family, float(size[1]) if size else 0.0, rest
