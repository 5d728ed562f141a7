"""`tune merge`: base model + adapter -> a Hugging Face model directory without adapters, shard by shard.

Every written tensor is read back and compared, and where memory allows the logits of the merged model are compared with
those of base and adapter. At most one output shard is in memory while writing.

Which base an adapter that was trained on NF4 weights (QLoRA) is merged into is a choice. The default is
the checkpoint's own weights: they are the better model, and other programs load adapter and base that way too.
`nf4_base` merges into the dequantised weights, which is exactly the model that was trained. The output says which.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft.adapter import adapter_tensors, attach_adapter, load_adapter, probe_logits, read_tensors, weights_file
from torchft.errors import UserError
from torchft.export import export_directory
from torchft.hf_checkpoint import Checkpoint, contained, open_checkpoint
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
from torchft.modules import nf4
from torchft.modules.lora import LoRAExpertLinear, LoRALinear, merged_weight
from torchft.modules.transformer import CausalLM
from torchft.safetensors_header import read_header
from torchft.stored import Piece, pieces
from torchft.weights import ENDS, FLOATS, load_weights

TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
}


KEPT_STACKS = 3  # of a layer's experts


@dataclass(frozen=True)
class MergeReport:
    """What was written and what was compared."""

    out: Path
    num_tensors: int
    num_changed: int  # tensors that differ from the base's
    base: str  # which base it was merged into
    logit_error: float | None  # relative, against base + adapter; None: not enough memory for the model in fp32

    def __str__(self) -> str:
        logits = "logits were NOT compared: the model in fp32 does not fit into memory"
        if self.logit_error is not None:
            logits = f"logits differ from base + adapter by {self.logit_error:.1e} (relative)"
        tensors = f"{self.num_tensors} tensors, {self.num_changed} of them changed"
        return f"{self.out}: {tensors}, merged into {self.base}; each read back and compared; {logits}"


def merge(
    base_path: str | Path,
    adapter_path: str | Path,
    out_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    nf4_base: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MergeReport:
    """Write base + adapter as one model directory, verify it, and give it its name last.

    Args:
        dtype: of the written weights; None keeps each tensor's own.
        nf4_base: merge into the weights as NF4 training saw them, instead of into the checkpoint's own.
        max_shard_bytes: of one file; a model that needs several gets an index.

    Raises:
        UserError: base or adapter are not sound or do not fit each other, `out_path` exists, the disk is full, the
            merged model equals the base, or what was written is not what was computed.
    """
    parts = _take_apart(Path(base_path), Path(adapter_path), nf4_base)
    out, hf = Path(out_path), read_config(base_path)
    dtypes = {name: dtype or FLOATS[parts.base.tensors[source].dtype] for name, source in parts.sources.items()}
    sizes = {name: parts.shape(name).numel() * dtypes[name].itemsize for name in parts.sources}
    shards = plan_shards(sizes, max_shard_bytes)
    num_changed = 0
    with export_directory(out) as folder:
        check_space(folder, sum(sizes.values()))
        for file, names in shards.items():
            num_changed += _write_shard(parts, folder / file, {name: dtypes[name] for name in names})
        if num_changed == 0:
            raise UserError(f"merged, {base_path} would be as before: the adapter {adapter_path} changes nothing")
        write_index(folder, shards, sum(sizes.values()))
        write_config(parts.base.path, hf, folder, _config_changes(parts, hf), dtype)
        copy_companions(parts.base.path, folder)
        for path in Path(adapter_path).iterdir():  # the tokenizer that it was trained with, where it brings one
            if path.name in TOKENIZER_FILES:
                shutil.copyfile(contained(Path(adapter_path), path.name), folder / path.name)
        add_stop_ids(folder)
        error = _check_logits(parts, folder, max(LOGIT_TOLERANCE[dtype] for dtype in dtypes.values()))
    return MergeReport(out, len(sizes), num_changed, parts.base_words, error)


@dataclass(frozen=True)
class _Parts:
    """Base and adapter, tensor by tensor."""

    base: Checkpoint
    adapter: Path
    model: CausalLM  # on meta but for its adapters
    sources: dict[str, str]  # each written tensor -> the base's tensor it is made from
    whole: dict[str, Tensor]  # trained whole: they take the base tensor's place
    linears: dict[str, tuple[str, Piece]]  # a linear's tensor in the files -> the linear, and the piece of its weight
    nf4_names: frozenset[str]  # linears that were NF4 in training, if the merge is into those
    nf4_dtype: torch.dtype  # they were quantised from
    base_words: str  # which base it is, for people
    stacks: dict[str, Tensor] = field(default_factory=dict)  # dequantised, of the experts that were asked for last

    def shape(self, name: str) -> torch.Size:
        return self.whole[name].shape if name in self.whole else torch.Size(self.base.tensors[self.sources[name]].shape)

    def base_tensor(self, name: str) -> Tensor:
        """The base's, as the adapter shall meet it."""
        linear, piece = self.linears.get(name, ("", None))
        return piece.cut(self.dequantised(linear)) if linear in self.nf4_names else self.base.read(self.sources[name])

    def dequantised(self, linear: str) -> Tensor:
        """A linear's whole weight as NF4 training saw it; of experts, whose tensors come one by one, the last few are kept."""
        if linear not in self.stacks:
            own = [piece for owner, piece in self.linears.values() if owner == linear]
            rows = [piece.rows_of(self.base.read(self.sources[piece.name]), 0, piece.stop) for piece in own]
            weight = torch.cat(rows).to(self.nf4_dtype)
            while len(self.stacks) >= KEPT_STACKS:
                del self.stacks[next(iter(self.stacks))]
            self.stacks[linear] = nf4.dequantize(nf4.to_nf4(weight))
        return self.stacks[linear]

    def merged(self, name: str, base: Tensor) -> Tensor:
        """`base`, with what the adapter does to it; not yet rounded to the dtype it is written in."""
        if name in self.whole:
            return self.whole[name]
        linear, piece = self.linears.get(name, ("", None))
        layer = self.model.get_submodule(linear)
        if not isinstance(layer, LoRALinear):
            return base
        if isinstance(layer, LoRAExpertLinear):
            rows = piece.rows_of(base, 0, piece.stop).float()
            return piece.to_file(rows + layer.delta(piece.experts(layer.num_experts, layer.out_features)))
        on_meta = layer.weight
        layer.weight = nn.Parameter(base, requires_grad=False)
        try:
            return merged_weight(layer)
        finally:
            layer.weight = on_meta


