"""Which option values are accepted: choices, ranges, incompatible pairs, files that must exist.

Every function takes `values`, dotted option names to values of the right type, looks only at the options that are in
it (a recipe need not have every group), and returns all problems at once. Nothing is opened or imported.
"""

import contextlib
import difflib
import os
import re
from pathlib import Path
from typing import Any

from torchft.config import LoraOptions, resolve_path
from torchft.errors import UserError

LOCAL_DATA = (".json", ".jsonl", ".csv", ".parquet", ".txt")  # any other data path is a hub dataset's name

CHOICES = {
    "model.weights": ("pretrained", "random"),
    "model.dtype": ("bfloat16", "float32"),
    "model.quantize": ("none", "nf4", "nf4_int8_head", "fp8"),
    "model.compile": ("auto", "on", "off"),
    "data.train_on": ("all", "last"),
    "data.truncation": ("drop", "right"),
    "optim.name": ("adamw", "adamw_8bit", "adamw_bf16"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "dpo.loss": ("sigmoid", "robust", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "orpo", "cpo"),
    "dpo.reference": ("auto", "precomputed", "copy"),
}
KERNELS = ("lora", "rms_norm", "rope", "swiglu", "nf4", "fp8", "cross_entropy", "embedding")  # lora: the folded products
SWITCHES = (*KERNELS, "graph", "peers")  # of model.kernels; see torchft/fuse.py, step_graph.py and divided_blocks.py
OFFLOADED = ("activations", "block_inputs", "embeddings", "weights")
RESULTS = ("adapter", "model", "reward_model")  # in run.out, beside torchft/run_dir.py's other names
# What an adapter that is trained further has decided already.
LORA_DEFAULTS = {f"lora.{name}": value for name, value in vars(LoraOptions()).items() if name != "adapter"}
SOURCE_FORMATS = ("auto", "instruct", "messages", "sharegpt", "text", "preference", "kto")

# Both ends are accepted. The upper ends are far beyond use: they catch a slipped decimal point and unit mix-ups.
RANGES = {
    "lora.rank": (0, 65_536),
    "lora.alpha": (1e-6, 1e6),
    "lora.dropout": (0.0, 0.99),
    "data.valid_fraction": (0.0, 0.9),
    "data.max_seq_len": (2, 16_777_216),
    "data.max_bad_rows": (0.0, 1.0),
    "optim.lr": (1e-12, 10.0),
    "optim.warmup_steps": (0, 10**9),
    "optim.min_lr_ratio": (0.0, 1.0),
    "optim.weight_decay": (0.0, 10.0),
    "optim.eps": (1e-30, 1.0),
    "optim.max_grad_norm": (0.0, 1e6),
    "run.seed": (0, 2**63 - 1),
    "run.epochs": (1, 10**6),
    "run.max_steps": (0, 10**9),
    "run.global_batch_size": (1, 10**6),
    "run.micro_batch_size": (1, 10**6),
    "run.log_every": (1, 10**9),
    "run.eval_every": (0, 10**9),
    "run.save_every": (0, 10**9),
    "run.keep_last": (1, 10**6),
    "run.sample_rows": (0, 1000),
    "run.exact_match_rows": (0, 10**6),
    "run.max_new_tokens": (1, 10**6),
    "run.profile_steps": (0, 1000),
    "dpo.beta": (1e-6, 1e3),
    "dpo.label_smoothing": (0.0, 0.49),
    "dpo.gamma": (0.0, 1e3),
    "dpo.sft_weight": (0.0, 1e3),
    "kto.beta": (1e-6, 1e3),
    "kto.desirable_weight": (1e-6, 1e6),
    "kto.undesirable_weight": (1e-6, 1e6),
    "reward.center_weight": (0.0, 1e3),
}

Problems = list[tuple[str, str]]  # (option, what is wrong with it and what to do)


def check_options(values: dict[str, Any]) -> Problems:
    """Options whose value alone is impossible. `values` maps dotted option names to values of the right type."""
    problems: Problems = []
    for key, choices in CHOICES.items():
        if key in values and values[key] not in choices:
            problems.append((key, f"is {show(values[key])}; the choices are {', '.join(choices)}"))
    for key, (low, high) in RANGES.items():
        if key in values and not low <= values[key] <= high:  # also true of NaN
            problems.append((key, f"is {show(values[key])}; accepted are {low} to {high}"))
    for check in (_check_model, _check_lora, _check_data, _check_optim, _check_trackers):
        problems += check(values)
    if values.get("run.out") == "":
        problems.append(("run.out", "is empty; name a directory for checkpoints, logs and the result"))
    return problems


def _check_model(values: dict[str, Any]) -> Problems:
    problems: Problems = []
    mode = values.get("model.activation_checkpointing", "none")
    if mode not in ("none", "full", "auto") and not re.fullmatch(r"every_[1-9][0-9]{0,3}", mode):
        problems.append(
            ("model.activation_checkpointing", f"is {show(mode)}; write none, full, auto or every_<n>, such as every_2")
        )
    shard = values.get("model.shard", "auto")
    if shard not in ("auto", "all") and not re.fullmatch(r"[1-9][0-9]{0,5}", shard):
        problems.append(("model.shard", f"is {show(shard)}; write auto, all or a number of processes, such as 8"))
    for name in set(values.get("model.offload", [])) - set(OFFLOADED):
        problems.append(("model.offload", f"holds {show(name)}; what can be kept in CPU memory is {', '.join(OFFLOADED)}"))
    for name, value in values.get("model.kernels", {}).items():
        if name not in SWITCHES or value not in ("triton", "eager"):
            known = f"write one of {', '.join(SWITCHES)} with eager or triton, such as {{rope: eager}}"
            problems.append(("model.kernels", f"holds {show_key(name)}: {show_key(value)}; {known}"))
    if values.get("model.path") == "":
        problems.append(
            (
                "model.path",
                "is empty; name a Hugging Face model directory, as `tune download` makes it, or builtin:tiny_llama",
            )
        )
    return problems


def _check_lora(values: dict[str, Any]) -> Problems:
    problems: Problems = []
    targets = values.get("lora.target_modules")
    if targets == []:
        problems.append(("lora.target_modules", "is empty; list leaf names such as q_proj, or all-linear"))
    elif targets and "all-linear" in targets and len(targets) > 1:
        problems.append(("lora.target_modules", "mixes all-linear (every linear but lm_head) with names; keep one"))
    for name in set(values.get("lora.modules_to_save", [])) - {"", "embed_tokens", "lm_head"}:
        problems.append(
            ("lora.modules_to_save", f"holds {show(name)}; only embed_tokens and lm_head are trained whole")
        )
    for key in ("lora.target_modules", "lora.modules_to_save"):
        problems += _check_names(key, values.get(key, []))
    return problems


def _check_names(key: str, names: list[str]) -> Problems:
    """A list of names: none empty, none twice."""
    empty: Problems = [(key, "holds an empty name; remove it")] if "" in names else []
    return empty + [(key, f"names {show(name)} twice") for name in sorted(set(names)) if names.count(name) > 1]


def _check_data(values: dict[str, Any]) -> Problems:
    problems = _check_names("data.new_tokens", values.get("data.new_tokens", []))
    for group in ("data.train", "data.valid"):
        for i, source in enumerate(values.get(group, [])):
            key = f"{group}[{i}]"
            if source.path == "":
                problems.append(
                    (f"{key}.path", "is empty; name a .json, .jsonl, .csv, .parquet or .txt file or a hub dataset")
                )
            if source.format not in SOURCE_FORMATS:
                problems.append(
                    (f"{key}.format", f"is {show(source.format)}; the choices are {', '.join(SOURCE_FORMATS)}")
                )
            if not 0.0 < source.weight <= 1000.0:
                problems.append((f"{key}.weight", f"is {source.weight}; accepted are numbers above 0 and up to 1000"))
            if group == "data.valid" and source.weight != 1.0:
                problems.append((f"{key}.weight", "must stay 1.0: each validation row counts once"))
    template = values.get("data.chat_template", "")
    if template not in ("", "chatml", "alpaca") and not template.endswith(".jinja"):
        problems.append(
            ("data.chat_template", f"is {show(template)}; write chatml, alpaca or the path of a .jinja file")
        )
    return problems


def _check_optim(values: dict[str, Any]) -> Problems:
    betas = values.get("optim.betas")
    if betas is not None and not (len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)):
        return [
            (
                "optim.betas",
                f"is {show(betas)}; write two numbers from 0 up to but not including 1, such as [0.9, 0.999]",
            )
        ]
    return []


