"""The auxiliary loss that keeps a mixture's experts evenly busy (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4-6).

    aux = E * sum_e f_e P_e        f_e  how often e is among a token's k experts: counted, without a gradient
                                   P_e  its probability, softmax(router x)_e

both in the mean over the tokens of a whole optimizer step, padding left out, and over all layers that have a router. For one
batch that is transformers' `load_balancing_loss_func`; theirs is of each micro-batch by itself, and so depends on how a step is
cut.

A product of two means cannot be added up batch by batch, but its gradient can: d aux / d P_e = E f_e is one vector for the
step, the *pull* on each expert. So the choices are counted before the first backward (torchft/balance.py), and then every
router adds the pull's gradient to that of its own logits, p (pull - p . pull) for each token, wherever it stands: in another
micro-batch or process, divided, or computed a second time. The value of the loss that a model returns does not hold it.

Legend: N tokens, k experts of a token, E experts.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torchft.modules.attention import PADDING


class RouterBalance:
    """What all routers of a model share: the step's counts, then the pull that follows from them.

    A forward with gradients needs the pull of its step, and its backward comes before the next batch: a block that is
    recomputed finds there the tokens of the batch that came last.
    """

    def __init__(self, num_experts: int, top_k: int, coef: float) -> None:
        self.num_experts, self.top_k, self.coef = num_experts, top_k, coef
        self.counting = False
        self.sums = torch.empty(0)  # (2, E) fp64 while counting: choices (whole numbers, exact in any order), probabilities
        self.pull: Tensor | None = None  # (E,) fp32: of a step's gradient, on one token in one layer
        self.tokens: Tensor | None = None  # (N, 1) fp32: how often each token of the batch counts

    def see(self, input_ids: Tensor, documents: Tensor | None, branches: Tensor | None) -> None:
        """A batch enters the model; arguments as in CausalLM.forward. A trunk counts once for each of its branches, as it would
        in rows of their own; all documents of the batch have equally many.
        """
        tokens = torch.ones(input_ids.shape, device=input_ids.device)
        if documents is not None:
            tokens = tokens.masked_fill(documents == PADDING, 0)
        if branches is not None:
            tokens = torch.where(branches == 0, tokens * branches.amax(), tokens)
        self.tokens = tokens.view(-1, 1)

    @torch.compiler.disable  # in one graph torch 2.13 can add the pull to topk's gradient, a scatter, before that is written
    def watch(self, logits: Tensor) -> Tensor:
        """The router's `logits` (N, E) fp32 as they are; counted, or with the pull behind them."""
        if self.counting:
            shares = logits.softmax(-1)
            choices = torch.zeros_like(shares).scatter(1, logits.topk(self.top_k, dim=-1).indices, 1.0)
            self.sums += (torch.stack((choices, shares)) * self.tokens).sum(1, dtype=torch.float64)
            return logits
        if not torch.is_grad_enabled():
            return logits
        assert self.pull is not None, "balance_routers(model, batches, ...) comes before the first forward of a step"
        return _Pull.apply(logits, self.pull, self.tokens)

    def start(self, device: torch.device) -> None:
        """From here on forwards are of the step to come, and count."""
        self.counting, self.sums = True, torch.zeros(2, self.num_experts, dtype=torch.float64, device=device)

    def finish(self, scale: float) -> Tensor:
        """`sums` are those of the whole step: set the pull of coef * scale * aux. Returns aux, a scalar fp64."""
        self.counting = False
        rows = self.sums[0].sum() / self.top_k  # tokens times layers
        choices, probabilities = self.sums / rows
        self.pull = (self.coef * scale * self.num_experts / rows * choices).float()
        return self.num_experts * (choices * probabilities).sum()


class _Pull(torch.autograd.Function):
    """Logits as they are, to whose gradient the pull's is added."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, pull: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(logits, pull, tokens)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, pull, tokens = ctx.saved_tensors
        shares = logits.softmax(-1)  # (N, E)
        return grad + tokens * shares * (pull - (shares * pull).sum(-1, keepdim=True)), None, None
