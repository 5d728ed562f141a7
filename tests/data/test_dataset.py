"""Files to flat tokens: nothing lost, nothing counted twice, nothing stale.

The tokenizer here has one token per byte (byte_tokenizer.py): a row is `<s>` question `<a>` answer `<e>`.
"""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from byte_tokenizer import TEMPLATE, row, texts
from chat_setups import ASK, say

from torchft.config import DataConfig, SourceConfig
from torchft.data.account import SourceReport, refuse_too_many
from torchft.data.chat_template import load_template
from torchft.data.dataset import build_dataset, hold_out
from torchft.data.layout import Layout
from torchft.data.report import report
from torchft.data.rows import BadRow
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError


def test_answers_and_their_end_tokens_are_the_targets(build, byte_model):
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "é")]
    messages = [{"role": role, "content": content} for role, content in turns]
    dataset = build([{"messages": messages}, {"messages": messages[:2]}])
    assert texts(dataset, byte_model[0]) == [("<s>q1<a>a1<e><s>q2<a>é<e>", "a1<e>é<e>"), ("<s>q1<a>a1<e>", "a1<e>")]
    assert dataset.lengths.tolist() == [14, 7] and dataset.starts.tolist() == [0, 14]
    assert dataset.num_supervised.tolist() == [6, 3]
    assert (dataset.ids.dtype, dataset.supervised.dtype) == (np.int32, np.bool_)
    last = build([{"messages": messages}], train_on="last")
    assert texts(last, byte_model[0])[0][1] == "é<e>"


def test_each_sample_knows_its_source_row_and_example(build):
    dataset = build([row("q0", "a0"), {}, row("q2", "a2")], [row("q3", "a3")], max_bad_rows=0.5, key="data.valid")
    assert dataset.source.tolist() == [0, 0, 1] and dataset.row.tolist() == [0, 2, 0]
    assert [dataset.example(i).messages[0]["content"] for i in (2, 1, 0)] == ["q3", "q2", "q0"]
    assert dataset.example(1).where.endswith("0t.jsonl:3")
    assert [r.read for r in dataset.reports] == [3, 1] and [r.used for r in dataset.reports] == [2, 1]


# --- bad rows -------------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_are_refused_with_places_and_counts(build):
    rows = [row("q", "a")] * 3 + [row("q", None)] * 7 + [row("q", 5), "not a row"]
    with pytest.raises(UserError) as caught:
        build(rows, max_bad_rows=0.74)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "data.train[0]: 9 of 12 rows cannot be used (75.0%, data.max_bad_rows allows 74%): mend the rows, or raise "
        "data.max_bad_rows to drop them"
    )
    assert lines[1].startswith("the first is /") and lines[1].endswith("/0t.jsonl:4")
    assert str(caught.value).count("/0t.jsonl") == 1
    assert lines[2:] == ['  7 null "answer": line 4, 5, 6, 7, 8 ...', '  1 "answer" is not text: line 11: int',
                         "  1 row is not a JSON object: line 12: str"]  # fmt: skip
    assert build(rows, max_bad_rows=0.75).reports[0].reasons == Counter(
        {'null "answer"': 7, '"answer" is not text': 1, "row is not a JSON object": 1}
    )


@pytest.mark.parametrize("policy", ["drop", "right"])
def test_rows_beyond_the_limit_are_answered_with_what_to_set_it_to(build, policy):
    """The longest stands there even where it is not one of the first five, which are named."""
    question = "q" * 70 if policy == "right" else "q"  # the prompt alone is beyond the limit
    rows = [row(question, "a" * n) for n in (70, 71, 72, 73, 74, 200, 75)]
    with pytest.raises(UserError) as caught:
        build(rows, truncation=policy)
    lines = str(caught.value).splitlines()
    longest = len(question) + 200 + 3  # <b>, <sep> and <e>
    cut = "cut long rows with data.truncation=right, or " * (policy == "drop")
    assert lines[0].endswith(
        "allows 0%; none is left): raise data.max_seq_len (the longest row that was tokenised has "
        f"{longest} tokens), or {cut}mend the rows"
    )
    sizes = ", ".join(f"{n} ({len(question) + 3 + size} tokens)" for n, size in enumerate((70, 71, 72, 73, 74), 1))
    assert lines[2].endswith(f": line {sizes} ...") and len(lines) == 3


