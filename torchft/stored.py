"""How the files hold a model's parameters: each under its own name, but for stacks of experts.

    experts.gate_proj.weight (E * out, in)    ->    experts.0.gate_proj.weight ... (out, in) each
                                              or    experts.gate_proj (E, in, out), where the stack is one there (gpt-oss)
    experts.gate_proj.bias (E * out,)         ->    experts.gate_proj_bias (E, out), there

and the experts' LoRA, A (E * rank, in) and B (E * out, rank), as peft has it:

    ...lora_A.weight, lora_B.weight           ->    experts.0.gate_proj.lora_A.weight ... (rank, in) and (out, rank) each
                                              or    experts.lora_A.weight (E * rank, in) and lora_B.weight (out, rank * E)

In the last form the linear has no name: peft wraps a stack's first parameter, then its second, whose wrapper is `experts`
itself; the first is `experts.base_layer` then. Used wherever files are read or written: weights.py, save_model.py, adapter.py,
merge.py.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from torchft.modules.lora import LoRAExpertLinear, LoRALinear, matches
from torchft.modules.moe import ExpertLinear
from torchft.mxfp4 import Coded

Stack = ExpertLinear | LoRAExpertLinear


@dataclass(frozen=True)
class Piece:
    """One tensor of the files, and the rows of a parameter that it is."""

    name: str
    start: int  # first row
    stop: int  # the row behind the last
    shape: tuple[int, ...]  # in the files
    layout: str = "rows"  # or how a whole stack is stored: transposed (E, in, out) | bias (E, out) | lora_B (out, rank * E)
    num_experts: int = 1  # of a whole stack

    def experts(self, num_experts: int, num_rows: int) -> slice:
        """Whose rows these are, of a stack of `num_rows` in all."""
        each = num_rows // num_experts
        return slice(self.start // each, self.stop // each)

    def rows_of(self, stored: Tensor | Coded, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the parameter, of those that this tensor of the files holds; others are not read."""
        first, last = max(start, self.start) - self.start, max(min(stop, self.stop) - self.start, 0)
        if self.layout == "rows":
            return stored[first:last]
        if self.layout == "lora_B":
            return stored.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1).flatten(0, 1)[first:last]
        each = (self.stop - self.start) // self.num_experts
        block = stored[first // each : -(-last // each)]  # of the experts that have some of these rows
        rows = (block.transpose(1, 2) if self.layout == "transposed" else block).flatten(0, 1)
        return rows[first % each :][: last - first]

    def to_file(self, rows: Tensor) -> Tensor:
        """The tensor of the files, of its rows."""
        if self.layout == "rows":
            return rows
        stack = rows.unflatten(0, (self.num_experts, -1))
        if self.layout == "lora_B":
            return stack.permute(1, 2, 0).flatten(1).contiguous()
        return stack.transpose(1, 2).contiguous() if self.layout == "transposed" else stack

    def cut(self, param: Tensor) -> Tensor:
        """The tensor of the files, of the whole parameter."""
        return self.to_file(param[self.start : self.stop])


def pieces(model: nn.Module) -> dict[str, list[Piece]]:
    """Every parameter's pieces, by its name in the model; a tied one under its first name."""
    found: dict[str, list[Piece]] = {}
    stack, before = None, ""
    for name, module in model.named_modules():
        if isinstance(module, Stack):
            stack, before = module, name
        inside = stack is not None and f"{name}.".startswith(f"{before}.")
        for leaf, param in module.named_parameters(recurse=False):
            found.setdefault(f"{name}.{leaf}", _pieces(f"{name}.{leaf}", param, stack if inside else None, model))
    return {name: found[name] for name, _ in model.named_parameters()}


def _pieces(name: str, param: Tensor, stack: Stack | None, model: nn.Module) -> list[Piece]:
    shape, rows = tuple(param.shape), len(param)
    if stack is None:
        return [Piece(name, 0, rows, shape)]
    if stack.stacked:
        return [_whole_stack(name, shape, stack.num_experts, model)]
    before, behind = name.split(".experts.")
    each = rows // stack.num_experts
    numbered = ((f"{before}.experts.{expert}.{behind}", expert * each) for expert in range(stack.num_experts))
    return [Piece(file_name, start, start + each, (each, *shape[1:])) for file_name, start in numbered]


def _whole_stack(name: str, shape: tuple[int, ...], num_experts: int, model: nn.Module) -> Piece:
    rows, each = shape[0], shape[0] // num_experts
    linear, _, leaf = name.partition(".lora_")
    if not leaf:
        linear, _, leaf = name.rpartition(".")
        if leaf == "bias":
            return Piece(f"{linear}_bias", 0, rows, (num_experts, each), "bias", num_experts)
        return Piece(linear, 0, rows, (num_experts, shape[1], each), "transposed", num_experts)
    experts, _, own = linear.rpartition(".")
    adapted = [name for name, module in model.get_submodule(experts).named_children() if isinstance(module, LoRAExpertLinear)]
    wrapper = experts if own == adapted[-1] else f"{experts}.base_layer"
    if leaf.startswith("A"):
        return Piece(f"{wrapper}.lora_{leaf}", 0, rows, shape)
    return Piece(f"{wrapper}.lora_{leaf}", 0, rows, (each, shape[1] * num_experts), "lora_B", num_experts)


def target_parameters(layers: dict[str, LoRALinear], targets: tuple[str, ...]) -> dict[str, str]:
    """The targets that peft adapts as parameters, and its name for each: gpt-oss's stacks, one tensor in files, and routers.

    Other mixtures' targets it renames by itself.
    """
    names = [name for name, layer in layers.items() if _is_stack(layer) or _is_router(name)]
    meant = {target: next((name for name in names if matches(name, (target,))), "") for target in targets}
    return {target: _peft_parameter(target, name) for target, name in meant.items() if name}


def _is_stack(layer: LoRALinear) -> bool:
    return isinstance(layer, LoRAExpertLinear) and layer.stacked


def _is_router(name: str) -> bool:
    """Whether it is gpt-oss's, which is no linear in transformers."""
    return name.endswith(".mlp.router")


def _peft_parameter(target: str, name: str) -> str:
    """mlp.experts.down_proj, mlp.router.weight; a target that says where keeps that."""
    short = target if "." in target else ".".join(name.split(".")[3:])  # behind model.layers.0
    return f"{short}.weight" if _is_router(name) else short
