"""A model that gives each sequence one number: the decoder with a linear on the last token's hidden state (a reward model).

As in transformers' `...ForSequenceClassification` with one label: score = w . h, h the normalised hidden state of the
sequence's last token. The head of the language model stays, so that everything else that knows a CausalLM works; it is not
computed.

Legend: B batch, T tokens, D hidden, N sequences.
"""

import torch
from torch import Tensor, nn

from torchft.modules.sharding import place
from torchft.modules.transformer import CausalLM, TransformerConfig


class Score(nn.Module):
    """w (1, D), trained in fp32. No nn.Linear: `all-linear` shall not put an adapter on it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, dtype=torch.float32))


class RewardModel(CausalLM):
    """A CausalLM that scores sequences where it is given `ends`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.score = Score(config.hidden_size)

    def forward(
        self, input_ids: Tensor, *, ends: Tensor | None = None, branches: Tensor | None = None, **others: Tensor
    ) -> Tensor:
        """Scores (N,) fp32 of the sequences that end at `ends` (N,), columns of the flattened (B, T); else as
        CausalLM.forward.
        """
        if ends is None:
            return super().forward(input_ids, branches=branches, **others)
        h = self.model(input_ids, others["positions"], others["documents"], None, branches)  # (B, T, D)
        return h.flatten(0, 1)[ends].float() @ self.score.weight[0]


def last_tokens(sequences: Tensor, num_sequences: int) -> Tensor:
    """Where each sequence ends in the flattened batch, (N,), from the number of each token's sequence (B, T); N is nobody's."""
    flat = sequences.flatten()
    columns = torch.arange(len(flat), device=flat.device)
    return columns.new_zeros(num_sequences + 1).scatter_reduce(0, flat, columns, "amax")[:-1]


@torch.no_grad()
def init_score(model: RewardModel, generator: torch.Generator) -> None:
    """w normal with deviation 1 / sqrt(D), so that scores start near 1 in size; drawn on the CPU, the same on every device."""
    value = torch.randn(model.score.weight.shape, generator=generator) / model.config.hidden_size**0.5
    place(model.score, "weight", value.to(model.model.norm.weight.device))
