"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors, saved, loaded, verified.

Names in the file are the model's own behind PEFT's prefix "base_model.model."; modules trained whole (embed_tokens,
lm_head) stand beside the adapter's tensors. Merging into a full model is in merge.py.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from torchft.atomic import write_bytes
from torchft.config import LoraOptions
from torchft.distributed import from_main
from torchft.errors import UserError
from torchft.export import export_directory, safetensors_bytes
from torchft.modules import fp8, nf4
from torchft.modules.eval_mode import eval_mode
from torchft.modules.lora import (
    LoRAExpertLinear,
    LoRALinear,
    LoraReport,
    LoraSpec,
    adapters_off,
    add_lora,
    init_lora,
    lora_layers,
    matches,
)
from torchft.modules.routing import ROUTERS
from torchft.modules.sharding import compute_device, cut, gathered, local, place, whole
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import PATHS, grow_vocab, init_new_rows, is_tied, resize_vocab, train_modules, trained_modules, untie
from torchft.peft_config import CONFIG, AdapterConfig, peft_fields, read_adapter
from torchft.ranks import rank
from torchft.safetensors_header import read_header
from torchft.stored import Piece, pieces, target_parameters

if TYPE_CHECKING:
    from torchft.data.chat_template import ChatTemplate
    from torchft.data.tokenizer import Tokenizer

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PROBE_SHAPE = (2, 32)  # rows x tokens of the random ids that logits are compared on


def add_adapter(model: CausalLM, options: LoraOptions, new_ids: range) -> tuple[LoraSpec, LoraReport, int]:
    """Give a model on meta the adapter of a config's `lora` group: the one at `lora.adapter`, or a new one.

    Args:
        new_ids: of tokens that were added to the tokenizer; their rows are trained beside a new adapter.

    Returns:
        What the adapter is, what was done, and how many rows embed_tokens and lm_head have got (for load_weights).

    Raises:
        UserError: a value is out of range, a target matches nothing, or the adapter does not fit the model.
    """
    if options.adapter:
        return read_adapter(options.adapter).spec, *attach_adapter(model, options.adapter)
    lora, targets = options, tuple(options.target_modules)
    try:
        spec = LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.dora, targets)
        report = add_lora(model, spec)
        new_rows = grow_vocab(model, new_ids)
        train_modules(model, options.modules_to_save or (list(PATHS) if new_ids else []))
    except ValueError as error:
        raise UserError(str(error)) from None
    return spec, report, new_rows


def init_adapter(model: CausalLM, options: LoraOptions, new_ids: range, generator: torch.Generator) -> None:
    """Fill what `add_adapter` added, once the base weights are in: from `lora.adapter`, or so that nothing changes yet.

    Args:
        generator: on the CPU, so that one seed gives one adapter on every device.
    """
    if options.adapter:
        load_adapter(model, options.adapter)
        return
    init_new_rows(model, new_ids, generator)
    init_lora(model, generator)


