"""What the config.json files of mixtures of experts have in common."""

from typing import Any

from torchft.models.fields import Fields

INERT = frozenset({"router_aux_loss_coef"})  # where there is no such loss


def read_experts(fields: Fields, num_experts: int, num_experts_per_tok: int) -> dict[str, Any]:
    """How many experts there are, under both of its names, and how many a token takes. The arguments are for absent fields.

    And with which coefficient the router's auxiliary loss is trained: as in transformers `output_router_logits` switches it on,
    which no released model's file does. Returns fields of MoeConfig.
    """
    names = [name for name in ("num_experts", "num_local_experts") if name in fields.left] or ["num_experts"]
    values = [fields.integer(name, num_experts) for name in names]
    if len(set(values)) > 1:
        raise fields.fail(names[1], values[1], f"the same as {names[0]}, {values[0]}, or only one of the two")
    chosen = fields.integer("num_experts_per_tok", num_experts_per_tok)
    if chosen > values[0]:
        raise fields.fail("num_experts_per_tok", chosen, f"at most {names[0]} = {values[0]}")
    coef = fields.number("router_aux_loss_coef", 0.001) if fields.flag("output_router_logits", False) else 0.0
    return {"num_experts": values[0], "num_experts_per_tok": chosen, "aux_loss_coef": coef}
