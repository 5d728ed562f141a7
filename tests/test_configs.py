"""Every shipped config: short, only differences, its model built on meta with adapters, the header's commands true."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from some_config import Config, PreferenceConfig

from torchft.config import ASSETS
from torchft.dry_run import GIB, TRAINED_BYTES, frozen_bytes
from torchft.models import FAMILIES, build_model, read_config
from torchft.modules.lora import LoraSpec, add_lora, trainable_parameters
from torchft.modules.nf4 import quantize_nf4
from torchft.names import CONFIGS, config_names, configs_for, recipe_names
from torchft.parse import flatten
from torchft.parse import read_config as read_options

SIZES = {name: hf for family in dict.fromkeys(FAMILIES.values()) for name, hf in family.SIZES.items()}
ROWS = {  # <family>/<size> -> its row in the family's table of sizes
    "llama2": {"7B": "Llama-2-7B", "13B": "Llama-2-13B", "70B": "Llama-2-70B"},
    "llama3": {"8B": "Llama-3-8B"},
    "llama3_1": {"8B": "Llama-3.1-8B", "70B": "Llama-3.1-70B"},
    "llama3_2": {"1B": "Llama-3.2-1B", "3B": "Llama-3.2-3B"},
    "llama3_3": {"70B": "Llama-3.3-70B"},
    "mistral": {"7B": "Mistral-7B-v0.3", "nemo_12B": "Mistral-Nemo-12B", "small_24B": "Mistral-Small-24B"}
    | {"ministral_8B": "Ministral-8B"},
    "qwen2_5": {f"{n}B": f"Qwen2.5-{n}B" for n in ("0.5", "1.5", "3", "7", "14", "32", "72")},
    "qwen3": {f"{n}B": f"Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8", "14", "32")},
    "mixtral": {"8x7B": "Mixtral-8x7B", "8x22B": "Mixtral-8x22B"},
    "qwen3_moe": {"30B_A3B": "Qwen3-30B-A3B", "235B_A22B": "Qwen3-235B-A22B"},
    "smollm2": {"135M": "SmolLM2-135M", "360M": "SmolLM2-360M", "1.7B": "SmolLM2-1.7B"},
    "smollm3": {"3B": "SmolLM3-3B"},
    "tinyllama": {"1.1B": "TinyLlama-1.1B"},
    "yi1_5": {"9B": "Yi-1.5-9B"},
    "deepseek_r1": {"llama_8B": "DeepSeek-R1-Distill-Llama-8B", "qwen_1.5B": "DeepSeek-R1-Distill-Qwen-1.5B", "qwen_7B": "DeepSeek-R1-Distill-Qwen-7B", "qwen_14B": "DeepSeek-R1-Distill-Qwen-14B"},
    "gemma2": {"2B": "Gemma-2-2B", "9B": "Gemma-2-9B", "27B": "Gemma-2-27B"},
    "gemma3": {"270M": "Gemma-3-270M", "1B": "Gemma-3-1B"},
    "phi3": {"mini_3.8B": "Phi-3-mini-4k", "medium_14B": "Phi-3-medium-4k"},
    "phi3_5": {"mini_3.8B": "Phi-3-mini-4k"},
    "phi4": {"14B": "Phi-4", "mini_3.8B": "Phi-4-mini"},
    "olmo2": {"1B": "OLMo-2-1B", "7B": "OLMo-2-7B", "13B": "OLMo-2-13B", "32B": "OLMo-2-32B"},
    "gpt_oss": {"20B": "gpt-oss-20b", "120B": "gpt-oss-120b"},
    "granite3_3": {"2B": "Granite-3.3-2B", "8B": "Granite-3.3-8B"},
    "glm4": {"9B": "GLM-4-9B-0414", "32B": "GLM-4-32B-0414"},
}
SIZED = [f"{family}/{size}" for family, sizes in ROWS.items() for size in sizes]
WHOLE = [name for name in config_names() if name.endswith("_full")]  # of the sizes whose weights people train all


PREFERENCES = {  # method -> the configs that have it
    "dpo": "llama3_1/8B llama3_2/1B llama3_2/3B mistral/7B qwen2_5/0.5B qwen2_5/7B qwen3/0.6B qwen3/8B tiny/",
    "kto": "llama3_1/8B qwen3/0.6B tiny/",
    "reward": "llama3_1/8B qwen3/0.6B tiny/",
}
WHOLE_OF_PREFERENCES = [f"{size}_full_dpo" for size in ("llama3_1/8B", "llama3_2/1B", "qwen3/0.6B", "qwen3/4B")]
OF_PREFERENCES = {f"{name}_{method}".replace("/_", "/") for method, names in PREFERENCES.items() for name in names.split()}
OF_PREFERENCES |= {*WHOLE_OF_PREFERENCES, "tiny/full_dpo"}


def options(name: str) -> Config:
    return read_options(PreferenceConfig if name in OF_PREFERENCES else Config, name, [], paths=False)


def header(name: str) -> list[str]:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("#")]


def test_both_methods_of_every_size_are_there():
    assert set(config_names()) - set(WHOLE) == {f"{size}_{method}" for size in SIZED for method in ("lora", "qlora")} | {
        "tiny/lora",
        "tiny/qlora",
        "tiny/full",
        "llama3_1/8B_lora_fp8",
    } | OF_PREFERENCES
    assert {"llama3_1/8B_full", "llama3_1/70B_full", "qwen3/8B_full"} <= set(WHOLE)
    assert {name.removesuffix("_full") for name in WHOLE} <= set(SIZED)


@pytest.mark.parametrize("name", config_names())
def test_a_config_is_short_and_holds_only_differences(name):
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 35
    defaults, values = flatten(PreferenceConfig()), flatten(options(name))
    groups = yaml.safe_load(text)
    given = [f"{group}.{leaf}" for group, leaves in groups.items() for leaf in leaves]
    assert [key for key in given if values[key] == defaults[key]] == []
    assert ("qlora" in name) == (values["model.quantize"] == "nf4")
    assert values["run.out"] == f"out/{name.replace('/', '_')}"


@pytest.mark.parametrize("name", config_names())
def test_the_commands_in_a_header_name_this_config_and_its_model(name):
    text, cfg = "\n".join(header(name)), options(name)
    run = re.search(r"#   tune run (?:--nproc_per_node \d+ )?(\S+) --config (\S+)", text)
    assert run[2] == name and run[1] in recipe_names() and name in configs_for(run[1])
    if not name.startswith("tiny/"):
        assert f"#   tune download {cfg.model.path}\n" in text
        assert re.fullmatch(r"[\w-]+/[\w.-]+", cfg.model.path)


def said_gib(name: str) -> float:
    """The size of the frozen weights that a config's header states."""
    return float(re.search(r"Frozen weights: ([\d.]+) GiB", header(name)[0])[1])


