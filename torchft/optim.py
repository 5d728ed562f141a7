"""AdamW, its learning-rate schedule, gradient clipping and the check for non-finite steps.

    optim.name    parameters and gradients    bytes per parameter, with gradient and moments
    adamw         fp32                        16   torch's fused AdamW
    adamw_8bit    fp32                        10   torchao's, moments in 8 bits (Dettmers et al. 2021,
                                                   https://arxiv.org/abs/2110.02861); needs a C compiler
    adamw_bf16    bf16                         8   moments in bf16 too, rounded stochastically (kernels/adamw.py)

With optim.in_backward (torchft/in_backward.py) the gradients' 4 or 2 bytes go. Plain AdamW on bf16 parameters is not offered:
at small learning rates it does not move them (pytorch/torchtune#2254). An edited recipe may put any torch.optim.Optimizer in
`build_optimizer`'s place, if its step takes no closure: its groups' "lr_scale" is theirs, and tensors and numbers of its
state are saved. Nothing here waits for the device, but for optimizers that cannot skip a step by themselves, as torch's fused ones
do: the 8-bit one and most others. Left out: schedules with state (the learning rate is a function of the step, so that a
resumed run needs none).
"""

import logging
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from torchft.adamw_bf16 import AdamWBf16
from torchft.config import OptimConfig
from torchft.errors import ConfigError, UserError
from torchft.modules.compiler import missing_compiler
from torchft.modules.nf4 import quiet_import
from torchft.modules.sharding import local, num_parts, on_mesh

TABLES = ("embed_tokens.weight", "lm_head.weight")


