"""What stands beside a tokenizer: names of special tokens, their flags, chat templates. All of it is optional."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from torchft.errors import UserError

# The attributes that transformers calls special tokens, in its order; a template sees those that are set as variables.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerConfig:
    """tokenizer_config.json and its companions, read once."""

    named: dict[str, str]  # bos_token, eos_token ...: those that are set
    listed: dict[int, tokenizers.AddedToken]  # added_tokens_decoder: id -> token with its flags
    extra: list[str]  # further special tokens
    chat_template: str | None
    tools_template: str | None  # a second template for conversations with tools; nearly no tokenizer has one


def read_config(path: Path) -> TokenizerConfig:
    """The configuration of a model directory; empty where files are missing.

    Raises:
        UserError: a file is not JSON, or not shaped as transformers writes it.
    """
    config = _read_json(path / "tokenizer_config.json")
    try:
        listed = {int(i): _added_token(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
        templates = _templates(path, config)
        return TokenizerConfig(_named_tokens(path, config), listed, _extra_tokens(config), *templates)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        file = path / "tokenizer_config.json"
        raise UserError(f"{file}: an entry is not shaped as transformers writes it: {error!r}") from None


def _named_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    older = _read_json(path / "special_tokens_map.json")
    tokens = {name: config.get(name) or older.get(name) for name in NAMED}
    return {name: _content(token) for name, token in tokens.items() if token}


def _extra_tokens(config: dict[str, Any]) -> list[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} where a JSON object belongs")
    return content


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added_token(token: dict[str, Any]) -> tokenizers.AddedToken:
    flags = {
        name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token
    }
    return tokenizers.AddedToken(token["content"], **flags)


def _templates(path: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and the one for tools: chat_template.jinja, chat_template.json, or tokenizer_config.json's."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), None
    template = _read_json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        several = {entry["name"]: entry["template"] for entry in template}
        return several.get("default"), several.get("tool_use")
    return template, None
