"""How the files hold a model's parameters: each under its own name, but for stacks of experts, which are in pieces there.

    experts.gate_proj.weight (E * out, in)    ->    experts.0.gate_proj.weight ... (out, in) each
    and likewise for the experts' LoRA, experts.0.gate_proj.lora_A.weight (rank, in), ...

Used wherever files are read or written: weights.py, save_model.py, adapter.py, merge.py.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from torchft.modules.moe import ExpertLinear
from torchft.modules.lora import LoRAExpertLinear


@dataclass(frozen=True)
class Piece:
    """One tensor of the files, and the rows of a parameter that it is."""

    name: str
    start: int  # first row
    shape: tuple[int, ...]  # of these rows, and in the files

    @property
    def stop(self) -> int:
        """The row behind the last."""
        return self.start + self.shape[0]

    def experts(self, num_experts: int, num_rows: int) -> slice:
        """Whose rows these are, of a stack of `num_rows` in all."""
        each = num_rows // num_experts
        return slice(self.start // each, self.stop // each)

    def rows_of(self, stored: Tensor, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the parameter, of those that this tensor of the files holds; others are not read."""
        return stored[max(start, self.start) - self.start : max(min(stop, self.stop) - self.start, 0)]

    def cut(self, param: Tensor) -> Tensor:
        """The tensor of the files, of the whole parameter."""
        return param[self.start : self.stop]


def pieces(model: nn.Module) -> dict[str, list[Piece]]:
    """Every parameter's pieces, by its name in the model; a tied one under its first name."""
    stacks = {name: module.num_experts for name, module in model.named_modules() if isinstance(module, ExpertLinear | LoRAExpertLinear)}
    found = {}
    for name, param in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None) if ".experts." in name else None
        found[name] = [Piece(name, 0, tuple(param.shape))] if stack is None else _by_expert(name, param, stacks[stack])
    return found


def _by_expert(name: str, param: Tensor, num_experts: int) -> list[Piece]:
    before, behind = name.split(".experts.")
    rows = param.shape[0] // num_experts
    shape = (rows, *param.shape[1:])
    return [Piece(f"{before}.experts.{expert}.{behind}", expert * rows, shape) for expert in range(num_experts)]
