"""Mixtures of experts: a router and E gated feed forwards, of which each token takes k.

The experts' matrices lie one below the other in one parameter per projection, (E * out, in), under the checkpoint's own name
but for the expert's number: files hold `experts.3.gate_proj.weight`, the model `experts.gate_proj.weight` with expert 3's rows
at 3 * out. (gpt-oss's files hold stacks too, (E, in, out).) As rows they are divided over processes like those of any linear,
8 experts over 16 processes too, their LoRA's A and B likewise; and NF4 codes a whole stack as one tensor, so that codes do not
depend on the number of processes. The files' side is torchft/stored.py.

Legend: B batch, T tokens, N = B * T, k experts of a token, M = N * k rows, E experts, D hidden, F intermediate of one expert.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.balance import RouterBalance
from torchft.modules.feed_forward import ACTIVATIONS, FeedForward, PackedFeedForward
from torchft.modules.nf4_experts import grouped_linear
from torchft.modules.routing import Rows, combine, dispatch, route, sort_by_expert

if TYPE_CHECKING:  # that module imports this one
    from torchft.modules.transformer import TransformerConfig


@dataclass(frozen=True)
class MoeConfig:
    """What a mixture has beside the sizes of a TransformerConfig."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool = True  # the chosen experts' weights sum to one
    dense_layers: tuple[int, ...] = ()  # indices of layers that have a plain feed forward instead
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of an expert's linears, in this order
    clamp: tuple[float, float] | None = None  # alpha and limit of ClampedExperts, which they are then
    aux_loss_coef: float = 0.0  # of the router's auxiliary loss (balance.py) in a step's; 0 = without

    def __post_init__(self) -> None:
        assert 1 <= self.num_experts_per_tok <= self.num_experts, self


class ExpertLinear(nn.Linear):
    """E linears, of which each row goes through its expert's: weight (E * out, in), bias (E * out,).

    stacked: files hold them as one tensor (E, in, out), not one by one.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, stacked: bool = False) -> None:
        super().__init__(in_features, num_experts * out_features, bias=stacked)
        self.num_experts, self.stacked = num_experts, stacked

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (M, in) sorted by expert -> (M, out)
        return expert_linear(x, self.weight, self.bias, self.num_experts, rows)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {super().extra_repr()}"


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, num_experts: int, rows: Rows) -> Tensor:
    """W_e x + b_e for each row's expert e: x (M, in), weight (E * out, in) dense or NF4, bias (E * out,) -> (M, out)."""
    y = grouped_linear(x, weight, num_experts, rows.offsets)
    return y if bias is None else y + F.embedding(rows.experts, bias.unflatten(0, (num_experts, -1))).to(y.dtype)


class Experts(nn.Module):
    """Row by row y = down(act(gate(x)) * up(x)), each by its expert."""

    def __init__(self, config: "TransformerConfig", moe: MoeConfig) -> None:
        super().__init__()
        self.activation, self.names = ACTIVATIONS[config.activation], moe.names
        gate, up, down = moe.names
        hidden, width = config.hidden_size, moe.intermediate_size
        self.add_module(gate, ExpertLinear(moe.num_experts, hidden, width))
        self.add_module(up, ExpertLinear(moe.num_experts, hidden, width))
        self.add_module(down, ExpertLinear(moe.num_experts, width, hidden))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (M, D) -> (M, D)
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(gate(x, rows)) * up(x, rows), rows)  # inside: (M, F)


class ClampedExperts(nn.Module):
    """gpt-oss's: y = down((up + 1) * gate * sigmoid(alpha * gate)), gate at most `limit`, up within +-limit, all with biases.

    gate and up are one linear, whose rows alternate between the two.
    """

    def __init__(self, config: "TransformerConfig", moe: MoeConfig) -> None:
        super().__init__()
        self.alpha, self.limit = moe.clamp
        hidden, width = config.hidden_size, moe.intermediate_size
        self.gate_up_proj = ExpertLinear(moe.num_experts, hidden, 2 * width, stacked=True)
        self.down_proj = ExpertLinear(moe.num_experts, width, hidden, stacked=True)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (M, D) -> (M, D)
        gate, up = self.gate_up_proj(x, rows).unflatten(-1, (-1, 2)).unbind(-1)  # (M, F) each
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj((up + 1) * gate * (self.alpha * gate).sigmoid(), rows)


class SparseFeedForward(nn.Module):
    """The weighted sum of each token's k experts."""

    balance: RouterBalance | None = None  # of all layers together, where there is an auxiliary loss: see share_balance

    def __init__(self, config: "TransformerConfig", moe: MoeConfig) -> None:
        super().__init__()
        self.top_k, self.normalised = moe.num_experts_per_tok, moe.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, moe.num_experts, bias=False)
        self.experts = Experts(config, moe)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return mixture(x, self.gate, self.experts, self.top_k, self.normalised, self.balance)


class ClampedFeedForward(nn.Module):
    """The same with gpt-oss's experts, under its names: the router, which has a bias, is `router`."""

    balance: RouterBalance | None = None

    def __init__(self, config: "TransformerConfig", moe: MoeConfig) -> None:
        super().__init__()
        self.top_k, self.normalised = moe.num_experts_per_tok, moe.norm_topk_prob
        self.router = nn.Linear(config.hidden_size, moe.num_experts)
        self.experts = ClampedExperts(config, moe)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return mixture(x, self.router, self.experts, self.top_k, self.normalised, self.balance)


def mixture(
    x: Tensor, router: nn.Module, experts: nn.Module, top_k: int, normalised: bool, balance: RouterBalance | None
) -> Tensor:
    """x (B, T, D) -> (B, T, D)."""
    flat = x.flatten(0, -2)  # (N, D)
    logits = router(flat)  # (N, E)
    if balance is not None:
        logits = balance.watch(logits.float())
    weights, chosen = route(logits, top_k, normalised)
    rows, order = sort_by_expert(chosen, logits.shape[-1])
    return combine(experts(dispatch(flat, order, top_k), rows), order, weights).view(x.shape)


def build_feed_forward(config: "TransformerConfig", layer: int) -> nn.Module:
    """The feed forward of layer `layer`, counted from 0."""
    if config.moe is not None and layer not in config.moe.dense_layers:
        return (SparseFeedForward if config.moe.clamp is None else ClampedFeedForward)(config, config.moe)
    plain = PackedFeedForward if config.packed_gate_up else FeedForward
    return plain(config.hidden_size, config.intermediate_size, config.mlp_bias, config.activation)


def share_balance(layers: nn.ModuleList, moe: MoeConfig | None) -> RouterBalance | None:
    """Give all routers of a model one RouterBalance, where its config asks for the auxiliary loss. Returns it."""
    if moe is None or not moe.aux_loss_coef:
        return None
    balance = RouterBalance(moe.num_experts, moe.num_experts_per_tok, moe.aux_loss_coef)
    for module in layers.modules():
        if isinstance(module, (SparseFeedForward, ClampedFeedForward)):
            module.balance = balance
    return balance
