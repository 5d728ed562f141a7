"""The device of a run: which one, how repeatable, and whether blocks are compiled for it."""

import os
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch._functorch.config

from torchft.errors import UserError
from torchft.modules.compiler import missing_compiler
from torchft.modules.lora import lora_layers
from torchft.modules.transformer import CausalLM
from torchft.ranks import rank

# Share of what compiled blocks would keep for backward that they may keep. At 0.8 norms and gates are computed again and no product
# is: of Llama 3.2 1B 12.6 instead of 18.6 tensors the size of the hidden state (at 0.6 attention would be, too). Not with dropout,
# of which some budget has the masks drawn again: other ones (torch 2.13; at 0.3 gradients were 0.9 of their size off).
# https://pytorch.org/blog/activation-checkpointing-techniques/
ACTIVATION_BUDGET = 0.8


def setup_device(seed: int, deterministic: bool) -> torch.device:
    """The GPU of this process, else the CPU; all generators are seeded, those of Python and numpy too.

    `deterministic`: a resumed run repeats an uninterrupted one bit for bit on a GPU too, at some speed; on the CPU it does so
    anyway. cuBLAS reads its variable when it is first used, which is after this.
    """
    seed += rank()  # each process draws its own dropout masks
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compile_blocks(model: CausalLM, mode: str, device: torch.device, say: Callable[[str], None] = print) -> None:
    """torch.compile every block in place, so that names stay as they are. What is decided is said in one line.

    mode: on, off, or auto: on for CUDA where a compiler is installed. Raises UserError for `on` where there is none.
    """
    missing = missing_compiler(device)
    if mode == "on" and missing:
        raise UserError(f"model.compile is on, and this machine lacks {missing}: install it, or set model.compile=off")
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return
    if missing:
        say(f"compile: off, since this machine lacks {missing}; the run is slower and takes more memory")
        return
    # fp32 is multiplied as fp32 where it is asked for: nothing that a user should change at every start
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores for float32 matrix multiplication")
    torch._functorch.config.activation_memory_budget = _budget(model)  # read when backward is built, in the first step
    blocks = [block for block in model.model.layers if block.compilable]
    for block in blocks:
        block.compile()
    if blocks:
        say(f"compile: {len(blocks)} blocks, built during the first step")


def _budget(model: CausalLM) -> float:
    dropout = any(layer.dropout > 0 for layer in lora_layers(model).values())
    return 1.0 if dropout else ACTIVATION_BUDGET