@pytest.mark.parametrize("size", SIZED)
def test_the_model_of_a_config_builds_on_meta_with_adapters(size):
    family, _, rest = size.partition("/")
    row, cfg, quantized = SIZES[ROWS[family][rest]], options(f"{size}_lora"), options(f"{size}_qlora")
    assert cfg.lora == quantized.lora and cfg.data.max_seq_len <= row["max_position_embeddings"]
    lora = cfg.lora
    spec = LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.dora, tuple(lora.target_modules))
    # One layer stands for all, they are equal: whole models, which tests/models/test_sizes.py builds, and above all quantising
    # them, would take minutes on meta.
    with torch.device("meta"):
        one_layer, two_layers = (build_model(row | {"num_hidden_layers": count}) for count in (1, 2))
    per_layer, report = len(add_lora(one_layer, spec).names), add_lora(two_layers, spec)
    assert len(report.names) == 2 * per_layer
    assert 0 < sum(param.numel() for param in trainable_parameters(two_layers).values()) < 0.04 * report.num_total
    first, both = (frozen_bytes(model, cfg.model.dtype) for model in (one_layer, two_layers))
    dense = first + (row["num_hidden_layers"] - 1) * (both - first)
    assert said_gib(f"{size}_lora") == pytest.approx(dense / GIB, abs=0.051)  # one decimal is stated
    before = frozen_bytes(one_layer, quantized.model.dtype)
    coded = quantize_nf4(one_layer)
    assert len(coded.quantized) + len(coded.skipped) == per_layer
    assert len(coded.skipped) == (4 if size in ("smollm2/135M", "smollm2/360M") else 0)  # their attention is no whole groups
    saved = before - frozen_bytes(one_layer, quantized.model.dtype)
    assert said_gib(f"{size}_qlora") == pytest.approx((dense - saved * row["num_hidden_layers"]) / GIB, abs=0.051)


@pytest.mark.parametrize("name", WHOLE + WHOLE_OF_PREFERENCES)
def test_a_config_for_all_weights_says_what_they_take(name):
    family, _, rest = name.partition("/")
    row, cfg = SIZES[ROWS[family][rest.partition("_full")[0]]], options(name)
    with torch.device("meta"):
        weights = sum(param.numel() for param in build_model(row).parameters())
    stated = re.search(r"gradients and moments: ([\d,.]+) GiB", header(name)[0])[1]
    assert float(stated.replace(",", "")) == pytest.approx(weights * sum(TRAINED_BYTES["adamw"]) / GIB, abs=0.051)
    assert cfg.data.max_seq_len <= row["max_position_embeddings"]
    assert name in WHOLE or (cfg.lora.rank, cfg.model) == (0, options(name.removesuffix("_dpo")).model)


WITH_ADAPTERS = OF_PREFERENCES - {*WHOLE_OF_PREFERENCES, *(name for name in OF_PREFERENCES if name.startswith("tiny/"))}


@pytest.mark.parametrize("name", sorted(WITH_ADAPTERS))
def test_a_config_of_preferences_is_that_of_its_size_but_for_the_data(name):
    ours, theirs = options(name), options(f"{name.rpartition('_')[0]}_lora")
    assert ours.model == theirs.model and ours.lora == theirs.lora
    assert said_gib(name) == said_gib(f"{name.rpartition('_')[0]}_lora")


@pytest.mark.parametrize("name", [name for name in config_names() if name.startswith("tiny/")])
def test_the_tiny_configs_use_what_is_shipped(name):
    cfg = options(name)
    assert cfg.model.path == "builtin:tiny_llama"
    for source in [*cfg.data.train, *cfg.data.valid]:
        assert source.path.startswith("builtin:tiny_dpo/" if name in OF_PREFERENCES else "builtin:tiny_sft/")
    with torch.device("meta"):
        model = build_model(read_config(ASSETS / "tiny_llama"))
    if cfg.lora.rank:
        add_lora(model, LoraSpec(cfg.lora.rank, cfg.lora.alpha))
    if cfg.model.quantize == "nf4":
        assert not quantize_nf4(model).skipped  # the tiny model's dimensions are chosen for it (D10)


def test_no_config_names_a_path_of_one_machine():
    for path in Path(CONFIGS).rglob("*.yaml"):
        assert not re.search(r"[\s'\"=]/\w", path.read_text(encoding="utf-8")), path
