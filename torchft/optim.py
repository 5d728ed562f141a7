"""AdamW, its learning-rate schedule, gradient clipping and the check for non-finite steps.

Two optimizers: torch's fused AdamW, and torchao's AdamW with 8-bit states (Dettmers et al. 2021,
https://arxiv.org/abs/2110.02861), which needs a C compiler. Nothing here waits for the device, but for the 8-bit
optimizer's check. Left out: schedules with state (the learning rate is a function of the step, so that a resumed run
needs none) and bf16 parameters (at small learning rates AdamW does not move them, pytorch/torchtune#2254).
"""

import logging
import math
import warnings

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.config import OptimConfig
from torchft.errors import UserError
from torchft.modules.compiler import missing_compiler
from torchft.modules.nf4 import quiet_import

TABLES = ("embed_tokens.weight", "lm_head.weight")


def build_optimizer(params: dict[str, nn.Parameter], cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `params` (name -> fp32 Parameter, all on one device); 1-D parameters, embeddings and heads get no decay.

    Raises UserError where `optim.name` is unknown, or needs a compiler that this machine lacks.
    """
    assert params, "no trainable parameter"
    assert all(param.dtype == torch.float32 for param in params.values()), "trainable parameters are kept in fp32"
    groups = _parameter_groups(params, cfg.weight_decay)
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    if cfg.name == "adamw_8bit":
        return _build_8bit(groups, cfg, betas, next(iter(params.values())).device)
    raise UserError(f"optim.name is {cfg.name!r}: choose adamw or adamw_8bit")


def _parameter_groups(params: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """What is decayed and what is not; a group without parameters is left out."""
    # Norm gains, biases and DoRA magnitudes are scales, not directions: decay would pull them to 0 for nothing. Rows of an
    # embedding or a head would be decayed at every step and trained only where their token occurs; those that are frozen
    # beside added tokens must not move at all.
    decayed = {name for name, param in params.items() if param.ndim > 1 and not name.endswith(TABLES)}
    matrices = [param for name, param in params.items() if name in decayed]
    others = [param for name, param in params.items() if name not in decayed]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _build_8bit(
    groups: list[dict], cfg: OptimConfig, betas: tuple[float, float], device: torch.device
) -> torch.optim.Optimizer:
    """torchao's AdamW8bit. Its update is compiled at the first step; states below 4,096 values stay in fp32."""
    if missing := missing_compiler(device):
        raise UserError(
            f"optim.name is adamw_8bit, which torch.compile has to build, and this machine lacks {missing}: "
            "install it, or set optim.name=adamw"
        )
    # torchao reports extensions that this machine cannot load, and torch a missing cache key: neither is about the run.
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    # It says so where CUDA's compiler is installed and no GPU is in use.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with quiet_import():
        from torchao.optim import AdamW8bit  # here: its import takes seconds
    return AdamW8bit(groups, lr=cfg.lr, betas=betas, eps=cfg.eps)


def lr_at(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of a run of `total_steps`: a pure function.

    Rises linearly over `warmup_steps` (the first step already has lr / warmup_steps, the last of them lr), then stays,
    or falls along a line or half a cosine towards lr * min_lr_ratio, which it would reach at step `total_steps`.
    """
    if cfg.schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"optim.schedule is {cfg.schedule!r}: choose constant, linear or cosine")
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)  # 0 .. 1
    remaining = 1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * remaining)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao: a number would be baked into the compiled update
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def clip_and_check(params: dict[str, nn.Parameter], max_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Clip the gradients to the global norm `max_norm` (0: leave them) and look for a non-finite step, on the device.

    `loss`: the step's, a scalar; over several processes the global one, so that the verdict is the same everywhere.
    Returns the norm before clipping and found_inf (1.0 if the norm or the loss is not finite, else 0.0): fp32 scalars.
    """
    grads = [param.grad for param in params.values() if param.grad is not None]
    assert grads, "no parameter has a gradient: was backward called?"
    grad_norm = nn.utils.get_total_norm(grads)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()  # of all shards
    found_inf = (~(torch.isfinite(grad_norm) & torch.isfinite(loss))).float()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(params.values(), max_norm, grad_norm)
    return grad_norm, found_inf


def step_optimizer(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """One update; with found_inf 1.0 none at all: parameters, moments and step counters stay as they are."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by the fused kernel, as GradScaler sets it
        optimizer.step()
    elif found_inf.item() == 0:  # torchao's update has no such input: this waits for the device
        optimizer.step()
