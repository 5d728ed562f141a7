"""The router's auxiliary loss of a step (modules/balance.py): its choices have to be known before the first backward.

    routing = balance_routers(model, batches, device, supervised)    # in a recipe, before a step's batches are computed

It is trained where the model's config.json says `"output_router_logits": true`, times `router_aux_loss_coef`, as in transformers;
in all released models that is false. A forward without gradients over the step's batches then counts, which makes a step half as
long again with adapters, by a third with all weights. Neither the loss of a step nor of a validation holds it; its gradient does.
With dropout on adapters the masks counted under are not those trained under. Left out: counting in the training forward
itself, which a step of one batch per process would allow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchft.data.loader import Batch
from torchft.distributed import sum_over_processes
from torchft.modules.transformer import CausalLM
from torchft.ranks import world_size


@torch.no_grad()
def balance_routers(model: CausalLM, batches: Sequence[Batch], device: torch.device, count: int) -> dict[str, Tensor]:
    """Count how a step's tokens are routed, so that its backwards hold the auxiliary loss's gradient.

    batches: the step's of this process; every process must call it. count: over how many of something the log takes means.
    Returns for RunLogger.figures what is logged, times `count`: aux_loss, without its coefficient, E f . P over the whole step (k
    where all experts are equally busy); nothing, and nothing is computed, for a model without the loss.
    """
    balance = model.model.balance
    if balance is None:
        return {}
    balance.start(device)
    for batch in batches:
        here = batch.to(device)
        model(here.input_ids, positions=here.positions, documents=here.documents, branches=here.branches, last_only=True)
    sum_over_processes(balance.sums)
    return {"aux_loss": count * balance.finish(scale=world_size())}  # of which FSDP2 takes the mean over processes