def test_a_row_too_long_to_be_counted_gets_the_advice_without_a_number(build):
    with pytest.raises(UserError, match=r"raise data\.max_seq_len, or cut .*=right, or mend(?s:.*)100,001 characters"):
        build([row("q", "a" * 100_000)])


@pytest.mark.parametrize(
    ("name", "split", "word"), [("org/name:main", "[test]", "row"), ("/a:1: b/t:2.jsonl", "", "line"), ("t.parquet", "", "row")]
)
def test_refused_rows_are_named_by_their_number_whatever_the_name_is(name, split, word):
    report = SourceReport(name, Layout("text", {"text": "text"}), read=3)
    for number in (7, 8, 9):
        report.drop(f"{name}{split}:{number}", BadRow("bad", "in line 1\nof it: x" if number < 9 else ""))
    with pytest.raises(UserError) as caught:
        refuse_too_many(report, DataConfig(), "data.train[0]")
    assert str(caught.value).split("\n", 1)[1] == (
        f"the first is {name}{split}:7\n  3 bad: {word} 7 (in line 1\nof it: x), 8 (in line 1\nof it: x), 9"
    )


@pytest.mark.parametrize("name, content", [("t.jsonl", ""), ("t.jsonl", " \n\n"), ("t.json", "[]"), ("t.csv", "a,b\n")])
def test_an_empty_source_is_called_empty(build, name, content):
    with pytest.raises(UserError, match=rf"data\.train\[0\]: .*0{name} is empty, there is no row in it; name another"):
        build(content, name=name)


def test_a_source_without_a_usable_row_is_refused_whatever_the_threshold(build):
    with pytest.raises(UserError, match="1 of 1 row cannot be used .*; none is left\\): mend the rows\n"):
        build([row("q", "")], max_bad_rows=1.0)
    with pytest.raises(
        UserError, match=r"data\.train\[1\]: none of the 2 rows .* can be read; the first, .*1t\.jsonl:1: broken"
    ):
        build([row("q", "a")], "{\n{\n", max_bad_rows=1.0)
    with pytest.raises(UserError, match=r"data\.valid: no data"):
        build(key="data.valid")


def test_what_the_template_refuses_is_a_bad_row(byte_model, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "tool", "content": "t"}]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusing = TEMPLATE + "{% if messages[-1].role == 'tool' %}{{ raise_exception('ends with a tool') }}{% endif %}"
    cfg = DataConfig(train=[SourceConfig(path=str(tmp_path / "t.jsonl"))], max_bad_rows=0.5)
    template = type(byte_model[1])(refusing, byte_model[1].special)
    report = build_dataset(cfg.train, cfg, byte_model[0], template, use_cache=False).reports[0]
    assert report.reasons == {"the chat template refuses it": 1}
    assert "t.jsonl:2: " in report.places["the chat template refuses it"][0]
    assert "ends with a tool" in report.places["the chat template refuses it"][0]


def test_answers_that_the_template_changes_are_noted_and_a_row_without_targets_is_dropped(byte_model, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"messages": turns * 2}) + "\n" + json.dumps({"messages": [*turns, turns[0]]})
    )
    changing = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")
    cfg = DataConfig(train=[SourceConfig(path=str(tmp_path / "t.jsonl"))], max_bad_rows=0.5)
    template = type(byte_model[1])(changing, byte_model[1].special)
    dataset = build_dataset(cfg.train, cfg, byte_model[0], template, use_cache=False)
    assert texts(dataset, byte_model[0]) == [("<s>Q<a>ABC<e><s>Q<a>abc<e>", "abc<e>")]
    ((note, count),) = dataset.reports[0].notes.items()
    assert "not rendered as it is written" in note and count == 1
    assert dataset.reports[0].reasons == {"nothing to train": 1}
    assert dataset.reports[0].places["nothing to train"][0].endswith(f"t.jsonl:2: {note}")


# --- parts ----------------------------------------------------------------------------------------------------------