def _check_trackers(values: dict[str, Any]) -> Problems:
    names = values.get("run.trackers", [])
    wrong = [name for name in names if name != "tensorboard" and not re.fullmatch(r"wandb:[^\s/]+", name)]
    kinds = [name.partition(":")[0] for name in names]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    return [
        *[("run.trackers", f"holds {show(name)}; write tensorboard or wandb:PROJECT") for name in wrong],
        *[("run.trackers", f"has {show(kind)} twice; keep one") for kind in twice],
    ]


def check_pairs(values: dict[str, Any]) -> Problems:
    """Options that are fine alone but not together: each would otherwise be ignored in silence."""
    validation = bool(values.get("data.valid")) or values.get("data.valid_fraction", 0.0) > 0.0
    need_validation = "needs held-out rows; set data.valid or data.valid_fraction, or"
    clashing = sorted(set(values.get("lora.target_modules", [])) & set(values.get("lora.modules_to_save", [])))
    rules = [
        (not values.get("lora.rank") and values.get("model.quantize", "none") != "none", "model.quantize",
         "stores weights that are not trained, and here all are; set model.quantize=none, or train an adapter (lora.rank)"
         if "lora.rank" in values else
         "stores weights that are not trained, and this recipe trains them all; set model.quantize=none, or use a lora recipe"),
        (values.get("data.train") == [], "data.train", "is empty; name a file: data.train=rows.jsonl"),
        (values.get("data.valid") and values.get("data.valid_fraction", 0.0) > 0.0, "data.valid_fraction",
         "and data.valid both give held-out rows; keep one of them"),
        (values.get("run.keep_best") and not validation, "run.keep_best", f"{need_validation} run.keep_best=false"),
        (values.get("run.exact_match_rows") and not validation, "run.exact_match_rows",
         f"{need_validation} run.exact_match_rows=0"),
        (values.get("run.eval_every") and not validation, "run.eval_every", f"{need_validation} run.eval_every=0"),
        *_activation_rules(values),
        *_frozen_ends_rules(values),
        (bool(values.get("run.deterministic")) and values.get("model.activation_checkpointing") == "auto",
         "model.activation_checkpointing", "is auto, which goes by the memory that is free, and run.deterministic=true wants the same "
         "bits again: use full, every_<n> or none"),
        (values.get("optim.schedule") == "constant" and values.get("optim.min_lr_ratio", 0.0) > 0.0,
         "optim.min_lr_ratio", "has no effect with optim.schedule=constant; use linear or cosine, or remove it"),
        *_in_backward_rules(values),
        *_weights_rules(values),
        (values.get("optim.name") == "adamw_bf16" and values.get("model.dtype", "bfloat16") != "bfloat16", "optim.name",
         "is adamw_bf16, which keeps weights in bf16: set model.dtype=bfloat16, or optim.name=adamw"),
        (values.get("optim.name") == "adamw_bf16" and bool(values.get("lora.rank")), "optim.name",
         "is adamw_bf16, for models that are trained whole in bf16, and adapters are kept in fp32: use adamw or adamw_8bit"),
        (bool(values.get("data.new_tokens")) and len(set(values.get("lora.modules_to_save", []))) == 1,
         "lora.modules_to_save", "must name both embed_tokens and lm_head beside data.new_tokens, whose rows are in both; "
         "or leave it empty to train only those rows"),
        *[(bool(values.get("lora.adapter")) and key in values and values[key] != default, key,
           "has no effect beside lora.adapter, which decides it; remove one of them")
          for key, default in LORA_DEFAULTS.items()],
        (bool(values.get("lora.adapter")) and bool(values.get("data.new_tokens")), "data.new_tokens",
         "has no effect beside lora.adapter, which has a vocabulary of its own; remove one of them"),
        (bool(clashing), "lora.modules_to_save",
         f"and lora.target_modules both name {', '.join(clashing)}; keep one of them"),
        *_whole_rules(values),
        *_preference_rules(values),
    ]  # fmt: skip
    return [(key, message) for broken, key, message in rules if broken]


