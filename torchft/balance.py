"""The router's auxiliary loss of a step (modules/balance.py): its choices have to be known before the first backward.

    log.latest(**balance_routers(model, batches, device))    # in a recipe, before a step's batches are computed

It is trained where the model's config.json says `"output_router_logits": true`, times `router_aux_loss_coef`, as in
transformers; in all released models that is false. A forward without gradients over the step's batches then counts, which makes
a step longer, by up to a half with adapters and a third with all weights. The loss of a step does not hold it, its gradient
does; validation has none of it. With dropout on adapters the masks counted under are not those trained under. Left out:
counting in the training forward itself, which a step of one batch per process would allow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchft.data.loader import Batch
from torchft.distributed import sum_over_processes
from torchft.modules.transformer import CausalLM
from torchft.ranks import world_size


@torch.no_grad()
def balance_routers(model: CausalLM, batches: Sequence[Batch], device: torch.device) -> dict[str, Tensor]:
    """Count how a step's tokens are routed, so that its backwards hold the auxiliary loss's gradient.

    batches: the step's of this process; every process must call it. Returns what is logged: aux_loss, without its coefficient,
    of the whole step: k where all experts are equally busy, more the less they are. For a model without the loss it returns
    nothing, and computes nothing.
    """
    balance = model.model.balance
    if balance is None:
        return {}
    balance.start(device)
    for batch in batches:
        here = batch.to(device)
        model(here.input_ids, positions=here.positions, documents=here.documents, branches=here.branches, last_only=True)
    sum_over_processes(balance.sums)
    return {"aux_loss": balance.finish(scale=world_size())}  # of its gradient the mean over processes is taken