def test_fingerprints_follow_tokens_masks_and_weights(build):
    two = [row("q0", "a0"), row("q1", "a1")]

    def fingerprint(rows=two, **options):
        return build(rows, **options).fingerprint

    assert fingerprint() == fingerprint()
    others = [
        fingerprint([row("q0", "a0"), row("q1", "b1")]),
        fingerprint(two[::-1]),
        fingerprint(sources=({"weight": 2.0},)),
        build(two).select(np.array([0])).fingerprint,
    ]
    assert len({fingerprint(), *others}) == 5


def test_hold_out_splits_by_seed_and_loses_nothing(build):
    whole = build([row(f"q{i}", f"a{i}") for i in range(20)])
    train, valid = hold_out(whole, 0.25, seed=3)
    assert (len(train), len(valid)) == (15, 5)
    rows = [set(part.row.tolist()) for part in (train, valid)]
    assert rows[0] | rows[1] == set(range(20)) and not rows[0] & rows[1]
    assert valid.example(0).messages[0]["content"] == f"q{valid.row[0]}"
    assert valid.num_supervised.tolist() == [whole.num_supervised[i] for i in valid.row]
    assert (
        hold_out(whole, 0.25, seed=3)[1].fingerprint
        == valid.fingerprint
        != hold_out(whole, 0.25, seed=4)[1].fingerprint
    )
    for fraction in (0.01, 0.99):
        with pytest.raises(UserError, match=r"data\.valid_fraction: .* one part would be empty"):
            hold_out(whole, fraction, seed=0)


def test_shared_files_with_the_real_tokenizer(shared_data):
    """The numbers of these files, counted once by hand with transformers and written down."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama3_hf")
    template = load_template("", tokenizer)
    found = {}
    for name in ("alpaca_en_demo.json", "glaive_toolcall_en_demo.json"):
        cfg = DataConfig(train=[SourceConfig(path=str(shared_data / "sft" / name))])
        dataset = build_dataset(cfg.train, cfg, tokenizer, template, use_cache=False, quiet=True)
        found[name] = (dataset.reports[0].read, dataset.reports[0].used, len(dataset.ids), int(dataset.lengths.max()))
    assert found == {
        "alpaca_en_demo.json": (999, 999, 197_697, 612),
        "glaive_toolcall_en_demo.json": (300, 299, 164_191, 1911),
    }


def test_gsm8k_is_what_transformers_makes_of_it(shared_data):
    """Targets and lengths of every row, all tokens of each 20th; the file's last line is cut short, and named."""
    from transformers import PreTrainedTokenizerFast

    folder, path = shared_data / "tokenizers" / "llama3_hf", shared_data / "sft" / "gsm8k_train.jsonl"
    reference, tokenizer = PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 7473
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[-1])
    rows = [json.loads(line) for line in lines[:-1]]
    questions = reference([row["question"].strip() for row in rows], add_special_tokens=False)["input_ids"]
    answers = reference([f"{row['answer'].strip()}<|eot_id|>" for row in rows], add_special_tokens=False)["input_ids"]
    chats = [[ASK | {"content": row["question"]}, say(row["answer"])] for row in rows[::20]]
    whole = reference.apply_chat_template(chats)["input_ids"]
    around = len(whole[0]) - len(questions[0]) - len(answers[0])  # tokens of the template: one number for all rows
    lengths = [around + len(question) + len(answer) for question, answer in zip(questions, answers, strict=True)]

    cfg = DataConfig(train=[SourceConfig(path=str(path))])
    dataset = build_dataset(cfg.train, cfg, tokenizer, load_template("", tokenizer), use_cache=False, quiet=True)
    assert dataset.lengths.tolist() == lengths and dataset.row.tolist() == list(range(7472))
    starts = dataset.starts[::20].tolist()
    assert [dataset.ids[start : start + len(ids)].tolist() for start, ids in zip(starts, whole, strict=True)] == whole
    assert dataset.ids[1:][dataset.supervised[:-1]].tolist() == list(itertools.chain.from_iterable(answers))
    assert dataset.num_supervised.tolist() == [len(ids) for ids in answers]
    said, total, trained = report(dataset), sum(lengths), int(dataset.num_supervised.sum())
    assert "  rows        7,473 read: 7,472 used, 1 dropped\n  dropped     1 broken JSON\n" in said
    assert f"{path}:7473: Unterminated string starting at (column 111)\n" in said
    assert f"  tokens      {total:,} in 7,472 examples, {trained:,} trained ({100 * trained / total:.1f}%)\n" in said