def adapter_tensors(model: CausalLM) -> dict[str, nn.Parameter]:
    """What an adapter file holds, by the model's names: A, B, DoRA's m, and weights trained whole, a tied one twice."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{name}.lora_B.weight"] = layer.lora_B.weight
        if layer.lora_magnitude_vector is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    for name in trained_modules(model):
        tensors[f"{PATHS[name]}.weight"] = model.get_parameter(f"{PATHS[name]}.weight")
    return tensors


def _pieces(model: CausalLM) -> dict[str, list[Piece]]:
    """How the file holds each of `adapter_tensors`."""
    stored = pieces(model)
    return {name: stored.get(name, [Piece(name, 0, len(param), tuple(param.shape))]) for name, param in adapter_tensors(model).items()}


def save_adapter(
    model: CausalLM,
    spec: LoraSpec,
    path: str | Path,
    *,
    base_path: str,
    tokenizer: "Tokenizer | None" = None,
    template: "ChatTemplate | None" = None,
    replace_existing: bool = False,
) -> None:
    """Write the model's adapter, and what it trains whole, as a PEFT directory that appears at once or not at all.

    Args:
        base_path: the base model's hub name or directory, by which PEFT finds it.
        tokenizer, template: what it was trained with; saved beside the adapter where they are not the base's own, because
            tokens were added or another template was chosen.

    Raises:
        UserError: `path` exists (without `replace_existing`) or cannot be written.
    """
    layers = lora_layers(model)
    assert layers, "save_adapter needs a model with adapters"
    spec = _as_saved(spec, layers)
    whole = trained_modules(model)
    parameters = target_parameters(layers, spec.target_modules)
    fields = peft_fields(spec, whole, base_path, tied=bool(whole) and is_tied(model), parameters=parameters)
    # PEFT has no field for how the base was stored, but merging must know what the adapter was trained on.
    base_dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    metadata = {"format": "pt", "base_dtype": base_dtype, "base_quantization": _quantization(layers)}
    tensors = {name: gathered(param.detach()) for name, param in adapter_tensors(model).items()}
    if rank() > 0:
        return
    stored = _pieces(model)
    tensors = {  # a tied weight twice: no shared memory
        PREFIX + piece.name: piece.cut(tensor).to("cpu", copy=True)
        for name, tensor in tensors.items()
        for piece in stored[name]
    }
    with export_directory(Path(path), replace=replace_existing) as folder:
        write_bytes(folder / WEIGHTS, safetensors_bytes(tensors, metadata))
        write_bytes(folder / CONFIG, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())
        if tokenizer is not None:
            save_text(folder, tokenizer, template, Path(base_path))


def _as_saved(spec: LoraSpec, layers: dict[str, LoRALinear]) -> LoraSpec:
    """What the file says: targets by their names, and no dropout where experts or routers are adapted. peft refuses to load
    such an adapter with dropout at all; it acts in training alone, so that the adapter computes the same without.
    """
    if spec.target_modules == ("all-linear",):
        spec = replace(spec, target_modules=tuple(sorted({name.rpartition(".")[2] for name in layers})))
    experts = any(isinstance(layer, LoRAExpertLinear) for layer in layers.values())
    routers = any(name.rpartition(".")[2] in ROUTERS for name in layers)
    return replace(spec, dropout=0.0) if experts or routers else spec


def _quantization(layers: dict[str, LoRALinear]) -> str:
    """How the base was stored, as model.quantize has it; some linears may have stayed dense."""
    weights = [local(layer.weight) for layer in layers.values()]
    if any(fp8.is_fp8(weight) for weight in weights):
        return "fp8"
    return "nf4" if any(isinstance(weight, nf4.NF4Tensor) for weight in weights) else "none"


def _on_cpu(param: nn.Parameter) -> Tensor:
    """A copy of all of a parameter."""
    return whole(param.detach()).to("cpu", copy=True)


def save_text(folder: Path, tokenizer: "Tokenizer", template: "ChatTemplate | None", base: Path) -> None:
    """Write the tokenizer and the chat template into `folder`, unless both are those of the base model."""
    chosen = template is not None and template.source != tokenizer.chat_template
    if tokenizer.added or chosen or tokenizer.path.resolve() != base.resolve():
        tokenizer.save(folder)
    if chosen:
        write_bytes(folder / "chat_template.jinja", template.source.encode())


def tokenizer_folder(base: str | Path, adapter: str | Path | None) -> Path:
    """Where the tokenizer is: in the adapter's directory if that has one (see save_adapter), else in the base's."""
    brings = adapter and any((Path(adapter) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return Path(adapter) if brings else Path(base)


def attach_adapter(model: CausalLM, path: str | Path) -> tuple[LoraReport, int]:
    """Give a model on meta the structure that the adapter at `path` was trained in.

    Adds the adapters, appends rows for added tokens, makes modules trained whole, and parts a tied pair of which the
    adapter holds one side or two different ones. Next: `load_weights(..., new_rows=...)`, then `load_adapter`.

    Returns:
        What `add_lora` did, and the number of rows appended (for `load_weights`).

    Raises:
        UserError: see `read_adapter`; or the adapter does not fit the model.
    """
    config, file = read_adapter(path), weights_file(Path(path))
    rows = _num_rows(file, config.modules_to_save)
    try:
        report = add_lora(model, config.spec)
        new_rows = resize_vocab(model, rows) if rows else 0
        if config.modules_to_save and is_tied(model) and not _holds_equal_ends(file):
            untie(model)
        train_modules(model, config.modules_to_save)
    except ValueError as error:
        raise UserError(f"{path}: the adapter does not fit this model: {error}") from None
    return report, new_rows


def _num_rows(file: Path, modules_to_save: tuple[str, ...]) -> int:
    """Rows of the embed_tokens and lm_head that an adapter holds: the size of its vocabulary; 0 if it holds neither."""
    keys = [f"{PREFIX}{PATHS[name]}.weight" for name in modules_to_save]
    shapes = [info.shape for key, info in read_header(file).tensors.items() if key in keys]
    return max((shape[0] for shape in shapes if shape), default=0)


def _holds_equal_ends(file: Path) -> bool:
    tensors = load_file(file)
    embedding, head = (tensors.get(f"{PREFIX}{path}.weight") for path in PATHS.values())
    return embedding is not None and head is not None and torch.equal(embedding, head)


@torch.no_grad()
def load_adapter(model: CausalLM, path: str | Path) -> int:
    """Read an adapter's tensors into a model that has its structure and its base weights; returns how many.

    Raises:
        UserError: the file is damaged, or a tensor is missing, unexpected or misshapen. The model is then untouched.
    """
    tensors, device = read_tensors(model, Path(path)), model.model.norm.weight.device
    for name, param in adapter_tensors(model).items():
        value = tensors[name].to(device, param.dtype)
        if param.is_meta:
            module, _, leaf = name.rpartition(".")
            place(model.get_submodule(module), leaf, value)
        else:  # trained whole, and perhaps one with another
            param.copy_(cut(value, param))
    return len(tensors)


def weights_file(folder: Path) -> Path:
    """The adapter's safetensors file. Raises UserError where there is none, and for a pickled one in its place."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder / WEIGHTS} is missing; adapter_model.bin is a pickle, which is never opened: save the adapter "
            "again with a current peft"
        )
    raise UserError(f"{folder / WEIGHTS} is missing; copy the adapter again")


