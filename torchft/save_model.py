"""A model trained whole as a Hugging Face model directory: gathered, written and read back file by file, then asked.

Every process of the run calls `save_model`: all of them hold the weights, the first one writes. Beyond the model no process needs
more memory than one file's tensors. Names, config.json and tokenizer are the base model's, so other programs read it unchanged.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchft.adapter import probe_logits, save_text
from torchft.errors import UserError
from torchft.export import export_directory
from torchft.hf_checkpoint import open_checkpoint
from torchft.model_dir import (
    LOGIT_TOLERANCE,
    MAX_SHARD_BYTES,
    add_stop_ids,
    available_memory,
    check_space,
    copy_companions,
    plan_shards,
    write_config,
    write_index,
    write_shard,
)
from torchft.models import build_model, read_config
from torchft.modules.sharding import gathered
from torchft.modules.transformer import CausalLM
from torchft.ranks import rank
from torchft.stored import Piece, pieces
from torchft.weights import load_weights

if TYPE_CHECKING:
    from torchft.data.chat_template import ChatTemplate
    from torchft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SavedModel:
    """What was written and what was compared."""

    out: Path
    num_tensors: int
    num_bytes: int
    logit_error: float | None  # relative, of the directory loaded anew; None: a second copy does not fit into memory

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_bytes / 2**30:.2f} GiB, each read back bit for bit"
        if self.logit_error is None:
            return f"{self.out}: {size}; logits were NOT compared: a second copy of the model does not fit into memory"
        return f"{self.out}: {size}; loaded anew, its logits differ by {self.logit_error:.1e} (relative)"


def save_model(
    model: CausalLM,
    base_path: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: "Tokenizer",
    template: "ChatTemplate | None",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> SavedModel:
    """Write the weights in `dtype` as the model directory `out`, which appears whole and replaces one that is there.

    Args:
        base_path: the directory that the training began from: it gives the order of the tensors, config.json, tokenizer, licence.
        template: the chat template it was trained with; saved where it is not the tokenizer's own.

    Raises:
        UserError: it cannot be written, a weight is not finite in `dtype`, or what was written is not what was trained.
    """
    weights = _weights(model, base_path)
    sizes = {name: math.prod(piece.shape) * dtype.itemsize for name, (_, piece) in weights.items()}
    shards, num_bytes = plan_shards(sizes, max_shard_bytes), sum(sizes.values())
    main = rank() == 0
    with export_directory(out, replace=True) if main else nullcontext(out) as folder:
        if main:
            check_space(folder, num_bytes)
        for file, names in shards.items():
            _write_file(folder / file, model, {name: weights[name] for name in names}, dtype)
        trained = probe_logits(model)  # all processes take part
        error = None
        if main:
            write_index(folder, shards, num_bytes)
            rows = {"vocab_size": model.config.vocab_size}  # more than the base's where tokens were added
            write_config(base_path, read_config(base_path), folder, rows, dtype)
            copy_companions(base_path, folder)
            save_text(folder, tokenizer, template, base_path)
            add_stop_ids(folder)
            error = _logit_error(folder, trained, num_bytes, dtype)
    return SavedModel(out, len(sizes), num_bytes, error)


def _weights(model: CausalLM, base_path: Path) -> dict[str, tuple[str, Piece]]:
    """Tensor of the files -> name of the parameter, and the piece of it.

    In the order of the base's files, but the experts of a stack together, so that it is gathered once. A tied head once, as there.
    """
    stored = pieces(model)
    owners = {piece.name: name for name, each in stored.items() for piece in each}
    order = dict.fromkeys(owners[name] for name in open_checkpoint(base_path).tensors if name in owners)
    assert len(order) == len(stored), sorted(stored.keys() - set(order))
    return {piece.name: (name, piece) for name in order for piece in stored[name]}


def _write_file(file: Path, model: CausalLM, weights: dict[str, tuple[str, Piece]], dtype: torch.dtype) -> None:
    """Gather, write and read back one file; its tensors are gone when this returns."""
    params = dict.fromkeys(param for param, _ in weights.values())
    whole = {name: _gathered_as(model.get_parameter(name).detach(), dtype) for name in params}  # on the other processes nothing
    if rank() == 0:
        tensors = {name: piece.cut(whole[param]) for name, (param, piece) in weights.items()}
        _check_finite(tensors, dtype)
        write_shard(file, tensors, {"format": "pt"})


def _gathered_as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """All of a weight on the first process's CPU, rounded before it travels; on the others nothing."""
    return gathered(weight.to(dtype)).to("cpu", copy=True).contiguous()


def _check_finite(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds NaN or infinity in {dtype}: the model is of no use; nothing was kept")


def _logit_error(folder: Path, trained: Tensor, num_bytes: int, dtype: torch.dtype) -> float | None:
    """Relative distance of the directory's logits, loaded anew, from the trained model's; None if memory is short."""
    device = trained.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if 1.2 * num_bytes > free:  # a fifth more for activations and the largest tensor
        return None
    with torch.device("meta"):
        model = build_model(read_config(folder))
    load_weights(model, folder, device=device, dtype=dtype)
    error = ((probe_logits(model) - trained).norm() / trained.norm()).item()
    if not error <= LOGIT_TOLERANCE[dtype]:
        raise UserError(
            f"{folder.name}: loaded anew, its logits differ from the trained model's by {error:.1e} (relative), where rounding "
            f"explains {LOGIT_TOLERANCE[dtype]:.0e}; nothing was kept"
        )
    return error
