"""The kernels compile for a GPU on a machine that has none: what Triton's interpreter accepts, its compiler may refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for module, name, types, constants in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module("torchft.kernels." + module), name)
    for dtype in ("bf16", "fp32"):
        signature = dict(zip(kernel.arg_names, types.format(dtype).split())) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(name, dtype)
"""
KERNELS = [
    ("adamw", "_adamw_kernel", "*bf16 *{0} *bf16 *bf16 *fp32 *fp32 *fp32 i32 i64 i32 fp32 fp32 fp32 fp32 fp32",
     {"BLOCKS": 8}),
    ("lora_linear", "_adapter_kernel", "*fp32 *fp32 *{0} *{0} i32 i32 i32 i32 i32 i32 fp32 i32 i32",
     {"RANK": 16, "PAD": 64, "ROWS": 64, "BLOCK": 1024}),
    ("rms_norm", "_forward_kernel", "*{0} *{0} *{0} *{0} *{0} *fp32 i32 i32 fp32", {"BLOCK_D": 4096}),
    ("rms_norm", "_backward_kernel", "*{0} *{0} *fp32 *{0} *{0} *{0} *{0} i32 i32 i32", {"BLOCK_D": 4096}),
    ("rms_norm", "_weight_backward_kernel", "*{0} *{0} *fp32 *{0} *{0} *fp32 i32 i32 i32", {"ROWS": 32, "BLOCK_D": 4096}),
    ("linear_cross_entropy", "_logprob_kernel", "*{0} *i64 *fp32 *fp32 i32 i32 i32",
     {"V": 128256, "IGNORE": -100, "BLOCK": 8192, "WRITE_GRADIENT": True}),
    ("scaled_cast", "_scaled_cast_kernel", "*fp32 *fp32 *{0} i32", {"BLOCK": 4096}),
    ("int8_rows", "_decode_kernel", "*i8 *fp32 *{0}", {"D": 4096, "BLOCK": 4096}),
    ("gather_rows", "_gather_kernel", "*{0} *i64 *{0} i32", {"D": 5376, "BLOCK": 4096}),
    ("fp8_quantize", "_quantize_kernel", "*{0} *fp32 *fp8e4nv *fp32 i32 i32", {"BLOCK": 4096, "BLOCKS": 1}),
    ("fp8_quantize", "_quantize_kernel", "*{0} *fp32 *fp8e4nv *fp32 i32 i32", {"BLOCK": 4096, "BLOCKS": 9}),
    ("fp8_transpose", "_transpose_kernel", "*u8 *u8 i32 i32 i32", {"TILE": 128}),
    ("fp8_rms_norm", "_kernel", "*{0} *{0} *{0} *{0} *{0} *fp32 *fp8e4nv *fp32 i32 fp32", {"BLOCK_D": 4096}),
    ("lora_gate", "_gate_kernel", "*{0} *{0} *{0} *{0} *{0} *{0} i32 fp32 i32 i32",
     {"RANK_G": 16, "RANK_U": 16, "PAD_G": 16, "PAD_U": 16, "ROWS": 64, "COLUMNS": 128}),
    ("lora_gate", "_gate_backward_kernel", "*{0} *{0} *{0} *{0} *{0} *{0} *{0} *{0} *{0} *{0} i32 i32 fp32 i32 i32",
     {"RANK_A": 16, "RANK_G": 16, "RANK_U": 16, "PAD_A": 16, "PAD_G": 16, "PAD_U": 16, "ROWS": 64, "COLUMNS": 128}),
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests marked gpu compile and run them")
def test_the_kernels_compile_for_sm_90() -> None:
    """Those with branches and loops; in a process of its own, since this one has the interpreter."""
    command = [sys.executable, "-c", SOURCE, json.dumps(KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2 * len(KERNELS)


def test_program_ids_are_64_bit_before_they_are_multiplied():
    """PITFALLS G1: an offset of more than 2^31 elements from a 32-bit id is wrong and often finite. A remainder stays small."""
    folder = Path(__file__).resolve().parents[2] / "kernels"
    lines = [line for file in folder.glob("*.py") for line in file.read_text().splitlines() if "program_id(" in line]
    assert len(lines) > 10
    assert not [line for line in lines if ".to(tl.int64)" not in line and not re.search(r"program_id\(\d\) % ", line)]
