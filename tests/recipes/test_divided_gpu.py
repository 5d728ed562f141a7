"""A base divided over two GPUs: copied out of each other's memory, gathered by NCCL, or whole on each, it gives one curve."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lora_single_device import log_records, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]
WAYS = {
    "whole": ([], "holds the whole model"),
    "copied": (["model.shard=all"], "copied from the other GPUs while the block before computes"),
    "gathered": (["model.shard=all", "model.kernels={peers: eager}"], "gathered while the block before computes"),
    "fsdp2": (["model.shard=all", "model.kernels={lora: eager}"], "tensors divided over 2 processes"),
}


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_one_curve(small_model: Path, chat_data: Path, tmp_path: Path, recomputed: str) -> None:
    """In fp32, with answers written before and behind, and a validation in between that leaves other blocks in the slots."""
    adapters, losses = {}, {}
    for way, (more, said) in WAYS.items():
        out = tmp_path / way
        values = {"model.path": small_model, "model.dtype": "float32", "data.train": chat_data, "run.out": out}
        values |= {"data.packing": "false", "data.max_seq_len": 128, "data.valid_fraction": 0.25, "run.max_steps": 6, "run.eval_every": 3}
        values |= {"run.global_batch_size": 8, "run.micro_batch_size": 2, "run.log_every": 1, "run.save_every": 3, "run.exact_match_rows": 4}
        values |= {"run.sample_rows": 1, "run.max_new_tokens": 4, "optim.lr": 0.003, "model.activation_checkpointing": recomputed}
        options = [f"{key}={value}" for key, value in values.items()] + more
        command = [sys.executable, "-m", "torchft", "run", "--nproc_per_node", "2", "lora_distributed", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "4"})
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout, done.stdout
        losses[way] = [record["loss"] for record in log_records(out) if "loss" in record]
        adapters[way] = load_file(out / "adapter/adapter_model.safetensors")
    for way in WAYS:
        assert losses[way] == pytest.approx(losses["whole"], rel=1e-4)  # some kernels sum in another order
        assert relative_error(adapters[way], adapters["whole"]) <= 1e-2, way
    # the same products of the same numbers
    assert losses["copied"] == losses["gathered"]
    assert relative_error(adapters["copied"], adapters["gathered"]) == 0
