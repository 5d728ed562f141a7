"""Hugging Face model directories as this project writes them: planned in files, each read back, with all that belongs to it.

Used by `tune merge` (merge.py) and for models trained whole (save_model.py). Both fill one file's tensors at a time, so that no
more than that is in memory. Left out: reading them (hf_checkpoint.py, weights.py).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from torchft.atomic import write_bytes
from torchft.data.chat_template import load_template
from torchft.data.tokenize import stop_ids
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.export import save_safetensors
from torchft.hf_checkpoint import INDEX, SINGLE, contained
from torchft.models import read_config
from torchft.safetensors_header import read_header

MAX_SHARD_BYTES = 5 * 10**9
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
GENERATION = "generation_config.json"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json, which holds where there is no such file
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")  # a licence that asks for it travels with the weights

# Largest ||read back - reference|| / ||reference|| of logits. What differs is the rounding of the written weights, 2^-9 for bf16: it
# moved the logits of 2 layers by 0.2% to 0.4%, and grows with the depth.
LOGIT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def plan_shards(sizes: dict[str, int], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensors, in the order of `sizes` (name -> bytes), each file as full as `max_bytes` allows."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` lacks `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        gib = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on that disk"
        raise UserError(f"{folder.parent.parent}: the model takes {gib}; free space or choose another place")


def write_shard(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one file and compare it with what was written, bit for bit. Raises UserError where they differ."""
    save_safetensors(tensors, file, metadata)
    assert read_header(file).tensors.keys() == tensors.keys(), file
    with safe_open(file, framework="pt", device="cpu") as written:
        for name, tensor in tensors.items():
            if not torch.equal(written.get_tensor(name), tensor):
                raise UserError(f"{file}: {name} is not what was written; the disk may be failing: choose another place")


def write_index(folder: Path, shards: dict[str, list[str]], num_bytes: int) -> None:
    """The table of a model in several files; one file needs none."""
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_bytes(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_config(base: Path, hf: dict[str, Any], folder: Path, changes: dict[str, Any], dtype: torch.dtype | None) -> None:
    """The base's config.json (`hf`, read), but for `changes` and the dtype of the weights (None: as it is)."""
    if dtype is not None:  # transformers 5 writes dtype, older ones torch_dtype
        changes = changes | {"dtype" if "dtype" in hf else "torch_dtype": str(dtype).removeprefix("torch.")}
    written = {key: value for key, value in (hf | changes).items() if key != "quantization_config"}  # what is written is not
    if written == hf:
        shutil.copyfile(contained(base, "config.json"), folder / "config.json")
    else:
        write_json(folder / "config.json", written)


def copy_companions(base: Path, folder: Path) -> None:
    """The base's tokenizer, generation settings and licence."""
    for path in base.iterdir():
        wanted = path.suffix in COPIED_SUFFIXES or path.name.startswith(COPIED_NAMES)
        if wanted and path.is_file() and path.name not in ("config.json", INDEX) and not path.name.startswith("."):
            shutil.copyfile(contained(base, path.name), folder / path.name)


def add_stop_ids(folder: Path) -> None:
    """Have generation_config.json in `folder` stop at what ends an answer: EOS and the chat template's end token, if it does not.

    Whoever serves the model (transformers, vLLM) stops at its eos_token_id and knows nothing of templates: an end token that was
    added, or first trained here, would be answered past.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return
    try:
        tokenizer = load_tokenizer(folder)
        stops = stop_ids(tokenizer, load_template("", tokenizer))
    except UserError:  # the base's own, which nothing was trained with: a model of plain text is merged all the same
        return
    file, hf = folder / GENERATION, read_config(folder)
    own = json.loads(file.read_bytes()) if file.exists() else {key: hf[key] for key in ENDS if hf.get(key) is not None}
    known = own.get("eos_token_id")
    known = [] if known is None else known if isinstance(known, list) else [known]
    if missing := sorted(stops - set(known)):
        write_json(file, own | {"eos_token_id": [*known, *missing]})


def available_memory() -> int:
    """Bytes of this machine's memory that can be had without swapping; 0 where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
