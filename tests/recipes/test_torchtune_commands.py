"""D2's promises on the command line: torchtune's three commands with one file, and whose traceback two processes show."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_launch import frames
from test_lora_single_device import log_records

COMMANDS = """
tune cp llama3_1/8B_lora ./my_config.yaml
tune run lora_finetune_single_device --config ./my_config.yaml
tune run --nproc_per_node 4 lora_finetune_distributed --config ./my_config.yaml
"""


def in_folder(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """`tune ...` typed in a folder."""
    argv = [sys.executable, "-m", "torchft", *command.split()[1:]]
    on_the_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, env=on_the_cpu)


def test_torchtunes_three_commands_run_as_printed_with_one_file(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """The 8B model stands in for itself as two small layers; the user names his data in his copy, as one does."""
    copied, *runs = COMMANDS.strip().splitlines()
    assert in_folder(tmp_path, copied).returncode == 0
    config = yaml.safe_load((tmp_path / "my_config.yaml").read_text())
    shutil.copytree(small_model, tmp_path / config["model"]["path"])
    config["data"] |= {"train": str(chat_data), "valid_fraction": 0.25, "packing": False}
    config["run"] |= {"max_steps": 3, "max_new_tokens": 4}
    config["model"] |= {"dtype": "float32"}
    (tmp_path / "my_config.yaml").write_text(yaml.safe_dump(config))
    records = []
    for command in runs:
        done = in_folder(tmp_path, command)
        assert done.returncode == 0, done.stderr
        assert "saved and verified: out/llama3_1_8B_lora/adapter" in done.stdout
        records.append(log_records(tmp_path / "out/llama3_1_8B_lora"))
    assert "each of 4" in done.stdout or "divided over 4 processes" in done.stdout
    assert len(records[0]) == len(records[1]) == 4
    for single, distributed in zip(*records, strict=True):
        assert distributed == pytest.approx(single, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_shape_in_the_loop_of_a_copy(small_model: Path, chat_data: Path, tmp_path: Path, processes: int) -> None:
    """The traceback holds the user's file first, then our modules and torch, and no launcher; it is the last thing printed."""
    name, launcher = ("lora_distributed", "--nproc_per_node 2 ") if processes == 2 else ("lora_single_device", "")
    assert in_folder(tmp_path, f"tune cp {name} mine.py").returncode == 0
    copy = tmp_path / "mine.py"
    planted = "            loss += train_batch(model, "
    assert copy.read_text().count(planted) == 1
    wrong = "            model.model.layers[0](torch.ones(2, 3, 9), batch.positions, batch.positions, None)\n"
    copy.write_text(copy.read_text().replace(planted, wrong + planted))
    options = f"model.path={small_model} model.dtype=float32 data.train={chat_data} run.exact_match_rows=0"
    done = in_folder(tmp_path, f"tune run {launcher}mine.py {options}")
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    files = frames(done.stderr)
    assert files[0].endswith("mine.py") and files[1].endswith("mine.py")
    assert any("modules/block.py" in file for file in files) and any("/torch/nn/" in file for file in files)
    assert not any(word in file for file in files for word in ("launch", "elastic", "cli.py"))
    assert done.stderr.rstrip().splitlines()[-1].startswith("RuntimeError: ")