def _frozen_ends_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """What is kept as only a frozen weight can be, though something trains it."""
    in_memory = "embeddings" in values.get("model.offload", [])
    in_8_bits = values.get("model.quantize") == "nf4_int8_head" and values.get("lora.rank")  # without it: refused above
    rules = []
    for name, key, value, chosen in (("embed_tokens", "model.offload", "holds embeddings", in_memory),
                                     ("lm_head", "model.quantize", "is nf4_int8_head", in_8_bits)):  # fmt: skip
        who = "" if values.get("lora.rank") else "lora.rank=0" if "lora.rank" in values else "this recipe"
        who = "data.new_tokens" if values.get("data.new_tokens") else who
        who = "lora.modules_to_save" if name in values.get("lora.modules_to_save", []) else who
        fix = "take it out" if who == "this recipe" else "remove one of them"
        rules.append((bool(chosen and who), key, f"{value}, for a frozen {name}, and {who} trains it; {fix}"))
    return rules


def _activation_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """Of what recomputed blocks keep in CPU memory."""
    kept = [name for name in ("activations", "block_inputs") if name in values.get("model.offload", [])]
    recomputed = values.get("model.activation_checkpointing") != "none"
    return [
        (bool(kept) and not recomputed, "model.offload", f"holds {' and '.join(kept)}, which moves what activation checkpointing "
         "keeps; set model.activation_checkpointing=full too"),
        (len(kept) == 2, "model.offload", "holds activations and block_inputs; with activations alone most of what a fused block "
         "computes travels, with block_inputs alone its input: keep one of them"),
    ]  # fmt: skip


