"""AdamW for parameters and moments in bf16, rounded stochastically: `optim.name: adamw_bf16`.

The update itself, and why it rounds so, stand in kernels/adamw.py. 8 bytes per parameter with its gradient, half of what
AdamW in fp32 takes. Left out: closures, sparse gradients, AMSGrad.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchft.modules.sharding import local, rows_held


class AdamWBf16(torch.optim.Optimizer):
    """AdamW over bf16 parameters, ordinary or divided by rows (FSDP2), with bf16 or fp32 gradients.

    The state of a parameter is `exp_avg` and `exp_avg_sq`, in its dtype and layout, and `step`, a fp32 number beside it.
    The random bits of a step follow from `seed`, the parameter's place in the groups and its step counter: a run that goes
    on needs nothing else, and a divided parameter is rounded as a whole one.

    `found_inf` and `clip` are read at each step: fp32 numbers on the parameters' device, or None. With found_inf 1.0
    nothing changes, the step counters included; clip is multiplied into the gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        import torchft.kernels.adamw  # noqa: F401 here: Triton is not everywhere

        # `fused` is for load_state_dict, which puts step counters on the parameters' device where a group says so.
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True})
        for param in (param for group in self.param_groups for param in group["params"]):
            assert param.dtype == torch.bfloat16, f"AdamWBf16 takes bf16 parameters, got {param.dtype}"
        self.seed = seed
        self._step_supports_amp_scaling = True  # it reads found_inf, as torch's fused optimizers do
        self.found_inf: Tensor | None = None
        self.clip: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        numbered = enumerate((group, param) for group in self.param_groups for param in group["params"])
        todo = [(index, group, param) for index, (group, param) in numbered if param.grad is not None]
        if not todo:
            return
        found_inf = torch.zeros((), device=todo[0][2].device) if self.found_inf is None else self.found_inf
        for _, _, param in todo:
            if not self.state[param]:
                self.state[param] = {
                    "step": torch.zeros((), device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        # A list: of one tensor it would take the number, for which the host waits.
        torch._foreach_add_([self.state[param]["step"] for _, _, param in todo], [1 - found_inf] * len(todo))
        for index, group, param in todo:
            self._update(index, group, param, found_inf)

    def _update(self, index: int, group: dict[str, Any], param: Tensor, found_inf: Tensor) -> None:
        from torchft.kernels.adamw import Rule, adamw_

        state = self.state[param]
        first = rows_held(param).start * (param.numel() // max(1, param.shape[0]))
        adamw_(
            (local(param), local(param.grad), local(state["exp_avg"]), local(state["exp_avg_sq"])),
            state["step"],
            Rule(group["lr"], group["betas"], group["eps"], group["weight_decay"]),
            (self.seed, index, first),
            found_inf=found_inf,
            clip=self.clip,
            eager=not param.is_cuda,
        )
