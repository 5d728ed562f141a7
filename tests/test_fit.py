"""What is allowed and seldom meant is said before the first step: control tokens never trained, rows beyond the model's positions."""

import json
from pathlib import Path

import pytest
import torch

from torchft.config import ASSETS, DataConfig, SourceConfig
from torchft.data.chat_template import load_template
from torchft.data.dataset import Dataset, build_dataset
from torchft.data.tokenizer import Tokenizer, load_tokenizer
from torchft.fit import warn_of_misfits
from torchft.models import build_model, read_config
from torchft.modules.transformer import CausalLM
from torchft.weights import load_weights

TINY = ASSETS / "tiny_llama"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


@pytest.fixture
def dataset(tokenizer: Tokenizer, tmp_path: Path) -> Dataset:
    """One conversation, whose template writes control tokens."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]}))
    sources = [SourceConfig(path=str(file))]
    template = load_template("", tokenizer)
    return build_dataset(sources, DataConfig(train=sources), tokenizer, template, key="data.train", use_cache=False)


@pytest.fixture
def model() -> CausalLM:
    with torch.device("meta"):
        model = build_model(read_config(TINY))
    load_weights(model, TINY, device="cpu", dtype=torch.float32)
    return model


def said(model: CausalLM, dataset: Dataset, tokenizer: Tokenizer, max_seq_len: int = 64) -> list[str]:
    lines: list[str] = []
    warn_of_misfits(model, dataset, tokenizer, max_seq_len, lines.append)
    return lines


def used_control(dataset: Dataset, tokenizer: Tokenizer) -> int:
    return min(set(dataset.ids.tolist()) & tokenizer.control_ids)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_control_token_that_was_never_trained_is_named(
    factor: float, whole: bool, model: CausalLM, dataset: Dataset, tokenizer: Tokenizer
) -> None:
    """PITFALLS T12: its embedding's norm lies outside that of the others. The advice is what the recipe at hand can follow."""
    model.requires_grad_(whole)
    model.lm_head.weight.requires_grad_(True)  # tied: the table alone, as beside adapters
    token = used_control(dataset, tokenizer)
    with torch.no_grad():
        row = model.model.embed_tokens.weight[token]
        row.mul_(factor * model.model.embed_tokens.weight.norm(dim=1).median() / row.norm())
    lines = said(model, dataset, tokenizer)
    assert len(lines) == 1
    line = lines[0]
    assert line.startswith("WARNING: the model seems never to have been trained on ")
    assert ("lora.modules_to_save" in line) != whole and ("learned from nothing" in line) == whole
    assert tokenizer.decode([token], skip_special=False) in line


def test_a_trained_model_is_no_reason_for_a_warning(model: CausalLM, dataset: Dataset, tokenizer: Tokenizer) -> None:
    assert said(model, dataset, tokenizer) == []


def test_rows_beyond_the_models_positions(model: CausalLM, dataset: Dataset, tokenizer: Tokenizer) -> None:
    limit = model.config.max_position_embeddings
    assert said(model, dataset, tokenizer, limit) == []
    assert f"is beyond the {limit} positions" in said(model, dataset, tokenizer, limit + 1)[0]
