"""model.offload=[weights] on GPUs: near the run on the device, continued bit for bit, pinned, and in a fraction of its memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_full_finetune_distributed import exported
from test_lora_single_device import log_records, relative_error
from tiny_training import assert_same

from torchft.names import RECIPES

pytestmark = pytest.mark.gpu
OFFLOADED = "model.offload=[weights]"
MARK = "        sum_over_processes(loss)\n        if not updates:\n"
LOOK = """        for name, param in params.items():
            assert param.device.type == "cpu" and param.to_local().is_pinned() and param.device_mesh.device_type == "cuda", name
            assert param.grad.device.type == "cpu" and all(t.device.type == "cpu" for t in optimizer.state[param].values())
"""


@pytest.fixture(params=[1, 2], ids=["one GPU", "two GPUs"])
def processes(request: pytest.FixtureRequest) -> int:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    return request.param


def train(processes: int, model: Path, data: Path, out: Path, *more: str, recipe: str = "full_finetune_distributed") -> Path:
    """In processes of their own, as a user starts them; `recipe`: a name or a file."""
    values = {"model.path": model, "model.dtype": "float32", "model.compile": "off", "data.train": data, "run.out": out}
    values |= {"data.packing": "false", "data.max_seq_len": 128, "data.valid_fraction": 0.25, "run.epochs": 2}
    values |= {"run.global_batch_size": 8, "run.micro_batch_size": 2, "run.max_steps": 4, "run.save_every": 2}
    values |= {"run.keep_last": 9, "run.sample_rows": 1, "run.max_new_tokens": 4, "run.deterministic": "true", "optim.lr": 0.003, "optim.warmup_steps": 2}
    values |= dict(text.split("=", 1) for text in more)
    number = [] if processes == 1 else ["--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", "torchft", "run", *number, recipe, *(f"{key}={value}" for key, value in values.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "4"})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in log_records(out) if "loss" in record]


def test_the_curve_of_the_device(small_model: Path, chat_data: Path, tmp_path: Path, processes: int) -> None:
    """AdamW on the CPU rounds otherwise than on the GPU. A copy of the recipe looks where everything lies at each step."""
    text = (RECIPES / "full_finetune_distributed.py").read_text()
    assert text.count(MARK) == 1
    looking = tmp_path / "mine.py"
    looking.write_text(text.replace(MARK, LOOK + MARK))
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 1e-2)):
        more = (f"model.dtype={dtype}", "optim.max_grad_norm=0.1", "data.new_tokens=['<|a|>']")  # tables of uneven parts
        device = train(processes, small_model, chat_data, tmp_path / f"{dtype}_device", *more)
        host = train(processes, small_model, chat_data, tmp_path / f"{dtype}_host", *more, OFFLOADED, recipe=str(looking))
        assert losses(host) == pytest.approx(losses(device), rel=tolerance)
        assert relative_error(exported(host), exported(device)) <= 10 * tolerance


def test_a_run_that_goes_on(small_model: Path, chat_data: Path, tmp_path: Path, processes: int) -> None:
    straight = train(processes, small_model, chat_data, tmp_path / "straight", OFFLOADED)
    shutil.copytree(straight, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/step_000004")
    again = train(processes, small_model, chat_data, tmp_path / "again", OFFLOADED, "run.resume=auto")
    assert_same(exported(again), exported(straight))
    assert losses(again) == losses(straight)


def test_the_device_holds_a_few_blocks(small_model: Path, chat_data: Path, tmp_path: Path, processes: int) -> None:
    """100 million parameters of random weights: 16 bytes each on the device, or two blocks and the tables."""
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    config = json.loads((model / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 128}
    (model / "config.json").write_text(json.dumps(config | sizes))
    peaks = []
    for name, more in (("device", []), ("host", [OFFLOADED])):
        options = ("model.weights=random", "run.deterministic=false", "run.sample_rows=0", "run.save_every=0")
        out = train(processes, model, chat_data, tmp_path / name, *options, *more)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        peaks.append(max(line.get("peak_memory_gib", 0) for line in lines))
    assert 0 < peaks[1] < peaks[0] * (0.5 if processes == 1 else 0.8)
