"""LoRA, rsLoRA and DoRA on frozen linears, applied to a built model by a tree walk.

    LoRA    y = W0 x + b + s B A x              s = alpha / rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685)
    rsLoRA  s = alpha / sqrt(rank)              (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)
    DoRA    y = m / ||W0 + s B A|| * (W0 + s B A) x + b, one norm and one trained m per output row
            (Liu et al. 2024, https://arxiv.org/abs/2402.09353)

W0 (out, in) is frozen and may be stored as NF4 or FP8; A (rank, in), B (out, rank) and m (out,) are fp32 parameters beside it,
so that AdamW's small steps are not rounded away, and are cast to the activations' dtype where they are used. Names are
PEFT's: `q_proj.weight`, `q_proj.lora_A.weight`, `q_proj.lora_B.weight`, `q_proj.lora_magnitude_vector`.

In a mixture of experts (moe.py) every expert has an adapter of its own, and those of one projection lie one below the other
like the weights: A (E * rank, in), B (E * out, rank). DoRA is not for experts.

Order: model on meta -> `add_lora` -> (`quantize_nf4` or `quantize_fp8`) -> load the weights -> `init_lora`, or load an adapter.
Left out: adapters on embeddings, biases in adapters, several adapters at once, per-layer ranks.
"""

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules import fp8, nf4
from torchft.modules.moe import ExpertLinear, expert_linear
from torchft.modules.nf4_experts import grouped_linear
from torchft.modules.routing import ROUTERS, Rows
from torchft.modules.sharding import divided_like, local, place, rows_held, whole

