"""A base divided over two GPUs: copied out of each other's memory or gathered by NCCL, as a graph or not, it computes what a whole one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]
TESTS = Path(__file__).parent


def test_both_ways_compute_what_the_whole_model_does() -> None:
    """tests/divided_peers.py, in processes of their own: steps, recomputed and not, with a validation and answers between them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(TESTS / "divided_peers.py")]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"rank {rank}: all equal" in done.stdout for rank in (0, 1)), done.stdout
