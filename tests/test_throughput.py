"""FLOPs against torch's own counter, the table of GPUs, memory."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchft.modules.lora import LoraSpec, add_lora, init_lora
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import CausalLM, TransformerConfig
from torchft.throughput import flops_per_token, peak_flops, peak_memory_gib

HIDDEN, KV, RANK, TOKENS = 32, 16, 4, 2 * 16


def make_model() -> CausalLM:
    config = TransformerConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(8),
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def counted_matmuls(model: CausalLM) -> int:
    """FLOPs of the matrix products in one forward and backward of 2 rows of 16 tokens, as torch counts them."""
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).backward()
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))


def test_full_fine_tuning_is_6_flops_per_weight() -> None:
    model = make_model()
    assert TOKENS * flops_per_token(model, 0) == counted_matmuls(model)


def test_lora_is_4_flops_per_frozen_weight() -> None:
    """But for the input gradients of the first block's q, k and v and of their adapters, which nothing needs."""
    model = make_model()
    add_lora(model, LoraSpec(RANK, 8.0, 0.0, False, False, ("all-linear",)))
    init_lora(model, torch.Generator().manual_seed(0))
    not_needed = 2 * TOKENS * HIDDEN * (HIDDEN + 2 * KV + 3 * RANK)
    assert TOKENS * flops_per_token(model, 0) == counted_matmuls(model) + not_needed


def test_attention_costs_half_of_all_pairs_three_times() -> None:
    """scores + sum = 2 x 2 x T^2 x heads x head_dim forward if every pair counted; causal: half; backward: twice."""
    model = make_model()
    all_pairs = 2 * (2 * 2 * 16 * 16 * 4 * 8) * 2  # layers x one row x rows
    assert TOKENS * (flops_per_token(model, 16) - flops_per_token(model, 0)) == 3 * all_pairs / 2


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_go_by_whole_names(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_memory_on_cpu_is_the_resident_set() -> None:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)


@pytest.mark.gpu
def test_memory_on_gpu_is_what_tensors_used() -> None:
    torch.cuda.reset_peak_memory_stats()
    torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    assert 0.25 <= peak_memory_gib(torch.device("cuda")) < 10
