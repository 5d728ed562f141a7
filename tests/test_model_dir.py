"""generation_config.json of what is written: served elsewhere, an answer ends where it was trained to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_base, make_adapter
from transformers import GenerationConfig

from torchft.config import ASSETS
from torchft.data.chat_template import load_template
from torchft.data.tokenizer import load_tokenizer
from torchft.merge import merge
from torchft.model_dir import add_stop_ids
from torchft.modules.lora import LoraSpec
from torchft.save_model import save_model

TINY = ASSETS / "tiny_llama"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ END }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory without weights, whose tokenizer has <|done|>, and a template that ends every turn in it."""
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    number = 1 + max(token["id"] for token in [*tokenizer["added_tokens"], {"id": max(tokenizer["model"]["vocab"].values())}])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": number, "content": "<|done|>"} | flags)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = json.loads((TINY / "tokenizer_config.json").read_text())
    texts["chat_template"] = TEMPLATE.replace("{{ END }}", "<|done|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(texts))
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    return tmp_path


def done(folder: Path) -> int:
    return load_tokenizer(folder).special_tokens["<|done|>"]


def generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    assert file.exists(), "nothing says where to stop"
    return json.loads(file.read_text())


def ends(folder: Path) -> list[int]:
    ids = generation(folder)["eos_token_id"]
    return ids if isinstance(ids, list) else [ids]


@pytest.mark.parametrize("eos", [7, [7, 9]])
def test_the_end_token_of_the_template_is_added(folder: Path, eos: int | list[int]) -> None:
    before = {"temperature": 0.6, "eos_token_id": eos, "transformers_version": "4.40.0"}
    (folder / "generation_config.json").write_text(json.dumps(before))
    add_stop_ids(folder)
    found = generation(folder)
    known = eos if isinstance(eos, list) else [eos]
    assert found["eos_token_id"][: len(known)] == known and found.keys() == before.keys()
    assert set(found["eos_token_id"]) == {*known, done(folder), load_tokenizer(folder).eos_id}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == found["eos_token_id"]


def test_what_is_there_already_stays_byte_for_byte(folder: Path) -> None:
    content = json.dumps({"eos_token_id": [done(folder), load_tokenizer(folder).eos_id], "top_p": 0.9}, indent=7)
    (folder / "generation_config.json").write_text(content)
    add_stop_ids(folder)
    assert (folder / "generation_config.json").read_text() == content


def test_without_the_file_config_json_gives_the_ids(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 3, "eos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    add_stop_ids(folder)
    found = generation(folder)
    assert found["bos_token_id"] == 3 and found["eos_token_id"][0] == 5 and done(folder) in found["eos_token_id"]


@pytest.mark.parametrize("broken", ["{% for", "{{ ().__class__.__mro__ }}"])
def test_a_template_that_cannot_be_used_ends_nothing(folder: Path, broken: str) -> None:
    texts = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": broken}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    add_stop_ids(folder)
    assert ends(folder)[0] == 7 and done(folder) not in ends(folder)


def test_without_a_tokenizer_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    add_stop_ids(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_merged_model_stops_where_its_adapter_learned_to(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("merged")
    make_adapter(TINY, out / "adapter", LoraSpec(4, 10.0))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "adapter" / name).write_bytes((folder / name).read_bytes())
    merge(TINY, out / "adapter", out / "model")
    assert done(folder) in ends(out / "model")


def test_a_model_trained_whole_too(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("trained") / "model"
    (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    tokenizer = load_tokenizer(folder)
    texts = {"tokenizer": tokenizer, "template": load_template("", tokenizer)}
    save_model(load_base(folder), folder, out, dtype=torch.float32, **texts)
    assert done(folder) in ends(out)
