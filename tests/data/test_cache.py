"""The token cache: never stale, never half written, never believed when damaged, never needed."""

import dataclasses
from collections import Counter
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokenizer import row, write_tokenizer

from torchft.config import DataConfig, SourceConfig
from torchft.data import cache, samples, sandbox
from torchft.data.chat_template import ChatTemplate
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError

ROWS = [row("q0", "a0"), row("q1", "a1"), row("q2", None)]


def refuse(*args, **kwargs):
    raise AssertionError("tokenised again")


def same(a, b):
    arrays = all(
        np.array_equal(a.arrays[name], b.arrays[name]) and a.arrays[name].dtype == b.arrays[name].dtype
        for name in a.arrays
    )
    return arrays and a.reports == b.reports and a.fingerprint == b.fingerprint


def test_the_second_build_takes_the_tokens_from_the_cache(build, monkeypatch, tmp_path):
    first = build(ROWS, use_cache=True, max_bad_rows=0.5)
    assert not first.cache_note and first.reports[0].reasons
    (file,) = (tmp_path / "cache" / "torchft" / "tokens").iterdir()
    monkeypatch.setattr(samples, "tokenize_chat", refuse)
    again = build(ROWS, use_cache=True, max_bad_rows=0.5)
    assert same(first, again) and again.cache_note == f"from the cache, {file.parent}/{file.name[:8]}*"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_note("0123456789") == "from the cache, ~/cache/torchft/tokens/01234567*"
    assert again.example(1).messages[1]["content"] == "a1"


def test_every_input_changes_the_key(byte_model, tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n')
    source, cfg = SourceConfig(path=str(path)), DataConfig()
    folder = tmp_path / "tok"
    folder.mkdir()
    tokenizer, template = write_tokenizer(folder)

    def key(source=source, cfg=cfg, tokenizer=tokenizer, template=template):
        return cache.cache_key([source], cfg, tokenizer, template, "data.train")

    keys = {"first": key()}
    assert key(tokenizer=load_tokenizer(folder)) == keys["first"]
    changed = {
        "path": str(tmp_path / "u.jsonl"),
        "weight": 2.0,
        "split": "test",
        "format": "text",
        "columns": {"text": "text"},
    }
    (tmp_path / "u.jsonl").write_text('{"text": "a"}\n')
    assert set(changed) == {field.name for field in dataclasses.fields(SourceConfig)}
    for name, value in changed.items():
        keys[f"source.{name}"] = key(source=dataclasses.replace(source, **{name: value}))
    changed = {
        "valid_fraction": 0.1, "chat_template": "chatml", "train_on": "last", "max_seq_len": 64, "packing": False,
        "truncation": "right", "max_bad_rows": 0.5, "new_tokens": ["<new>"],
    }  # fmt: skip
    assert {"train", "valid", *changed} == {field.name for field in dataclasses.fields(DataConfig)}
    for name, value in changed.items():
        keys[f"data.{name}"] = key(cfg=dataclasses.replace(cfg, **{name: value}))
    keys["no template"] = key(template=None)
    keys["template"] = key(template=type(template)(template.source + " ", template.special))
    keys["template variables"] = key(template=type(template)(template.source, template.special | {"bos_token": "x"}))
    keys["two sources"] = cache.cache_key([source, source], cfg, tokenizer, template, "data.train")
    path.write_text('{"text": "b"}\n')
    keys["data"] = key()
    path.write_text('{"text": "a"}\n')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b"\n")
        keys[name] = key()
        (folder / name).write_bytes(before)
    tokenizer.add_tokens(["<new>"])
    keys["added token"] = key()
    monkeypatch.setattr(cache, "CODE", tmp_path / "code")
    (tmp_path / "code").mkdir()
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "code" / "x.py").write_text(text)
        keys[f"code {text}"] = key()
    assert len(set(keys.values())) == len(keys), Counter(keys.values()).most_common(1)


def test_a_template_that_prints_the_date_gives_the_same_tokens_tomorrow(build, byte_model, monkeypatch):
    """Else a run could not be resumed after midnight: its data would have another fingerprint. That it is dated is said."""
    source = "{{ strftime_now('%d %b %Y') }}" + byte_model[1].source
    dated = ChatTemplate(source, byte_model[1].special)
    built = []
    for day in (1, 2):
        monkeypatch.setattr(sandbox, "datetime", SimpleNamespace(now=lambda day=day: datetime(2030, 1, day)))
        built.append(build(ROWS, template=dated, max_bad_rows=0.5))
    assert built[0].fingerprint == built[1].fingerprint
    assert built[0].reports[0].notes == {"the chat template's date is 26 Jul 2024, whatever the day": 2}
    assert byte_model[0].decode(built[0].ids.tolist()).startswith("26 Jul 2024")
    shouting = ChatTemplate(source.replace("m.content", "m.content | upper"), byte_model[1].special)
    with pytest.raises(UserError, match=r"1 nothing to train: ((?!date).)*$"):  # which the date is no reason for
        build([row("q", "a")], template=shouting)
    assert not build(ROWS, max_bad_rows=0.5).reports[0].notes


@pytest.mark.parametrize("damage", ["flip", "flip in the report", "cut", "empty", "other"])
def test_a_damaged_cache_file_is_made_anew_and_said(build, tmp_path, capsys, damage):
    first = build(ROWS, use_cache=True, max_bad_rows=0.5)
    (file,) = (tmp_path / "cache" / "torchft" / "tokens").iterdir()
    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    damaged = {"flip": flipped, "cut": whole[:-1], "empty": b"", "other": b"{}" * 50}
    damaged["flip in the report"] = whole.replace(rb"\"read\": 3", rb"\"read\": 7")
    assert damaged[damage] != whole
    file.write_bytes(damaged[damage])
    again = build(ROWS, use_cache=True, max_bad_rows=0.5)
    assert same(first, again) and not again.cache_note
    said = capsys.readouterr().out
    assert said.startswith(f"token cache: {file} cannot be used (") and said.count("\n") == 1
    assert build(ROWS, use_cache=True, max_bad_rows=0.5).cache_note


def test_a_file_under_another_key_is_not_believed(build, tmp_path, capsys):
    build(ROWS, use_cache=True, max_bad_rows=0.5)
    (file,) = (tmp_path / "cache" / "torchft" / "tokens").iterdir()
    stolen = file.read_bytes()
    file.unlink()
    other = [row("other", "rows")]
    build(other, use_cache=True)
    (file,) = (tmp_path / "cache" / "torchft" / "tokens").iterdir()
    file.write_bytes(stolen)
    assert len(build(other, use_cache=True)) == 1
    assert "cannot be used" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_means_no_cache_and_one_line(build, tmp_path, capsys):
    (tmp_path / "cache").write_text(
        "a file where the folder should be"
    )  # root may write anywhere, so no mode bits here
    assert len(build([row("q", "a")], use_cache=True)) == 1
    said = capsys.readouterr().out
    assert said.startswith("token cache: ") and "cannot be written" in said and said.count("\n") == 1


def test_nothing_half_written_stays_behind(build, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    build([row("q", "a")], use_cache=True)
    assert list((tmp_path / "cache" / "torchft" / "tokens").iterdir()) == []
    assert "No space left on device" in capsys.readouterr().out


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_file("k") == tmp_path / "torchft" / "tokens" / "k.safetensors"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache.cache_file("k") == tmp_path / "home" / ".cache" / "torchft" / "tokens" / "k.safetensors"
