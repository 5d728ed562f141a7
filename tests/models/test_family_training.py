"""Families through the full fine-tuning recipe on two processes: what is trained is everything, what comes out loads."""

import json
import shutil
from pathlib import Path

import pytest
import small_models
import torch
from processes import problems, run_processes
from safetensors.torch import load_file, save_file
from tiny_training import hide_cuda
from transformers import AutoModelForCausalLM

from torchft.config import ASSETS
from torchft.models import build_model
from torchft.parse import parse
from torchft.recipes import full_finetune_distributed as recipe


@pytest.mark.parametrize("family", ["gemma3", "phi3", "olmo2", "granite"])
def test_every_weight_of_a_family_is_trained_and_comes_out(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_cuda(monkeypatch)
    base, data, out = tmp_path / "base", tmp_path / "chat.jsonl", tmp_path / "out"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny_llama" / name, base)
    vocab_size = json.loads((ASSETS / "tiny_llama/config.json").read_text())["vocab_size"]
    hf = getattr(small_models, family)(vocab_size=vocab_size)
    (base / "config.json").write_text(json.dumps(hf))
    model = build_model(hf)
    model.init_weights(torch.Generator().manual_seed(1))
    before = {name: param.detach() for name, param in model.named_parameters()}
    save_file(before, base / "model.safetensors")
    turns = [[{"role": "user", "content": "Ada and Bela"}, {"role": "assistant", "content": "Cora" * n}] for n in range(1, 5)]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    options = {"model.path": base, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    options |= {"data.max_seq_len": 128, "run.max_steps": 2, "run.global_batch_size": 2, "optim.warmup_steps": 0, "optim.lr": 1e-3}
    cfg = parse(recipe.Config, [f"{key}={value}" for key, value in options.items()])
    assert run_processes(2, lambda _: recipe.main(cfg), out) == [0, 0], problems(out)

    after = load_file(out / "model/model.safetensors")
    assert after.keys() == before.keys()
    assert [name for name, tensor in before.items() if torch.equal(after[name], tensor)] == []
    _, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((out / "model/config.json").read_text()) == hf | {"torch_dtype": "float32"}
