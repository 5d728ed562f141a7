"""Weights into a model built on meta: streamed from a Hugging Face checkpoint, or random from a seed.

Tensor by tensor: read, cast, moved, quantised where the model says NF4 or FP8, put in place; a stack of experts when its last
one is read, a head in 8 bits slice by slice. So neither a dense copy of a quantised model nor a second copy of any model ever
exists. Checkpoint names are the model's own, but for the experts' numbers (stored.py); whatever does not fit exactly is an
error that names the tensor.
"""

import zlib
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.hf_checkpoint import Checkpoint, listed, open_checkpoint
from torchft.models import read_config
from torchft.modules import fp8, int8_head, nf4
from torchft.modules.host_embedding import HostEmbedding, placed
from torchft.modules.score import Score
from torchft.modules.sharding import cut, divided_like, local, rows_held
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import TrainedEmbedding, TrainedHead
from torchft.mxfp4 import Coded
from torchft.stored import Piece, pieces

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; `ignored` are the file's tensors that the model computes itself."""

    num_tensors: int
    num_bytes: int  # as read
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        ignored = f", {len(self.ignored)} not needed (first: {self.ignored[0]})" if self.ignored else ""
        return f"loaded {self.num_tensors} tensors, {self.num_bytes / 2**30:.2f} GiB{ignored}"


def load_weights(
    model: CausalLM, path: str | Path, *, device: torch.device | str, dtype: torch.dtype, new_rows: int = 0
) -> LoadReport:
    """Stream a checkpoint into a model on meta, adapters excepted (they stay on meta: see init_lora, load_adapter).

    Args:
        dtype: of everything but NF4, FP8 and int8 weights, which are quantised from it, and modules trained whole, which stay fp32.
        new_rows: rows that `resize_vocab` appended to embed_tokens and lm_head and the files do not have.

    Raises:
        UserError: the directory is not sound (see `open_checkpoint`), or a tensor is missing, unexpected or misshapen;
            all of a kind are named at once, and the model is untouched.
    """
    checkpoint, slots = open_checkpoint(path), _base_slots(model)
    # In a checkpoint with a tied head, lm_head is whatever embed_tokens is, also if `untie` has parted them here.
    tied_head = ENDS[1] if read_config(path).get("tie_word_embeddings", False) else None
    targets: dict[str, list[tuple[_Slot, Piece]]] = {}  # the checkpoint's tensor -> what it fills
    for name, slot in slots.items():
        for piece in slot.pieces:
            targets.setdefault(ENDS[0] if name == tied_head else piece.name, []).append((slot, piece))
    # Old checkpoints also hold RoPE's buffers.
    ignored = [name for name in checkpoint.tensors if name == tied_head or name.endswith("rotary_emb.inv_freq")]
    _check_names(checkpoint, targets.keys(), ignored)
    _check_shapes(checkpoint, targets, new_rows)

    for name, tensor in checkpoint.stream():
        for slot, piece in targets.get(name, []):
            slot.take(piece, tensor, dtype, device)
    return LoadReport(len(targets), sum(checkpoint.tensors[name].num_bytes for name in targets), tuple(ignored))


