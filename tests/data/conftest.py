"""Fixtures of the data tests: a byte tokenizer, and data sets built from rows in a temporary folder."""

import json

import pytest
from byte_tokenizer import write_tokenizer

from torchft.config import DataConfig, SourceConfig
from torchft.data.dataset import build_dataset


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def build(byte_model, tmp_path, monkeypatch):
    """build(rows or text, ...) -> Dataset, from a file of that content, with the cache in a place of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(*contents, use_cache=False, name="t.jsonl", key="data.train", sources=({},) * 9, template=True, **options):
        files = []
        for number, content in enumerate(contents):
            path = tmp_path / f"{number}{name}"
            if isinstance(content, list):
                content = "".join(json.dumps(row) + "\n" for row in content)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            files.append(SourceConfig(path=str(path), **sources[number]))
        cfg = DataConfig(train=files, **{"max_seq_len": 64, "max_bad_rows": 0.0} | options)
        return build_dataset(
            files, cfg, byte_model[0], byte_model[1] if template is True else template, key=key, use_cache=use_cache
        )

    return make