def _in_backward_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """What cannot be where each parameter is updated, and its gradient freed, in the one backward of a step."""
    if not values.get("optim.in_backward"):
        return []
    accumulated = values.get("run.micro_batch_size", 1) < values.get("run.global_batch_size", 1)
    clashes = {
        "optim.max_grad_norm": (values.get("optim.max_grad_norm", 0.0) > 0,
                                "the norm to clip by is known only after all updates; set optim.max_grad_norm=0"),
        "run.micro_batch_size": (accumulated, "a gradient that is accumulated must be kept; set run.micro_batch_size to "
                                 "run.global_batch_size"),
        "model.offload": ("weights" in values.get("model.offload", []), "gradients leave the device by themselves then, and "
                          "updates on the CPU would hold backward up; set optim.in_backward=false"),
        "optim.name": (values.get("optim.name") == "adamw_8bit", "adamw_8bit updates all parameters at once; use adamw or "
                       "adamw_bf16"),
        "lora.rank": (bool(values.get("lora.rank")), "adapters' gradients are small; set optim.in_backward=false"),
    }  # fmt: skip
    return [(broken, "optim.in_backward", f"and {key} cannot go together: {why}") for key, (broken, why) in clashes.items()]


def _whole_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """lora.rank=0: all weights are trained, where the recipe can do that, and there is no adapter to describe."""
    if values.get("lora.rank", 1):
        return []
    adapter = {key: default for key, default in LORA_DEFAULTS.items() if key != "lora.rank"}
    return [
        ("dpo.loss" not in values, "lora.rank", "is 0, which means all weights in dpo_distributed alone; set it to 1 or more, or "
         "use that recipe or full_finetune_distributed"),
        (bool(values.get("data.new_tokens")), "data.new_tokens", "and lora.rank=0 cannot go together: dpo_distributed adds no "
         "tokens where all weights are trained; add them with full_finetune_distributed first"),
        *[(values.get(key, default) != default, key, "has no effect with lora.rank=0, which trains all weights; remove it")
          for key, default in adapter.items()],
    ]  # fmt: skip