NORM_ROWS = 1024  # rows of DoRA's norm computed at once: bounds its two fp32 temporaries to rows x in


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, apart from its weights.

    `target_modules` are names of linears, matched whole or after a dot ("q_proj", "mlp.up_proj",
    "layers.0.mlp.up_proj"), or ("all-linear",): every linear but lm_head and routers, the experts' included.
    """

    rank: int
    alpha: float
    dropout: float = 0.0  # probability, on the adapter's input
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(
                f"lora.alpha is {self.alpha}; it must be a positive number (a common choice is twice the rank)"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty; name linears such as q_proj, or all-linear")

    @property
    def scale(self) -> float:
        """s in the formulas above."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Linear):
    """A frozen linear with an adapter beside its weight, which is on meta until `init_lora`. Made by `add_lora`."""

    def __init__(self, linear: nn.Linear, spec: LoraSpec) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # shared, not copied
        self.rank, self.scale = spec.rank, spec.scale
        self.dropout = spec.dropout
        self.enabled = True  # see adapters_off
        self.lora_A = nn.Linear(self.in_features, spec.rank, bias=False, device="meta", dtype=torch.float32)
        self.lora_B = nn.Linear(spec.rank, self.out_features, bias=False, device="meta", dtype=torch.float32)
        magnitude = (
            nn.Parameter(torch.empty(self.out_features, device="meta", dtype=torch.float32)) if spec.use_dora else None
        )
        self.register_parameter("lora_magnitude_vector", magnitude)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = self._base(x, self.bias)  # W0 x + b
        if not self.enabled:
            return y
        dropping = self.training and self.dropout > 0
        dropped = F.dropout(x, self.dropout) if dropping else x
        a, b = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        delta = F.linear(F.linear(dropped, a) * self.scale, b)  # s B A x
        if self.lora_magnitude_vector is None:
            return y + delta
        # DoRA, with r = m / norm:  r (W0 x + delta) + b  =  y + delta + (r - 1) (W0 x + delta).
        # r - 1 is taken in fp32: r itself is close to 1 and bf16 would round the whole update away.
        excess = (self.lora_magnitude_vector / self.row_norms() - 1).to(x.dtype)  # (out,)
        if dropping:  # as PEFT: the rescaled part sees the dropped input, the plain part the whole one
            base = self._base(dropped, None)
        else:
            base = y if self.bias is None else y - self.bias
        return y + delta + excess * (base + delta)

    def delta(self) -> Tensor:
        """s B A, (out, in) fp32."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()  # section 4.3 of the DoRA paper: the norm is a constant in backward
    def row_norms(self) -> Tensor:
        """||W0 + s B A|| of each output row, (out,) fp32."""
        weight, a = _dense(self), self.lora_A.weight
        rows = zip(weight.split(NORM_ROWS), self.lora_B.weight.split(NORM_ROWS), strict=True)
        return torch.cat([torch.linalg.vector_norm(w.float() + self.scale * (b @ a), dim=1) for w, b in rows])

    def extra_repr(self) -> str:
        kind = "DoRA" if self.lora_magnitude_vector is not None else "LoRA"
        numbers = f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"
        return f"{super().extra_repr()}, {kind} {numbers}"

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if fp8.is_fp8(self.weight):
            return fp8.linear(x, self.weight, self.weight_scale, bias)
        return nf4.linear(x, self.weight, bias)


class LoRAExpertLinear(LoRALinear):
    """A frozen ExpertLinear with an adapter for each expert. Made by `add_lora`."""

    def __init__(self, linear: ExpertLinear, spec: LoraSpec) -> None:
        super().__init__(linear, spec)
        self.num_experts, self.stacked = linear.num_experts, linear.stacked
        self.lora_A = nn.Linear(self.in_features, self.num_experts * spec.rank, bias=False, device="meta", dtype=torch.float32)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (M, in) sorted by expert -> (M, out)
        y = expert_linear(x, self.weight, self.bias, self.num_experts, rows)  # W0 x + b
        if not self.enabled:
            return y
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x
        inner = grouped_linear(dropped, self.lora_A.weight, self.num_experts, rows.offsets) * self.scale
        return y + grouped_linear(inner, self.lora_B.weight, self.num_experts, rows.offsets)

    def delta(self, experts: slice = slice(None)) -> Tensor:
        """s B A of these experts, one below the other, (e * out, in) fp32."""
        a, b = (adapter.weight.unflatten(0, (self.num_experts, -1))[experts] for adapter in (self.lora_A, self.lora_B))
        return self.scale * (b @ a).flatten(0, 1)


@dataclass(frozen=True)
class LoraReport:
    """What `add_lora` did, for one printed line."""

    names: tuple[str, ...]  # of the adapted linears
    num_trained: int  # parameters of the adapters
    num_total: int  # parameters of the model, adapters included
    experts: bool = False  # whether experts are among them

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in self.names))
        share = 100 * self.num_trained / self.num_total
        return (
            f"LoRA: {len(self.names)} linears{', experts included' if self.experts else ''} ({', '.join(kinds)}), "
            f"{self.num_trained:,} of {self.num_total:,} parameters are trained ({share:.2f}%)"
        )


def add_lora(model: nn.Module, spec: LoraSpec) -> LoraReport:
    """Put an adapter beside every linear that `spec.target_modules` names, and freeze everything else.

    Works on meta and on loaded models. The new parameters are on meta until `init_lora` or the adapter's loading.

    Raises:
        ValueError: a target matches nothing, or no linear, or lm_head; DoRA on experts; the model has adapters already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model already has LoRA adapters; build it anew to give it others")
    names = _matched_linears(model, spec.target_modules)
    stacks = [name for name in names if isinstance(model.get_submodule(name), ExpertLinear)]
    if stacks and spec.use_dora:
        raise ValueError(f"lora dora is not for experts, such as {stacks[0]}; name other target_modules, or leave DoRA out")
    model.requires_grad_(False)
    for name in names:
        kind = LoRAExpertLinear if name in stacks else LoRALinear
        model.set_submodule(name, kind(model.get_submodule(name), spec))
    trained = sum(param.numel() for param in trainable_parameters(model).values())
    return LoraReport(tuple(names), trained, sum(param.numel() for param in model.parameters()), bool(stacks))


