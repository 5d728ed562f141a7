"""Model families, one file each: notes on its checkpoints, its sizes, and config.json -> TransformerConfig."""

import json
from pathlib import Path
from typing import Any

from torchft.models import (
    gemma2,
    gemma3,
    glm4,
    gpt_oss,
    granite,
    llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from torchft.modules.score import RewardModel
from torchft.modules.transformer import CausalLM, TransformerConfig

FAMILIES = {  # `architectures` in config.json -> the family's file
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "MinistralForCausalLM": ministral,
    "SmolLM3ForCausalLM": smollm3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Phi3ForCausalLM": phi3,
    "Olmo2ForCausalLM": olmo2,
    "GraniteForCausalLM": granite,
    "GptOssForCausalLM": gpt_oss,
    "Glm4ForCausalLM": glm4,
}

CLASSIFIERS = {  # `architectures` -> transformers' class with a score on top
    name: name.replace("ForCausalLM", "ForSequenceClassification") for name in FAMILIES if name != "GraniteForCausalLM"
} | {"Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}  # without Text it takes images too

ADVICE = {  # architectures that are near to a known one
    "Gemma3ForConditionalGeneration": "It takes images too; its text part can be saved on its own as a Gemma3ForCausalLM.",
}


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of the config.json in model directory `path`. Raises ValueError naming the file and what is wrong."""
    file = Path(path) / "config.json"
    try:
        hf = json.loads(file.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise ValueError(
            f"{file}: no such file. A Hugging Face model directory has one; `tune download` makes such a directory."
        ) from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:  # bad JSON, bad UTF-8, a duplicate key
        raise ValueError(f"{file}: not valid JSON ({error}). Download it again.") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{file}: holds a {type(hf).__name__}, not the object of fields that a config.json is.")
    return hf


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"key {twice!r} stands there twice")
    return fields


def model_config(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config, by architecture. Raises ValueError naming what cannot be honoured."""
    architectures = hf.get("architectures")
    known = ", ".join(FAMILIES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"config.json: architectures is {architectures!r}; it must name one of {known}.")
    if architectures[0] not in list(FAMILIES):  # a list, since what stands there may not be hashable
        raise _unknown(str(architectures[0]))
    return FAMILIES[architectures[0]].config_from_hf(hf)


def _unknown(architecture: str) -> ValueError:
    """Which ones are known, and how another is added; a classifier, such as reward_distributed writes, is none to add."""
    if architecture.endswith("ForSequenceClassification"):
        return ValueError(
            f"config.json: a {architecture} is a reward model, or another classifier: it scores texts and writes none. transformers' "
            "AutoModelForSequenceClassification reads it; give the language model here that it was trained from."
        )
    file = architecture.removesuffix("ForCausalLM").lower() if architecture.isidentifier() else "my_family"
    return ValueError(
        f"config.json: architecture {architecture!r} is not supported; known are {', '.join(FAMILIES)}. "
        + ADVICE.get(architecture, f"To add it, write models/{file}.py: docs/new_family.md shows the way.")
    )


def build_model(hf_config: dict[str, Any]) -> CausalLM:
    """The model of a config.json, without weights: call it under `torch.device("meta")`, then stream them in."""
    return CausalLM(model_config(hf_config))


def build_reward_model(hf_config: dict[str, Any]) -> RewardModel:
    """The same with a score on top. Raises ValueError also for an architecture that transformers has no classifier for, and
    for an auxiliary loss of the router.
    """
    config = model_config(hf_config)
    if hf_config["architectures"][0] not in CLASSIFIERS:
        raise ValueError(
            f"config.json: {hf_config['architectures'][0]} has no ...ForSequenceClassification in transformers, as which a "
            f"reward model is written; those that have one: {', '.join(CLASSIFIERS)}."
        )
    if config.moe is not None and config.moe.aux_loss_coef:
        raise ValueError(
            "config.json: output_router_logits is true, which asks for the router's auxiliary loss, and a reward model's has "
            "no such term. Set it to false there."
        )
    return RewardModel(config)
