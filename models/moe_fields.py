"""What the config.json files of mixtures of experts have in common."""

from typing import Any

from torchft.models.fields import Fields

INERT = frozenset({"router_aux_loss_coef"})  # of the loss that `read_experts` refuses


def read_experts(fields: Fields, num_experts: int, num_experts_per_tok: int) -> dict[str, Any]:
    """How many experts there are, under both of its names, and how many a token takes. The arguments are for absent fields.

    The router's auxiliary loss is refused: it is a product of two sums over the tokens of a whole optimizer step, of which one
    must be known before the first backward of that step, and a step has many forwards. transformers takes it over each
    micro-batch by itself, so that the loss changes with their size. It is off in all models of our tables.
    """
    names = [name for name in ("num_experts", "num_local_experts") if name in fields.left] or ["num_experts"]
    values = [fields.integer(name, num_experts) for name in names]
    if len(set(values)) > 1:
        raise fields.fail(names[1], values[1], f"the same as {names[0]}, {values[0]}, or only one of the two")
    chosen = fields.integer("num_experts_per_tok", num_experts_per_tok)
    if chosen > values[0]:
        raise fields.fail("num_experts_per_tok", chosen, f"at most {names[0]} = {values[0]}")
    if fields.flag("output_router_logits", False):
        raise ValueError(
            f"{fields.where}: output_router_logits is True, which asks for the router's auxiliary loss. It is not implemented: "
            "over an optimizer step of several forwards it would need the routing of all of them before the first backward. Set "
            "it to false there."
        )
    return {"num_experts": values[0], "num_experts_per_tok": chosen}
