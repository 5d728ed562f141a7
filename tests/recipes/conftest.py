"""A model directory small enough that a whole run of a recipe takes a second, and data for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchft.config import ASSETS
from torchft.models import build_model

NAMES = ("Ada", "Bela", "Cora", "Dina", "Edda", "Fritz", "Gerd", "Hanno")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-shaped, 2 layers of width 64, random fp32 weights, with the embedded tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ASSETS / "tiny_llama" / name).read_bytes())
    config = json.loads((ASSETS / "tiny_llama/config.json").read_text()) | {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(1))
    save_file({name: param.detach() for name, param in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of uneven length."""
    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    with file.open("w") as out:
        for i in range(24):
            question = " and ".join(NAMES[(i + j) % 8] for j in range(1 + i % 5))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": NAMES[i % 8] * (1 + i % 3)}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of answers of uneven length, half of them whole conversations with a turn before."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with file.open("w") as out:
        for i in range(24):
            question = " and ".join(NAMES[(i + j) % 8] for j in range(1 + i % 5))
            answers = {"chosen": NAMES[i % 8] * (1 + i % 3), "rejected": NAMES[(i + 1) % 8] * (1 + i % 4)}
            prompt = [{"role": "user", "content": question}]
            if i % 2:
                prompt = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": NAMES[i % 5]}, *prompt]
            sides = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
            out.write(json.dumps({"prompt": prompt} | sides) + "\n")
    return file


@pytest.fixture(scope="session")
def verdict_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 answers of uneven length; those of one letter are good."""
    file = tmp_path_factory.mktemp("data") / "verdicts.jsonl"
    rows = [{"prompt": "why " * (1 + i % 4), "completion": "ab"[i % 2] * (2 + i % 5), "label": i % 2 == 0} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