def _take_apart(base_path: Path, adapter_path: Path, nf4_base: bool) -> _Parts:
    """Open and check both; nothing of the base is read yet."""
    base = open_checkpoint(base_path)
    try:
        with torch.device("meta"):
            model = build_model(read_config(base_path))
    except ValueError as error:
        raise UserError(f"{base_path}: {error}") from None
    was_tied = model.config.tie_word_embeddings
    attach_adapter(model, adapter_path)
    tensors = read_tensors(model, adapter_path)
    _fill_adapters(model, tensors)
    sources = _sources(base, was_tied, model.config.tie_word_embeddings)
    whole = {name: tensors[name] for name in ENDS if name in tensors and name in sources}
    linears = {
        piece.name: (name.removesuffix(".weight"), piece)
        for name, each in pieces(model).items()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name.endswith(".weight")
        for piece in each
    }
    trained_on = read_header(weights_file(adapter_path)).metadata
    nf4_dtype = torch.float32 if trained_on.get("base_dtype") == "float32" else torch.bfloat16
    words, nf4_names = "the checkpoint's own weights", frozenset()
    if nf4_base:
        words, nf4_names = "the dequantised NF4 weights", frozenset(nf4.quantize_nf4(model).quantized)
    elif trained_on.get("base_quantization") == "nf4":
        words += " (the adapter was trained on their NF4 form: --nf4-base merges into that)"
    return _Parts(base, adapter_path, model, sources, whole, linears, nf4_names, nf4_dtype, words)


def _sources(base: Checkpoint, was_tied: bool, is_tied: bool) -> dict[str, str]:
    """Each tensor to write -> the base's tensor it is made from, in the base's order; old RoPE buffers are left out."""
    sources = {name: name for name in base.tensors if not name.endswith("rotary_emb.inv_freq")}
    if was_tied:  # a file's own lm_head means nothing then
        sources.pop(ENDS[1], None)
        if not is_tied:
            sources[ENDS[1]] = ENDS[0]
    return sources


def _fill_adapters(model: CausalLM, tensors: dict[str, Tensor]) -> None:
    """A, B and DoRA's m of a model on meta, on the CPU; the base stays on meta."""
    for name, param in adapter_tensors(model).items():
        module_name, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensors[name].to(param.dtype)))


def _write_shard(parts: _Parts, file: Path, dtypes: dict[str, torch.dtype]) -> int:
    """Merge, write and read back the tensors of one file; returns how many of them the adapter changed."""
    tensors, num_changed = {}, 0
    for name, dtype in dtypes.items():
        base = parts.base_tensor(name)
        tensors[name] = parts.merged(name, base).to(dtype, copy=True).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{name} holds NaN or infinity after merging in {dtype}; use --dtype float32")
        num_changed += not torch.equal(tensors[name], base.to(dtype))
    write_shard(file, tensors, {"format": "pt", "merged_into": parts.base_words})
    return num_changed


def _config_changes(parts: _Parts, hf: dict[str, Any]) -> dict[str, Any]:
    """What the merge changed of the base's config.json: the vocabulary's size, the tie."""
    changes: dict[str, Any] = {}
    if parts.model.config.vocab_size != hf["vocab_size"]:
        changes["vocab_size"] = parts.model.config.vocab_size
    if not parts.model.config.tie_word_embeddings and hf.get("tie_word_embeddings", False):
        changes["tie_word_embeddings"] = False
    return changes


def _check_logits(parts: _Parts, folder: Path, tolerance: float) -> float | None:
    """Relative distance of the written model's logits from base + adapter's, in fp32; None if memory is short."""
    num_params = sum(parts.shape(name).numel() for name in parts.sources)
    if 5 * num_params > available_memory():  # 4 bytes each, and a fifth more for activations and the largest tensor
        return None
    reference = _reference_logits(parts)
    with torch.device("meta"):
        model = build_model(read_config(folder))
    load_weights(model, folder, device="cpu", dtype=torch.float32)
    merged = probe_logits(model)
    error = ((merged - reference).norm() / reference.norm()).item()
    if not error <= tolerance:
        raise UserError(
            f"the merged model's logits differ from base + adapter by {error:.1e} (relative), where rounding explains "
            f"{tolerance:.0e}; nothing was kept"
        )
    return error


def _reference_logits(parts: _Parts) -> Tensor:
    with torch.device("meta"):
        model = build_model(read_config(parts.base.path))
    _, new_rows = attach_adapter(model, parts.adapter)
    load_weights(model, parts.base.path, device="cpu", dtype=torch.float32, new_rows=new_rows)
    load_adapter(model, parts.adapter)
    for name in parts.nf4_names:
        model.get_submodule(name).weight.data.copy_(parts.dequantised(name))
    return probe_logits(model)
