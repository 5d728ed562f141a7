"""Optimizer step in backward: each parameter is updated as soon as its gradient is there, which is then freed.

    updates = StepInBackward(params, optimizer)                       # once, before the loop
    grad_norm, found_inf = updates.backward(loss / supervised)        # backward, clipping's norm, step and zero_grad in one

The gradients never exist all at once: of 4 bytes per parameter (2 in bf16) only the largest tensor's are left. The price:
the norm is known only when every parameter has been updated, so that nothing can be clipped by it, and a gradient has to be
whole in one backward, of one micro-batch on one process (torchft/checks.py refuses the rest).
"""

from functools import partial

import torch
from torch import Tensor, nn

from torchft.modules.sharding import local
from torchft.optim import step_optimizer


class StepInBackward:
    """Hooks on `params`, so that `backward` is all there is to a step. The learning rate must be set before it.

    The parameters get the bits that backward, `step_optimizer` and `zero_grad` would give them, except where a step is not
    finite: a loss that is not changes nothing, a gradient that is not leaves its own tensor and that tensor's moments as
    they were, while others may have been updated by then. `found_inf` tells of both.
    """

    def __init__(self, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._zero: Tensor | None = None  # in a backward: 0, or NaN if the loss is not finite
        # A parameter with two names, as a tied embedding's, has one gradient: autograd adds both uses up before the hook.
        unique = list(dict.fromkeys(params.values()))
        self._norms = torch.zeros(len(unique), device=unique[0].device)  # fp32, of the gradients
        for param, norm in zip(unique, self._norms, strict=True):
            assert param.grad is None, "a gradient is there already: it would be added to the next one"
            param.register_post_accumulate_grad_hook(partial(self._update, norm))

    def backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiate a scalar loss, updating every parameter on the way.

        Returns the norm of all gradients and found_inf (1.0 if the norm or the loss is not finite, else 0.0): fp32 scalars
        on the device, as `clip_and_check` does.
        """
        self._zero = zero = loss.detach() * 0
        self._norms.zero_()
        try:
            loss.backward()
        finally:
            self._zero = None
        grad_norm = self._norms.double().square().sum().sqrt().float()
        return grad_norm, (grad_norm * zero).isnan().float()

    @torch.no_grad()
    def _update(self, norm: Tensor, param: Tensor) -> None:
        """Few launches: a model has hundreds of parameters, most of them small, and the GPU waits between two."""
        assert self._zero is not None, "parameters are updated in backward: call StepInBackward.backward(loss)"
        torch.linalg.vector_norm(local(param.grad), dtype=torch.float32, out=norm)
        spoiled = norm * self._zero  # NaN if either is not finite
        found_inf = torch.empty_like(spoiled)
        step_optimizer(self._optimizer, torch.ne(spoiled, spoiled, out=found_inf))  # of this parameter: no other has a gradient now
        param.grad = None
