"""A reward model as a whole: what transformers makes of the result, one curve however a step is cut, resume bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from processes import problems, run_processes
from test_dpo_distributed import STEPS
from test_dpo_trl import sequences
from test_lora_single_device import log_records
from transformers import AutoModelForSequenceClassification

from torchft.config import ASSETS
from torchft.data.chat_template import load_template
from torchft.data.dataset import build_datasets
from torchft.data.loader import make_batch
from torchft.data.tokenize import stop_ids
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import ConfigError, UserError
from torchft.models import CLASSIFIERS, FAMILIES, build_reward_model, granite, read_config
from torchft.modules.score import RewardModel, last_tokens
from torchft.modules.transformer import CausalLM
from torchft.parse import parse
from torchft.recipes import reward_distributed as recipe
from torchft.reward_export import padding_token

SHORT = ("run.max_steps=3",)
RECOMPUTED = "model.activation_checkpointing=full"
PACKED = ["data.packing=true", "run.global_batch_size=4", "data.max_seq_len=160"]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def options(model: Path, data: Path, out: Path, *more: str) -> recipe.Config:
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 128, "data.valid_fraction": 0.25, "run.epochs": 2, "run.max_steps": STEPS}
    values |= {"lora.rank": 4, "lora.alpha": 12, "optim.lr": 0.003, "optim.warmup_steps": 2, "run.global_batch_size": 8}
    values |= {"run.micro_batch_size": 2, "run.eval_every": 3}
    values |= dict(text.split("=", 1) for text in more)
    return parse(recipe.Config, [f"{key}={value}" for key, value in values.items()])


def train(processes: int, model: Path, data: Path, out: Path, *more: str) -> Path:
    cfg = options(model, data, out, *more)
    codes = run_processes(processes, lambda _: recipe.main(cfg), out)
    assert codes == [0] * processes, problems(out)
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    for record, wanted in zip(log_records(out), log_records(expected), strict=True):
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def straight(small_model: Path, pair_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, small_model, pair_data, tmp_path_factory.mktemp("runs") / "straight", "run.save_every=1", "run.keep_last=9")


def test_transformers_loads_the_result_and_scores_alike(small_model: Path, pair_data: Path, straight: Path) -> None:
    """Held-out accuracy included; alone, and in a batch that transformers pads itself."""
    cfg = options(small_model, pair_data, straight)
    tokenizer = load_tokenizer(small_model)
    _, valid = build_datasets(cfg.data, tokenizer, load_template("", tokenizer), cfg.run.seed, kind="pairs", quiet=True)
    folder = straight / "reward_model"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    pad = model.config.pad_token_id
    assert pad != tokenizer.eos_id
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer.special_tokens[settings["pad_token"]] == pad  # who pads by the tokenizer pads alike
    pairs = [sequences(valid, sample)[0] for sample in range(len(valid))]
    width = max(len(ids) for pair in pairs for ids in pair)
    rows = torch.tensor([ids + [pad] * (width - len(ids)) for pair in pairs for ids in pair])
    with torch.no_grad():
        lengths = torch.tensor([[len(ids)] for pair in pairs for ids in pair])
        padded = model(input_ids=rows, attention_mask=(torch.arange(width) < lengths).long())
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for pair in pairs for ids in pair])
    scores = padded.logits[:, 0].view(-1, 2)
    assert torch.allclose(alone, scores.flatten(), atol=1e-5)
    last = [record for record in log_records(straight) if "valid_loss" in record][-1]
    expected = {
        "valid_rewards_chosen": scores[:, 0].mean(),
        "valid_margin": (scores[:, 0] - scores[:, 1]).mean(),
        "valid_accuracy": (scores[:, 0] > scores[:, 1]).float().mean(),
        "valid_loss": -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean(),
    }
    for name, value in expected.items():
        assert last[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
    assert not (set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) & {"lm_head.weight"})


@pytest.mark.parametrize("more", [["run.micro_batch_size=8"], ["run.micro_batch_size=1", RECOMPUTED]], ids="-".join)
def test_cutting_a_step_differently_changes_nothing(
    small_model: Path, pair_data: Path, straight: Path, tmp_path: Path, more: list[str]
) -> None:
    assert_same_run(train(1, small_model, pair_data, tmp_path, *more), straight)
    losses = [record["loss"] for record in log_records(straight) if "loss" in record]
    assert min(losses[3:]) < min(losses[:3])  # the second epoch


@pytest.mark.parametrize("more", [["model.quantize=nf4"], PACKED, ["model.shard=1"]], ids=["qlora", "packed", "whole"])
def test_any_number_of_processes_gives_one_curve(small_model: Path, pair_data: Path, tmp_path: Path, more: list[str]) -> None:
    expected = train(1, small_model, pair_data, tmp_path / "1", *SHORT, *more)
    processes = 4 if more == PACKED else 2
    assert_same_run(train(processes, small_model, pair_data, tmp_path / "several", *SHORT, *more), expected)


def test_a_resumed_run_is_the_same_bits(small_model: Path, pair_data: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    out.mkdir()
    (out / "step_000003").symlink_to(straight / "step_000003")
    train(1, small_model, pair_data, out, "run.resume=auto", "run.save_every=1", "run.keep_last=9")
    for name in ("params.safetensors", "optimizer.safetensors"):
        last = f"step_{STEPS:06d}/{name}"
        assert (out / last).read_bytes() == (straight / last).read_bytes(), name
    for name in ("base.safetensors", "score.safetensors"):
        assert (out / "reward_model" / name).read_bytes() == (straight / "reward_model" / name).read_bytes()


def test_packed_pairs_have_the_scores_of_single_answers(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    cfg = options(small_model, pair_data, tmp_path)
    tokenizer = load_tokenizer(ASSETS / "tiny_llama")
    train_set, _ = build_datasets(cfg.data, tokenizer, load_template("", tokenizer), 0, kind="pairs", quiet=True)
    torch.manual_seed(0)
    model = build_reward_model(read_config(small_model))
    CausalLM.init_weights(model, torch.Generator().manual_seed(0))
    assert isinstance(model, RewardModel)
    batch = make_batch(train_set, [np.array([4, 0, 2]), np.array([1])], num_rows=3, max_seq_len=300, packing=True)
    ends = last_tokens(batch.sequences, batch.num_sequences)
    got = model(batch.input_ids, positions=batch.positions, documents=batch.documents, branches=batch.branches, ends=ends)
    expected = []
    for sample in (4, 0, 2, 1):
        for ids in sequences(train_set, sample)[0]:
            expected.append(model.model(torch.tensor([ids]), None, None, None)[0, -1] @ model.score.weight[0])
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["lora.modules_to_save=[lm_head]", "run.exact_match_rows=3"])
def test_what_a_reward_model_has_no_use_for_is_refused(small_model: Path, pair_data: Path, tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match="has no use in a reward model"):
        options(small_model, pair_data, tmp_path, given)


def test_what_a_reward_model_pads_with(tmp_path: Path) -> None:
    """The tokenizer's own padding token, its BOS, or another control token; never one that an answer ends in."""
    tokenizer = load_tokenizer(ASSETS / "tiny_llama")
    template = load_template("", tokenizer)
    ends = {token for token, number in tokenizer.special_tokens.items() if number in stop_ids(tokenizer, template)}
    others = set(tokenizer.special_tokens) - ends
    for named, expected in [
        ({"bos_token": tokenizer.bos_token}, {tokenizer.bos_token}),
        ({"pad_token": min(others), "bos_token": tokenizer.bos_token}, {min(others)}),
        ({"pad_token": min(ends)}, others),
        ({}, others),
    ]:
        token, number = padding_token(replace(tokenizer, named={"eos_token": tokenizer.eos_token} | named), template)
        assert token in expected and tokenizer.special_tokens[token] == number
    poor = replace(tokenizer, named={"eos_token": tokenizer.eos_token}, special_tokens={t: tokenizer.special_tokens[t] for t in ends})
    with pytest.raises(UserError, match="every control token ends an answer"):
        padding_token(poor, None)


def test_a_family_without_a_classifier_is_refused_before_training() -> None:
    """And every other one is a class that transformers has."""
    assert all(name in dir(transformers) for name in CLASSIFIERS.values())
    assert set(FAMILIES) - set(CLASSIFIERS) == {"GraniteForCausalLM"}
    with torch.device("meta"), pytest.raises(ValueError, match="GraniteForCausalLM has no ...ForSequenceClassification"):
        build_reward_model(granite.SIZES["Granite-3.3-2B"])