def read_tensors(model: CausalLM, folder: Path) -> dict[str, Tensor]:
    """The file's tensors by the model's names.

    Raises:
        UserError: they are not exactly those that `model` has, in its shapes.
    """
    file, stored = weights_file(folder), _pieces(model)
    wanted = {piece.name: piece for each in stored.values() for piece in each}
    infos = read_header(file).tensors
    keys = {_current_spelling(key, infos): key for key in infos}
    needed = {PREFIX + name for name in wanted}
    missing, unexpected = sorted(needed - keys.keys()), sorted(keys.keys() - needed)
    if missing or unexpected:
        raise UserError(
            f"{file} does not fit this model: {len(missing)} tensors are missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]} ({len(infos)} in the file, {len(wanted)} wanted); "
            "is it an adapter for this base model, with the modules_to_save that its config names?"
        )
    for name, piece in wanted.items():
        info, shape = infos[keys[PREFIX + name]], piece.shape
        if info.shape != shape or info.dtype not in ("F32", "F16", "BF16"):
            wanted_here = f"the model's a float tensor {shape}"
            raise UserError(f"{file}: {name} is {info.dtype} {info.shape}, {wanted_here}; is it an adapter for this base model?")
    loaded = load_file(file)
    values = {
        name: [piece.rows_of(loaded[keys[PREFIX + piece.name]], 0, piece.stop) for piece in each]
        for name, each in stored.items()
    }
    return {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in values.items()}


