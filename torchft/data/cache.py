"""Tokenised datasets kept on disk, so that the second run with the same data starts at once.

Files lie in $XDG_CACHE_HOME/torchft/tokens (~/.cache without it), one safetensors file per key. The key is a hash of
all that decides the tokens: the data's bytes, the tokenizer's files and added tokens, the chat template's text, the
source of this folder, the versions of the libraries that tokenise, and every option. So a stale file is never found,
only no file. A file is written beside its name and renamed, and its arrays are hashed again when they
are read. Deleting the folder is always safe.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from torchft.config import DataConfig, SourceConfig
from torchft.data.chat_template import ChatTemplate
from torchft.data.sources import hash_source
from torchft.data.tokenizer import Tokenizer

CODE = Path(__file__).parent
LIBRARIES = ("tokenizers", "sentencepiece", "tiktoken", "jinja2")
Arrays = dict[str, np.ndarray]


def cache_key(
    sources: list[SourceConfig],
    data_cfg: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    key: str,
    kind: str = "sft",
) -> str:
    """sha256 over everything that decides the tokens of these sources. Args as for build_dataset."""
    options = dataclasses.asdict(dataclasses.replace(data_cfg, train=[], valid=[]))
    facts = {
        "sources": [dataclasses.asdict(source) for source in sources],
        "data": [hash_source(source, f"{key}[{number}]") for number, source in enumerate(sources)],
        "tokenizer": [(file.name, _hash_file(file)) for file in tokenizer.files],
        "added": tokenizer.added,  # by data.new_tokens: they are in no file yet
        "special_tokens": tokenizer.special_tokens,
        "template": template and [template.source, template.tools_source, template.special],
        "code": [_hash_file(file) for file in sorted(CODE.glob("*.py"))],
        "libraries": [metadata.version(name) for name in LIBRARIES],
        "options": options,
        "kind": kind,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _hash_entry(arrays: Arrays, facts: str) -> str:
    return hash_arrays(arrays | {"facts": np.frombuffer(facts.encode(), np.uint8)})


def cache_file(key: str) -> Path:
    """Where the arrays of a key lie, or would lie."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # the specification: a relative path in the variable is to be ignored
    folder = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return folder / "torchft" / "tokens" / f"{key}.safetensors"


def cache_note(key: str) -> str:
    """The file of a key for people: the first of its 64 digits are enough to find it."""
    folder = cache_file(key).parent
    home = Path.home()
    short = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
    return f"from the cache, {short}/{key[:8]}*"


def load_arrays(key: str, quiet: bool = False) -> tuple[Arrays, dict[str, Any]] | None:
    """The arrays and facts stored under a key; None if there are none, or if they are damaged, which is said."""
    path = cache_file(key)
    try:
        with safe_open(path, framework="np") as file:
            stored = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if stored.get("key") != key or stored.get("sha256") != _hash_entry(arrays, stored.get("facts", "")):
            raise ValueError("its contents are not what was written")
        return arrays, json.loads(stored["facts"])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as error:
        if not quiet:
            print(f"token cache: {path} cannot be used ({error}); tokenising again")
        return None


def store_arrays(key: str, arrays: Arrays, facts: dict[str, Any], quiet: bool = False) -> None:
    """Store arrays and JSON facts under a key. A place that cannot be written means no cache, which is said."""
    path = cache_file(key)
    text = json.dumps(facts)
    described = {"key": key, "sha256": _hash_entry(arrays, text), "facts": text}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="writing-") as folder:
            temporary = Path(folder) / "tokens.safetensors"
            save_file(arrays, temporary, described)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if not quiet:
            print(f"token cache: {path.parent} cannot be written ({error}); the tokens are not kept")
