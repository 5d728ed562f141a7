"""Small random Hugging Face models on disk, and the same models in our modules: what several tests start from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from torchft.adapter import attach_adapter, load_adapter, save_adapter
from torchft.errors import UserError
from torchft.hf_checkpoint import SINGLE
from torchft.models import build_model, read_config
from torchft.modules.lora import LoraSpec, add_lora, init_lora, trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import train_modules
from torchft.weights import load_weights

VOCAB_SIZE = 97


def hf_config(model_type: str = "llama", **others: Any) -> dict[str, Any]:
    """A config of small sizes, in which some linears are whole NF4 groups (128 x 256) and some are not (64 x 128)."""
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    } | others


def make_base(
    path: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **others: Any
) -> PreTrainedModel:
    """A transformers model with weights of a size that matters, saved at `path`; returned in `dtype`, in eval mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**hf_config(model_type, **others)), dtype=torch.float32
    )
    for name, param in model.named_parameters():
        if param.ndim == 2:
            torch.nn.init.normal_(param, std=0.08 if "embed" not in name else 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.1)
    model = model.to(dtype).eval()
    model.save_pretrained(path)
    return model


def on_meta(path: Path) -> CausalLM:
    """The structure of the model at `path`, without weights."""
    with torch.device("meta"):
        return build_model(read_config(path))


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The base model at `path` in our modules, in `dtype`."""
    model = on_meta(path)
    load_weights(model, path, device="cpu", dtype=dtype)
    return model.eval()


def refused_load(path: Path, *words: str) -> str:
    """Loading must fail with one line that holds `words`, and leave the model as it was; returns the message."""
    model = on_meta(path)
    with pytest.raises(UserError) as caught:
        load_weights(model, path, device="cpu", dtype=torch.float32)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert all(param.is_meta for param in model.parameters()), "a refused load leaves nothing behind"
    return message


def load_with_adapter(
    path: Path,
    spec: LoraSpec,
    modules_to_save: tuple[str, ...] = (),
    *,
    trained: bool = True,
    dtype: torch.dtype = torch.float32,
) -> CausalLM:
    """The model at `path` with an adapter; `trained`: all of it moved away from where training starts."""
    model = on_meta(path)
    add_lora(model, spec)
    train_modules(model, modules_to_save)
    load_weights(model, path, device="cpu", dtype=dtype)
    init_lora(model, torch.Generator().manual_seed(1))
    if trained:
        train_a_little(model)
    return model.eval()


def load_saved_adapter(path: Path, adapter: Path) -> CausalLM:
    """Base and adapter from their directories, as `tune generate` loads them."""
    model = on_meta(path)
    _, new_rows = attach_adapter(model, adapter)
    load_weights(model, path, device="cpu", dtype=torch.float32, new_rows=new_rows)
    load_adapter(model, adapter)
    return model.eval()


def make_adapter(base: Path, path: Path, spec: LoraSpec, names: tuple[str, ...] = (), *, trained: bool = True) -> Path:
    """An adapter directory for the model at `base`; returns its path."""
    save_adapter(load_with_adapter(base, spec, names, trained=trained), spec, path, base_path=str(base))
    return path


def train_a_little(model: CausalLM) -> None:
    """As if some steps had been taken: every trained parameter gets random numbers of its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in trainable_parameters(model).values():
            param += 0.05 * torch.randn(param.shape, generator=generator).to(param.device)


def sample_ids(rows: int = 2, tokens: int = 12, vocab_size: int = VOCAB_SIZE, seed: int = 3) -> torch.Tensor:
    """(rows, tokens) random token ids."""
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object], file: str = SINGLE) -> None:
    """Rewrite a safetensors file with its tensors changed by `edit`."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
    edit(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})


def linked_as_the_hub_does(base: Path, root: Path) -> Path:
    """The cache's layout: each file of a snapshot is a link to a blob."""
    blobs, snapshot = root / "models--org--name" / "blobs", root / "models--org--name" / "snapshots" / "1f2e"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        shutil.copy(file, blobs / f"sha-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-of-{file.name}")
    return snapshot