def _matched_linears(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the linears that `targets` mean, in the model's order."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if _leaf(name) != "lm_head"]
    if targets == ("all-linear",):
        return [name for name in linears if _leaf(name) not in ROUTERS]
    return _named_linears(model, targets, linears)


def _named_linears(model: nn.Module, targets: tuple[str, ...], linears: list[str]) -> list[str]:
    for target in targets:
        _check_target(model, target, linears)
    return [name for name in linears if matches(name, targets)]


def _check_target(model: nn.Module, target: str, linears: list[str]) -> None:
    """Raise ValueError unless `target` means some of `linears` and nothing else."""
    hits = [name for name, _ in model.named_modules() if matches(name, (target,))]
    if not hits:
        raise _matches_nothing(target, linears)
    wrong = next((name for name in hits if name not in linears), None)
    if wrong and _leaf(wrong) in ("embed_tokens", "lm_head"):
        raise ValueError(f"lora.target_modules: {target!r} takes no adapter; name it in modules_to_save to train it whole")
    if wrong:
        kind = type(model.get_submodule(wrong)).__name__
        raise ValueError(f"lora.target_modules: {target!r} is {wrong}, a {kind}; adapters go on linears only")


def _matches_nothing(target: str, linears: list[str]) -> ValueError:
    known = sorted({_leaf(name) for name in linears})
    near = difflib.get_close_matches(target, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ValueError(
        f"lora.target_modules: {target!r} matches no module; {hint}the linears here are {', '.join(known)}, "
        "or use all-linear alone"
    )


def matches(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a module's name is one of `targets`, whole or after a dot: PEFT's rule for a list."""
    return any(name == target or name.endswith("." + target) for target in targets)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


@torch.no_grad()
def init_lora(model: nn.Module, generator: torch.Generator) -> None:
    """Initialise every adapter so that it changes nothing yet: A uniform, B zero, DoRA's m the norms of W0's rows.

    Call it when the base weights are in. A is drawn on the CPU, so that one seed gives one adapter on every device.
    As PEFT does: A is Kaiming-uniform with a = sqrt(5), that is, within +-1/sqrt(in).

    Args:
        generator: a CPU generator.
    """
    for layer in lora_layers(model).values():
        device = layer.weight.device
        assert device.type != "meta", "init_lora before the weights are loaded"
        a = torch.empty(layer.lora_A.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        place(layer.lora_A, "weight", a.to(device))
        place(layer.lora_B, "weight", torch.zeros(layer.lora_B.weight.shape, dtype=torch.float32, device=device))
        if layer.lora_magnitude_vector is not None:
            rows = _dense(layer).split(NORM_ROWS)  # of those that this process holds; B is zero
            norms = torch.cat([torch.linalg.vector_norm(row.float(), dim=1) for row in rows])
            place(layer, "lora_magnitude_vector", whole(divided_like(norms, layer.weight)))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linears by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer gets, by name; a tied parameter once."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def trained_beside_adapters(model: nn.Module) -> list[str]:
    """Names of the trained parameters that are no adapter's: modules_to_save, added tokens, a score, or all weights."""
    return [name for name in trainable_parameters(model) if ".lora_" not in name]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model for the length of a `with`: the reference of preference losses, and "before" in comparisons.

    Raises:
        ValueError: a module is trained whole beside the adapter, so its base weights are gone.
    """
    whole = trained_beside_adapters(model)
    if whole:
        raise ValueError(
            f"switching adapters off does not give the base model back: {', '.join(whole)} is trained whole; leave it "
            "out of modules_to_save where the base is the reference"
        )
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _dense(layer: LoRALinear) -> Tensor:
    """W0, or the rows of it that this process holds."""
    weight = local(layer.weight)
    if fp8.is_fp8(weight):
        return fp8.dequantize(weight, layer.weight_scale[rows_held(layer.weight)])
    return nf4.dequantize(weight) if isinstance(weight, nf4.NF4Tensor) else weight


@torch.no_grad()
def merged_weight(layer: LoRALinear) -> Tensor:
    """The one dense weight (out, in) that does what base and adapter do together, in fp32; the caller rounds it."""
    merged = _dense(layer).float() + layer.delta()
    if layer.lora_magnitude_vector is not None:
        merged *= (layer.lora_magnitude_vector / layer.row_norms()).unsqueeze(1)
    return merged