def _weights_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """What weights, gradients and moments in CPU memory do not go with."""
    if "weights" not in values.get("model.offload", []):
        return []
    why = {"adamw_8bit": "torchao's update is compiled for parameters that lie where their mesh computes",
           "adamw_bf16": "its rounding is a kernel for GPUs, and takes 300 times as long as adamw on a CPU"}  # fmt: skip
    return [
        (values.get("lora.rank") == 0, "model.offload", "holds weights, which full_finetune_distributed alone can do; divide them over "
         "more processes, or use optim.name=adamw_bf16, and remove it"),
        (bool(values.get("lora.rank")), "model.offload", "holds weights, which is for models trained whole: beside adapters nothing "
         "but frozen weights would travel, for nothing; use model.quantize=nf4, or divide them (model.shard=all), and remove it"),
        ("lora.rank" not in values and values.get("optim.name") in why, "optim.name",
         f"is {values.get('optim.name')}, and the optimizer works in CPU memory where model.offload holds weights: "
         f"{why.get(values.get('optim.name'))}; set optim.name=adamw"),
    ]  # fmt: skip


def _preference_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """For recipes that learn from preferences: what a loss does not use, and what leaves it without a reference."""
    loss, kto = values.get("dpo.loss", ""), "kto.beta" in values
    compared = kto or loss not in ("", "simpo", "orpo", "cpo")
    return [
        *(_reference_rules(values) if compared and values.get("lora.rank") else []),
        (compared and values.get("lora.dropout", 0.0) > 0.0 and bool(values.get("lora.rank")), "lora.dropout",
         "must be 0: policy and reference are compared without dropout, so that the loss starts where it should"),
        (loss in ("simpo", "orpo", "cpo") and values["dpo.reference"] != "auto", "dpo.reference",
         f"has no effect on dpo.loss={loss}, which needs no reference; remove it"),
        (loss not in ("", "sigmoid", "robust") and values["dpo.label_smoothing"] > 0.0, "dpo.label_smoothing",
         f"has no effect on dpo.loss={loss}; use sigmoid or robust, or remove it"),
        (loss not in ("", "simpo") and values["dpo.gamma"] > 0.0, "dpo.gamma",
         f"has no effect on dpo.loss={loss}; use simpo, or remove it"),
        (loss in ("orpo", "cpo") and values["dpo.sft_weight"] > 0.0, "dpo.sft_weight",
         f"would be a second term of its kind: dpo.loss={loss} has one; remove it"),
        *[("reward.center_weight" in values and bool(values.get(key)), key, "has no use in a reward model; remove it")
          for key in ("lora.modules_to_save", "data.new_tokens", "run.exact_match_rows")],
        (kto and values.get("run.global_batch_size", 2) < 2 and not values.get("data.packing", True),
         "run.global_batch_size", "must be 2 or more: KTO pairs each prompt with the answer to another one of the step"),
    ]  # fmt: skip


