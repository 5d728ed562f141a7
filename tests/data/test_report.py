"""The account that `tune data` prints, and examples with what is trained marked."""

import io
import json
import re

import numpy as np
import pytest
from byte_tokenizer import row

from torchft.config import DataConfig, RunConfig, SourceConfig
from torchft.data.dataset import build_dataset
from torchft.data.loader import Loader
from torchft.data.report import render_example, report, summary, wants_color


def test_the_report_accounts_for_every_row_and_token(build, tmp_path):
    rows = [row("q", "a" * n, extra=1) for n in (1, 2, 3, 4)] + [row("q", None)] * 7 + [row("q", "x" * 40)]
    dataset = build(
        rows, [row("q", "a")], sources=({}, {"weight": 2.0}), max_seq_len=16, max_bad_rows=0.7, truncation="right"
    )
    cfg = DataConfig(max_seq_len=16)
    loader = Loader(dataset, cfg, RunConfig(global_batch_size=2, micro_batch_size=2))
    text = report(dataset, loader).replace(f"{tmp_path}/", "")
    assert (
        text
        == """\
data.train[0]  0t.jsonl
  format      instruct (question, answer)
  rows        12 read: 5 used, 7 dropped
  dropped     7 null "answer"
                0t.jsonl:5
                0t.jsonl:6
                0t.jsonl:7
                0t.jsonl:8
                0t.jsonl:9
                and 2 more
  note        1 x cut at data.max_seq_len, first in 0t.jsonl:12
  not read    columns extra
  tokens      42 in 5 examples, 27 trained (64.3%)
  length      5 to 16 tokens, median 7, 90% up to 16, 99% up to 16
data.train[1]  1t.jsonl
  format      instruct (question, answer)
  rows        1 read: 1 used, 0 dropped
  weight      2: a row is used 2 times per epoch on average
  tokens      5 in 1 example, 2 trained (40.0%)
  length      5 to 5 tokens, median 5, 90% up to 5, 99% up to 5
all together
  tokens      47 in 6 examples, 29 trained (61.7%)
  length      5 to 16 tokens, median 6, 90% up to 16, 99% up to 16
4 rows of 16 tokens, 81.2% filled, 1.8 examples each, in 1 epoch
2 optimizer steps, 2 per epoch, 3.5 examples per step
2 rows per step = 1 process x 1 micro-batch x 2 rows"""
    )


def test_a_part_without_examples_of_a_source_says_so_and_the_cache_is_named(build):
    dataset = build([row("q", "a")], [row("q", "b")], use_cache=True)
    again = build([row("q", "a")], [row("q", "b")], use_cache=True)
    assert "tokens read" not in report(dataset)
    assert re.search(r"\ntokens read from the cache, .*/torchft/tokens/[0-9a-f]{8}\*$", report(again))
    assert "none: no example of it is in this part" in report(dataset.select(np.array([1])))


TURNS = [("user", "q\n"), ("assistant", "one é"), ("user", "\x1b[2Jq"), ("assistant", "two")]


def test_an_example_shows_control_tokens_by_name_and_marks_what_is_trained(build, byte_model, tmp_path):
    dataset = build([{"messages": [{"role": role, "content": text} for role, text in TURNS]}])
    plain = render_example(dataset, 0, byte_model[0], color=False).replace(f"{tmp_path}/", "")
    # an escape sequence of the data is spelled out: the terminal must not obey it
    assert plain == "--- 0t.jsonl:1: 22 tokens, 11 trained ---\n<s>q\n<a>{+one é<e>+}<s>\\x1b[2Jq<a>{+two<e>+}"
    colored = render_example(dataset, 0, byte_model[0], color=True).split("\n", 1)[1]
    green, bold, dim, off = "\x1b[32m", "\x1b[1m", "\x1b[2m", "\x1b[0m"
    assert colored == (
        f"{dim}<s>{off}q\n{dim}<a>{off}{green}one é{off}{green}{bold}<e>{off}"
        f"{dim}<s>{off}\\x1b[2Jq{dim}<a>{off}{green}two{off}{green}{bold}<e>{off}"
    )


def test_colour_is_for_terminals_without_no_color(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(Terminal()) and not wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # the convention: empty means unset
    assert wants_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())


def test_a_run_is_told_of_rows_dropped_cut_and_noted_with_the_first_place(build, tmp_path):
    rows = [row("q", "a"), row("q", None), row("q", "x" * 40), row("q", "x" * 41), row(5, "a"), row("q", None)]
    cfg = DataConfig(max_seq_len=16)
    options = {"max_seq_len": 16, "max_bad_rows": 0.7, "truncation": "right"}
    train = build(rows, [row("q", "a")], **options)
    loader = Loader(train, cfg, RunConfig(global_batch_size=2, micro_batch_size=2))
    told = [
        'data.train[0]: 3 of 6 rows dropped (data.max_bad_rows); first 0t.jsonl:2: null "answer"',
        "data.train[0]: 2 x cut at data.max_seq_len, first in 0t.jsonl:3",
    ]
    rest = summary(loader, None).replace(f"{tmp_path}/", "").removeprefix(loader.summary())
    assert rest.splitlines()[1:] == told
    held_out = train.select(np.array([0]))  # of the same rows, which are told of once
    assert summary(loader, held_out) == summary(loader, None)
    valid = build(rows, key="data.valid", **options)
    told += [line.replace("train", "valid") for line in told]
    assert summary(loader, valid).replace(f"{tmp_path}/", "").splitlines()[3:] == told
    clean = Loader(build([row("q", "a")]), cfg, RunConfig())
    assert summary(clean, None) == clean.summary()


def verdicts(tmp_path, byte_model, labels):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(train=[SourceConfig(path=str(tmp_path / "k.jsonl"))], max_seq_len=64)
    return build_dataset(cfg.train, cfg, *byte_model, kind="verdicts", use_cache=False)


def test_verdicts_are_shown_beside_examples_and_counted(byte_model, tmp_path):
    dataset = verdicts(tmp_path, byte_model, [True, False, False])
    shown = [render_example(dataset, index, byte_model[0], color=False).splitlines()[0] for index in range(3)]
    assert [line.rsplit("; ", 1)[1] for line in shown] == ["a good answer ---", "a bad answer ---", "a bad answer ---"]
    text = report(dataset, Loader(dataset, DataConfig(), RunConfig()))
    assert "  verdicts    1 good, 2 bad\n" in text and "WARNING" not in text


@pytest.mark.parametrize(("label", "word"), [(True, "good"), (False, "bad")])
def test_verdicts_of_one_kind_are_told(label, word, byte_model, tmp_path):
    dataset = verdicts(tmp_path, byte_model, [label] * 3)
    said = f"WARNING: data.train: all 3 answers are {word} ones, and KTO learns from good and bad ones: look at the labels"
    loader = Loader(dataset, DataConfig(), RunConfig())
    assert said in report(dataset, loader).splitlines() and said in summary(loader, None).splitlines()
