"""A trained reward model as a Hugging Face directory, `...ForSequenceClassification` with one label, which transformers loads.

    export_reward_model(model, base, adapter, out / "reward_model", tokenizer, template, nf4_base=False)

The adapter is merged into the base (merge.py), the language model's head is left out, and the score is added.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from torchft.atomic import write_bytes
from torchft.data.chat_template import ChatTemplate
from torchft.data.tokenize import stop_ids
from torchft.data.tokenizer import Tokenizer
from torchft.distributed import from_main
from torchft.errors import UserError
from torchft.export import export_directory, save_safetensors
from torchft.hf_checkpoint import INDEX, SINGLE
from torchft.merge import merge
from torchft.models import CLASSIFIERS
from torchft.modules.score import RewardModel
from torchft.modules.sharding import gathered

HEAD, SCORE = "lm_head.weight", "score.weight"
SCORE_FILE = "score.safetensors"
BASE_FILE = "base.safetensors"  # in place of model.safetensors, beside which transformers would not look for a score


def export_reward_model(
    model: RewardModel,
    base: Path,
    adapter: Path,
    out: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    nf4_base: bool,
) -> str:
    """Write and verify it; returns a line that says what was compared. Every process of a run must call it.

    template: by which the answers were rendered. nf4_base: merge into the weights as NF4 training saw them. Raises: UserError
    as merge, and where there is no token to pad with.
    """
    score = gathered(model.score.weight.detach())
    pad = padding_token(tokenizer, template)
    return from_main(lambda: _export(score, base, adapter, out, pad, nf4_base))


def padding_token(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[str, int]:
    """A control token that no answer ends in, and its id: transformers scores the last token that is not padding.

    The tokenizer's own padding token, its BOS, or the first other one that serves. Raises UserError where none does.
    """
    ends, named = stop_ids(tokenizer, template), [tokenizer.named.get(name, "") for name in ("pad_token", "bos_token")]
    for token in [*named, *sorted(tokenizer.special_tokens)]:
        number = tokenizer.special_tokens.get(token)
        if number is not None and number not in ends:
            return token, number
    raise UserError(
        f"{tokenizer.path}: every control token ends an answer, and transformers scores the last token that is no padding: add "
        "a padding token to the tokenizer (data.new_tokens does not go with a reward model)"
    )


def _export(score: torch.Tensor, base: Path, adapter: Path, out: Path, pad: tuple[str, int], nf4_base: bool) -> str:
    with export_directory(out, replace=True) as folder:
        report = merge(base, adapter, folder / "merged", nf4_base=nf4_base)
        for path in (folder / "merged").iterdir():
            os.rename(path, folder / path.name)
        (folder / "merged").rmdir()
        files = _without_head(folder)
        save_safetensors({SCORE: score.cpu().contiguous()}, folder / SCORE_FILE, {"format": "pt"})
        files[SCORE] = SCORE_FILE
        size = sum((folder / name).stat().st_size for name in set(files.values()))
        write_bytes(folder / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2).encode())
        _write_config(folder, *pad)
        if not torch.equal(load_file(folder / SCORE_FILE)[SCORE], score.cpu()):
            raise UserError(f"{out}: the score is not what was trained; the disk may be failing: save elsewhere")
    return str(report).replace(str(folder / "merged"), str(out))


def _without_head(folder: Path) -> dict[str, str]:
    """tensor -> file, after the head is taken out of the one that holds it."""
    if (folder / INDEX).exists():
        files = json.loads((folder / INDEX).read_bytes())["weight_map"]
    else:
        os.rename(folder / SINGLE, folder / BASE_FILE)
        files = dict.fromkeys(load_file(folder / BASE_FILE), BASE_FILE)
    if HEAD in files:
        file = folder / files.pop(HEAD)
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name != HEAD}
        file.unlink()
        if tensors:
            save_safetensors(tensors, file, {"format": "pt"})
    return files


def _write_config(folder: Path, pad: str, pad_id: int) -> None:
    """config.json with the other architecture, one label, and what to pad with; the tokenizer's settings with the same."""
    config = json.loads((folder / "config.json").read_bytes())
    config["architectures"] = [CLASSIFIERS[config["architectures"][0]]]
    config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": pad_id}
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        changed = json.loads(settings.read_bytes()) | {"pad_token": pad}
        write_bytes(settings, (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode())