def _reference_rules(values: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """The base model with its adapters off is the model at the start, unless something else was or will be changed."""
    why = "the reference is the base model with its adapters off"
    return [
        (values.get("dpo.reference", "auto") != "auto", "dpo.reference",
         f"can be chosen only where all weights are trained (lora.rank=0); with an adapter {why}: remove it"),
        (bool(values.get("lora.adapter")), "lora.adapter",
         f"{why}, but training would start from this one; merge it first (tune merge) and name the result in model.path"),
        *[(bool(values.get(key)), key, f"cannot be trained here: {why}, which this would change; remove it, or choose "
           "a dpo.loss without a reference (simpo, orpo, cpo)") for key in ("lora.modules_to_save", "data.new_tokens")],
    ]  # fmt: skip


def check_paths(values: dict[str, Any]) -> Problems:
    """Options that name a local file or directory which is not there, or a file that stands in the way. Nothing is opened."""
    wanted = [
        ("model.path", values.get("model.path", ""), "config.json"),
        ("lora.adapter", values.get("lora.adapter", ""), "adapter_config.json"),
    ]
    for group in ("data.train", "data.valid"):
        wanted += [
            (f"{group}[{i}].path", source.path, "")
            for i, source in enumerate(values.get(group, []))
            if source.path.endswith(LOCAL_DATA)
        ]
    if values.get("data.chat_template", "").endswith(".jinja"):
        wanted.append(("data.chat_template", values["data.chat_template"], ""))
    problems = [(key, problem) for key, text, inside in wanted if text and (problem := _path_problem(key, text, inside))]
    problems += _check_resume(values.get("run.resume", "never"))
    problems += _check_out(values.get("run.out", ""))
    return problems or _check_own_results(values)  # of paths that are there


def _check_out(text: str) -> Problems:
    """A run's directory that cannot be made because it, or a folder above it, is a file."""
    try:
        files = [path for path in (Path(text), *Path(text).parents) if path.is_file()]
    except (ValueError, OSError) as error:  # a NUL, a name that is too long, a folder that may not be read
        return [("run.out", f"is {show(text)}: {error}")]
    if not files:
        return []
    if files[0] == Path(text):
        return [("run.out", f"is {show(text)}, which is a file; name a directory")]
    return [("run.out", f"is {show(text)}, below the file {files[0]}; name another directory")]


def _check_resume(text: str) -> Problems:
    """Neither of the two words nor a directory; whether one is a checkpoint that verifies is seen when it is read."""
    if text in ("never", "auto"):
        return []
    with contextlib.suppress(ValueError, OSError):  # a NUL, a name that is too long
        if text and Path(text).is_dir():
            return []
    wanted = "write never, auto (the newest checkpoint in run.out), or the directory of a checkpoint, such as out/step_000500"
    return [("run.resume", f"is {show(text)}, and there is no such directory (looked in {Path.cwd()}); {wanted}")]


def _check_own_results(values: dict[str, Any]) -> Problems:
    """What a run starts from may not lie where it writes its result: an earlier one is moved aside before the first step."""
    results = [os.path.realpath(Path(values["run.out"]) / name) for name in RESULTS] if "run.out" in values else []
    named = {key: values[key] for key in ("model.path", "lora.adapter", "data.chat_template") if values.get(key)}
    return [
        (key, f"is {show(text)}, the result of an earlier run in run.out, which this one would move aside: choose another run.out")
        for key, text in named.items()
        if any(Path(os.path.realpath(resolve_path(text))).is_relative_to(result) for result in results)
    ]


def _path_problem(key: str, text: str, inside: str) -> str:
    """What is wrong with one path, or "". `inside`: the file that a directory must hold; "" for a plain file."""
    try:
        path = resolve_path(text)
        found = (path / inside).is_file()
    except (UserError, RuntimeError, ValueError, OSError) as error:  # no home directory, a NUL, a name that is too long
        return f"is {show(text)}: {error}"
    if found:
        return ""
    if inside and path.is_dir():
        return f"is {show(text)}, a directory without {inside}"
    if inside and path.is_file():
        what = "model" if key == "model.path" else "adapter"
        return f"is {show(text)}, which is a file and no {what} directory; name the one that holds {inside}"
    fix = (
        f"; get it with `tune download {text}`"
        if key == "model.path" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text)
        else ""
    )
    return f"is {show(text)}, which does not exist (looked in {Path.cwd()}){fix}"


def nearest(word: str, known: list[str]) -> str:
    """The most similar of `known`, "" where none is near."""
    return next(iter(difflib.get_close_matches(word[:60], known, 1, cutoff=0.6)), "")


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `3 processes`, `1,000 entries`."""
    plural = noun[:-1] + "ies" if noun.endswith("ry") else noun + ("es" if noun.endswith(("s", "tch")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def show(value: Any) -> str:
    """A value in a message: quoted, one line, at most 60 characters, no control characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def show_key(key: str) -> str:
    """A key in a message: as it is if it is a plain word, else quoted and cut."""
    return key if key.isprintable() and 0 < len(key) <= 80 else show(key)