def build_optimizer(params: dict[str, nn.Parameter], cfg: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over `params` (name -> Parameter, all in one place); 1-D parameters, embeddings and heads get no decay.

    `seed`, the run's, is that of adamw_bf16's rounding. Raises ConfigError where the parameters are not in the dtype that
    `optim.name` wants (fp32; bf16 for adamw_bf16), UserError where that is unknown, or needs what this machine lacks.
    """
    assert params, "no trainable parameter"
    if cfg.name not in ("adamw", "adamw_8bit", "adamw_bf16"):
        raise UserError(f"optim.name is {cfg.name!r}: choose adamw, adamw_8bit or adamw_bf16")
    _check_dtypes(params, cfg.name)
    groups = _parameter_groups(params, cfg.weight_decay)
    options = {"lr": cfg.lr, "betas": (cfg.betas[0], cfg.betas[1]), "eps": cfg.eps}
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if cfg.name == "adamw_bf16":
        return _build_bf16(groups, options, seed)
    return _build_8bit(groups, options, next(iter(params.values())).device)


def _check_dtypes(params: dict[str, nn.Parameter], optimizer: str) -> None:
    wanted = torch.bfloat16 if optimizer == "adamw_bf16" else torch.float32
    for name, param in params.items():
        if param.dtype != wanted:
            others = "adamw_bf16" if optimizer != "adamw_bf16" else "adamw or adamw_8bit"
            raise ConfigError(
                f"optim.name={optimizer} trains parameters in {wanted}, and {name} is in {param.dtype}: use {others}"
            )


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


def _build_bf16(groups: list[dict], options: dict, seed: int) -> torch.optim.Optimizer:
    try:
        return AdamWBf16(groups, seed=seed, **options)
    except ModuleNotFoundError as error:  # Triton is not everywhere
        raise UserError(f"optim.name is adamw_bf16, which needs {error.name}: install it, or set optim.name=adamw") from None


def _build_8bit(groups: list[dict], options: dict, device: torch.device) -> torch.optim.Optimizer:
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
    optimizer = AdamW8bit(groups, **options)
    _keep_in_fp32(optimizer)
    return optimizer


def blocks_fit(param: Tensor) -> bool:
    """Whether 8-bit states of a parameter that is divided over processes consist of whole blocks of 256 on each of them.

    Then the parts' codes and scales, put together, are those of the whole tensor, for any number of processes. It takes
    4,096 values in the smallest part, and rows, or equal parts, of a multiple of 256.
    """
    rows, width = param.shape[0], param.numel() // max(1, param.shape[0])
    most = -(-rows // num_parts(param))  # rows of all parts but the last
    least = rows - (num_parts(param) - 1) * most
    return least * width >= 4096 and (width % 256 == 0 or (least == most and most * width % 256 == 0))


def _keep_in_fp32(optimizer: torch.optim.Optimizer) -> None:
    """fp32 states for the divided parameters that have none and no room for whole blocks; torchao would decide per part."""
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if isinstance(param, DTensor) and not optimizer.state[param] and not blocks_fit(param):
            moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(0.0), **moments}


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
    """Give every group this learning rate, times its "lr_scale" if it has one (LoRA+: 16 for lora_B, say).

    Raises UserError where groups came with learning rates of their own, which would be lost.
    """
    own = [float(group["lr"]) for group in optimizer.param_groups if "lr_scale" not in group]
    if len(set(own)) > 1:
        raise UserError(
            f"the optimizer's groups have the learning rates {own}, and each "
            "step's takes their place: give a group \"lr_scale\", by which it is multiplied, instead of \"lr\""
        )
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # torchao: a number would be baked into the compiled update
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def norm_and_check(
    params: dict[str, nn.Parameter], max_norm: float, loss: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients' global norm, whether the step is not finite, and the factor that clips, where the gradients are.

    `loss`: the step's, a scalar; over several processes the global one, so that the verdict is the same everywhere.
    Returns three fp32 scalars: the norm before clipping; found_inf (1.0 if the norm or the loss is not finite, else 0.0);
    and what `step_optimizer` multiplies the gradients by (None for max_norm 0: it leaves them).
    """
    grads = [param.grad for param in params.values() if param.grad is not None]
    assert grads, "no parameter has a gradient: was backward called?"
    grad_norm = _global_norm(grads)
    finite = torch.isfinite(loss).to(grad_norm.device)  # one wait, where gradients are in CPU memory and the loss is not
    found_inf = (~(torch.isfinite(grad_norm) & finite)).float()
    # as torch.nn.utils.clip_grads_with_norm_
    return grad_norm, found_inf, (max_norm / (grad_norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else None


def _global_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients, of all processes where they are divided, in fp32 whatever their dtype."""
    layouts: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        layout = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else ()
        layouts.setdefault(layout, []).append(local(grad))
    squares = []
    for layout, parts in layouts.items():
        total = torch.stack(torch._foreach_norm(parts, 2.0, dtype=torch.float32)).square().sum()
        if layout:
            mesh, placements = layout
            sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
            total = on_mesh(total, mesh, sums).full_tensor()
        squares.append(total)
    return torch.stack(squares).sum().sqrt()


def clip_and_check(params: dict[str, nn.Parameter], max_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """`norm_and_check` that clips the gradients at once: the norm before clipping and found_inf."""
    grad_norm, found_inf, clip = norm_and_check(params, max_norm, loss)
    if clip is not None:
        _clip(params.values(), clip)
    return grad_norm, found_inf


@torch.no_grad()
def _clip(params: Iterable[Tensor], clip: Tensor) -> None:
    torch._foreach_mul_([local(param.grad) for param in params if param.grad is not None], clip)


def step_optimizer(optimizer: torch.optim.Optimizer, found_inf: Tensor, clip: Tensor | None = None) -> None:
    """One update; with found_inf 1.0 none at all: parameters, moments and step counters stay as they are.

    `clip`: the gradients are multiplied by it. adamw_bf16 does so while it reads them, at no cost; for the others they are
    changed in place.
    """
    if isinstance(optimizer, AdamWBf16):
        optimizer.clip = clip
    elif clip is not None:
        _clip((param for group in optimizer.param_groups for param in group["params"]), clip)
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused ones and AdamWBf16: what GradScaler asks for
        optimizer.found_inf = found_inf  # type: ignore[union-attr]
        optimizer.step()
    elif found_inf.item() == 0:  # the others have no such input: this waits for the device
        first = not optimizer.state
        optimizer.step()
        if first:
            _check_savable(optimizer)


def _check_savable(optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError for a state that no checkpoint could hold: in the first step, and not when a whole run is to be saved."""
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if not (_is_savable(value, param) and "/" not in str(key)):
                kind = f"{type(value).__name__} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"the state of {type(optimizer).__name__} holds {key!r}, a {kind}, beside a parameter of shape "
                    f"{tuple(param.shape)}: what can be saved and continued are numbers and plain tensors, and beside a parameter "
                    "that is divided over processes tensors that are divided alike"
                )


def _is_savable(value: object, param: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (int, float))
    plain = type(local(value)).__name__ in ("Tensor", "OptimState8bit")  # the latter is torchao's
    alike = isinstance(value, DTensor) and value.shape == param.shape
    return plain and (alike or value.numel() == 1 or not isinstance(param, DTensor))