@torch.no_grad()
def random_weights(model: CausalLM, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> None:
    """Fill a model on meta as `init_weights` would, tensor by tensor on `device`. For measuring; never to be exported.

    Norms are one, biases zero, the rest normal. Each tensor has its own generator, seeded by `seed` and its name, so it
    does not depend on which adapters or other tensors there are.
    """
    for name, slot in _base_slots(model).items():
        # 32 bits of seed and name: more would be cut off in silence by the CPU's generator.
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if int8_head.is_int8(slot.param):
            for rows in int8_head.row_slices(*slot.param.shape, dtype.itemsize):
                value = torch.empty(rows.stop - rows.start, slot.param.shape[1], dtype=dtype, device=device)
                slot.take_rows(rows, value.normal_(std=model.config.initializer_range, generator=generator))
            continue
        value = torch.empty(slot.param.shape, dtype=slot.dtype(dtype), device=device)
        if name.endswith("norm.weight"):
            value.fill_(0.0 if model.config.norm_offset else 1.0)
        elif name.endswith(".bias"):
            value.zero_()
        else:
            value.normal_(std=model.config.initializer_range, generator=generator)
        rows = slot.rows()
        value = placed(value, device) if slot.on_host() else value
        slot.fill(value if len(value) == rows.stop - rows.start else value[rows].clone())  # a view would keep all of it alive


@dataclass
class _Slot:
    """One parameter of the base model, the modules that hold it (two for a tied one), and what is read of it so far."""

    param: nn.Parameter
    pieces: list[Piece]
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    value: Tensor | None = None
    scale: Tensor | None = None  # of an int8 value's rows
    num_read: int = 0  # of the pieces

    def dtype(self, base: torch.dtype) -> torch.dtype:
        trained_whole = any(isinstance(module, TrainedEmbedding | TrainedHead) for module, _ in self.owners)
        return torch.float32 if trained_whole else base

    def is_nf4(self) -> bool:
        return isinstance(local(self.param), nf4.NF4Tensor)

    def on_host(self) -> bool:
        return any(isinstance(module, HostEmbedding) for module, _ in self.owners)

    def rows(self) -> slice:
        """The rows that `fill` wants: this process's, but all of an NF4 tensor, whose scales have one mean, and of an FP8 one,
        whose scales are on every process."""
        quantized = self.is_nf4() or fp8.is_fp8(self.param)
        return slice(0, self.param.shape[0]) if quantized else rows_held(self.param)

    def take(self, piece: Piece, tensor: Tensor | Coded, dtype: torch.dtype, device: torch.device | str) -> None:
        """Read one piece of it, a view of the mapped file; the last one fills it."""
        if int8_head.is_int8(self.param):
            for rows in int8_head.row_slices(*self.param.shape, dtype.itemsize):
                part = tensor[rows].to(device=device, dtype=dtype)
                self.take_rows(rows, F.pad(part, (0, 0, 0, rows.stop - rows.start - len(part))))  # added rows are zeros
            return
        rows = self.rows()
        if self.value is None:
            shape = (rows.stop - rows.start, *self.param.shape[1:])
            self.value = torch.zeros(shape, dtype=self.dtype(dtype), device="cpu" if self.on_host() else device)
            self.value = placed(self.value, device) if self.on_host() else self.value
        held = piece.rows_of(tensor, rows.start, rows.stop)
        if held.dtype != self.value.dtype:  # cast where it goes: an assignment casts on the CPU, and moves bf16 as fp32
            held = held.to(self.value.device)
        start = max(piece.start - rows.start, 0)
        self.value[start : start + len(held)] = held
        self.num_read += 1
        if self.num_read == len(self.pieces):
            self.fill(self.value)
            self.value = None

    def take_rows(self, rows: slice, value: Tensor) -> None:
        """Rows of an int8 weight, quantised as they come, in order; the last ones fill it."""
        if self.value is None:
            self.value = torch.empty(self.param.shape, dtype=torch.int8, device=value.device)
            self.scale = torch.empty(len(self.param), dtype=torch.float32, device=value.device)
        self.value[rows], self.scale[rows] = int8_head.quantize_rows(value)
        if rows.stop == len(self.param):
            for module, _ in self.owners:
                module.weight_scale = self.scale
            self.fill(self.value)
            self.value = self.scale = None

    def fill(self, value: Tensor) -> None:
        """Put those rows in the parameter's place, quantised if that is NF4 or FP8."""
        if fp8.is_fp8(self.param):
            value, scale = fp8.quantize_rows(value)
            filled = cut(value, self.param)
            for module, _ in self.owners:
                module.weight_scale = scale
        elif self.is_nf4():
            filled = cut(nf4.to_nf4(value), self.param)
        else:
            filled = divided_like(value, self.param)
        assert filled.shape == self.param.shape, (filled.shape, self.param.shape)
        filled = nn.Parameter(filled, requires_grad=self.param.requires_grad)
        for module, leaf in self.owners:
            setattr(module, leaf, filled)


def _base_slots(model: CausalLM) -> dict[str, _Slot]:
    """Every parameter but the adapters' and a score's, by the first of its names."""
    slots: dict[int, tuple[str, _Slot]] = {}
    stored = pieces(model)
    for module_name, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            if ".lora_" in name or isinstance(module, Score):  # filled by init_lora, init_score
                continue
            if id(param) not in slots:
                slots[id(param)] = (name, _Slot(param, stored[name]))
            slots[id(param)][1].owners.append((module, leaf))
    return dict(slots.values())


def _check_names(checkpoint: Checkpoint, wanted: Set[str], ignored: list[str]) -> None:
    """Exactly the model's tensors are there, and in a floating dtype."""
    held = checkpoint.tensors
    missing = sorted(wanted - held.keys())
    unexpected = sorted(held.keys() - wanted - set(ignored))
    if missing:
        also = f"; it holds {listed(unexpected)} instead" if unexpected else ""
        raise UserError(
            f"{checkpoint.path} lacks {listed(missing)}{also}: its weights and its config.json are of two models"
        )
    if unexpected:
        raise UserError(
            f"{checkpoint.path} holds {listed(unexpected)}, for which the model of its config.json has no place"
        )
    odd = [f"{name} ({held[name].dtype})" for name in wanted if held[name].dtype not in FLOATS]
    if odd:
        raise UserError(
            f"{checkpoint.path}: {listed(odd)} is not stored as floating point; use the unquantised checkpoint"
        )


def _check_shapes(checkpoint: Checkpoint, targets: dict[str, list[tuple[_Slot, Piece]]], new_rows: int) -> None:
    """Each tensor has the model's shape, but for the rows that the model has been given since."""
    wrong = []
    for name, slots in targets.items():
        found, wanted = checkpoint.tensors[name].shape, slots[0][1].shape
        if name in ENDS:
            wanted = (wanted[0] - new_rows, wanted[1])
        if found != wanted:
            hint = " (transposed?)" if found == wanted[::-1] else ""
            wrong.append(f"{name} is {found} in the file and {wanted} in the model{hint}")
    if wrong:
        raise UserError(f"{checkpoint.path}: {listed(wrong, '; ')}")