def _current_spelling(key: str, others: Collection[str]) -> str:
    """PEFT once wrote DoRA's m as the weight of a module."""
    current = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return key if current in others else current


@dataclass(frozen=True)
class AdapterCheck:
    """What `verify_adapter` compared."""

    path: Path
    num_tensors: int
    max_difference: float  # between logits of the live adapter and of the one read back
    effect: float | None  # relative change of the logits from base to adapter; None where the base is not recoverable

    def __str__(self) -> str:
        effect = "" if self.effect is None else f"; it moves the base model's logits by {100 * self.effect:.2g}%"
        difference = f"logits differ by at most {self.max_difference:.2g}"
        return f"{self.path}: {self.num_tensors} tensors read back bit for bit, {difference}{effect}"


@torch.no_grad()
def verify_adapter(model: CausalLM, spec: LoraSpec, path: str | Path) -> AdapterCheck:
    """Read a saved adapter back and hold it against the live one: config, every tensor, and logits on random tokens.

    Every process of the run must call it: one reads, and the model is asked on all.

    Raises:
        UserError: anything differs, so that what is on the disk is not what was trained.
    """
    folder, whole = Path(path), trained_modules(model)
    config, tensors = from_main(lambda: (read_adapter(folder), read_tensors(model, folder)))
    live = adapter_tensors(model)
    _compare_config(folder / CONFIG, config, model, spec)
    for name, param in live.items():
        if not torch.equal(tensors[name], _on_cpu(param)):
            file = folder / WEIGHTS
            raise UserError(f"{file}: {name} is not what was trained; the disk may be failing: save elsewhere")

    trained = probe_logits(model)
    with _swapped(model, tensors, config.spec.scale):
        read_back = probe_logits(model)
    difference = (read_back - trained).abs().max().item()
    # The same kernels on the same numbers: only an order of summation may differ, and NaN must not pass.
    if not difference <= 1e-3 * trained.abs().max().item():
        raise UserError(f"{folder}: the saved adapter's logits differ from the trained one's by {difference:.2g}")
    effect = None
    if not whole:
        with adapters_off(model):
            base = probe_logits(model)
        effect = ((trained - base).norm() / base.norm()).item()
    return AdapterCheck(folder, len(live), difference, effect)


def _compare_config(file: Path, config: AdapterConfig, model: CausalLM, spec: LoraSpec) -> None:
    """The config says what was trained: the numbers, the modules, and exactly the adapted linears."""
    layers, whole = lora_layers(model), trained_modules(model)
    spec, adapted = _as_saved(spec, layers), list(layers)
    if replace(config.spec, target_modules=spec.target_modules) != spec or config.modules_to_save != whole:
        raise UserError(f"{file} says {config}, but {spec} was trained, with {whole or 'nothing'} whole")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name]
    meant = [name for name in linears if matches(name, config.spec.target_modules)]
    if meant != adapted:
        raise UserError(f"{file}: target_modules mean {len(meant)} linears, but {len(adapted)} were trained")


@contextmanager
def _swapped(model: CausalLM, tensors: dict[str, Tensor], scale: float) -> Iterator[None]:
    """The adapter with these tensors and this scale for the length of a `with`."""
    live, layers = adapter_tensors(model), lora_layers(model).values()
    before = {name: _on_cpu(param) for name, param in live.items()}
    scales = [layer.scale for layer in layers]
    try:
        for name, param in live.items():
            param.copy_(cut(tensors[name], param))
        for layer in layers:
            layer.scale = scale
        yield
    finally:
        for name, param in live.items():
            param.copy_(cut(before[name], param))
        for layer, own in zip(layers, scales, strict=True):
            layer.scale = own


@torch.no_grad()
def probe_logits(model: CausalLM) -> Tensor:
    """Logits (2, 32, V) in fp32 on fixed random tokens, without dropout and without compiling for their shape."""
    ids = torch.randint(model.config.vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        return model(ids.to(compute_device(model.lm_head.weight))).float()
