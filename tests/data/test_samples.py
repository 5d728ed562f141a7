"""The limit on a row's length, around its edges: what is kept, what is trained of it, what is counted."""

import pytest
from byte_tokenizer import row, texts

from torchft.data import samples
from torchft.errors import UserError


@pytest.mark.parametrize("over", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("policy", ["drop", "right"])
def test_truncation_around_the_limit(build, byte_model, policy, over):
    """PITFALLS T7. The row has 20 tokens: <s> 9 x q <a> 8 x a <e>."""
    options = {"max_seq_len": 20 - over, "truncation": policy, "max_bad_rows": 1.0}
    dataset = build([row("q" * 9, "a" * 8), row("q", "a")], **options)
    found = texts(dataset, byte_model[0])
    report = dataset.reports[0]
    assert found[-1] == ("<s>q<a>a<e>", "a<e>")
    if over <= 0:
        assert found[0] == ("<s>qqqqqqqqq<a>aaaaaaaa<e>", "aaaaaaaa<e>") and not report.reasons and not report.notes
    elif policy == "drop":
        assert len(found) == 1
        assert report.reasons == {f"longer than data.max_seq_len={20 - over}": 1}
        assert report.places[f"longer than data.max_seq_len={20 - over}"][0].endswith("t.jsonl:1: 20 tokens")
    else:  # what is cut is not taught to end there
        assert found[0] == ("<s>qqqqqqqqq<a>" + "a" * (9 - over), "a" * (9 - over))
        assert report.notes == {"cut at data.max_seq_len": 1}
    assert dataset.lengths.max() <= 20 - over


@pytest.mark.parametrize(("limit", "kept"), [(10, False), (11, False), (12, True), (13, True)])
def test_a_cut_that_leaves_no_answer_drops_the_row(build, byte_model, limit, kept):
    """<s> 9 x q <a> is 11 tokens: a limit of 11 leaves no answer, 12 one token of it."""
    dataset = build([row("q" * 9, "a" * 8), row("q", "a")], max_seq_len=limit, truncation="right", max_bad_rows=1.0)
    assert (len(dataset) == 2) == kept
    if kept:
        assert texts(dataset, byte_model[0])[0][1] == "a" * (limit - 11)
    else:
        assert dataset.reports[0].reasons == {f"no answer left within data.max_seq_len={limit}": 1}


def test_a_row_far_beyond_the_limit_is_dropped_without_tokenising_it(build, monkeypatch):
    calls = []
    original = samples.tokenize_chat
    monkeypatch.setattr(samples, "tokenize_chat", lambda *args: calls.append(1) or original(*args))
    dataset = build([row("q", "a" * 10_000_000), row("q", "a")], max_bad_rows=1.0)
    assert len(calls) == 1 and dataset.reports[0].reasons == {"longer than data.max_seq_len=64": 1}


@pytest.mark.parametrize("size", [1, 5, 6, 7, 8, 12, 13, 14, 15, 40])
def test_a_text_is_cut_into_pieces_that_train_every_token_once(build, byte_model, size):
    text = "".join(chr(97 + i % 26) for i in range(size))
    dataset = build([{"text": text}], max_seq_len=8, truncation="drop")
    found = texts(dataset, byte_model[0])
    assert "".join(targets for _, targets in found) == text + "<e>"
    assert found[0][0].startswith("<b>" + text[:5])
    assert dataset.lengths.max() <= 8 and dataset.lengths.min() >= 2
    assert len(found) == -(-(size + 1) // 7)  # of size + 2 tokens, all but the first, 7 per piece
    assert dataset.row.tolist() == [0] * len(found) and dataset.reports[0].used == 1


def test_a_text_file_is_a_document_and_needs_no_template(build, byte_model):
    assert texts(build("ab\ncd\n", name="t.txt", template=None), byte_model[0]) == [("<b>ab\ncd\n<e>", "ab\ncd\n<e>")]
    with pytest.raises(
        UserError, match=r"data\.train\[0\]: .* holds conversations .* set data\.chat_template to chatml"
    ):
        build([row("q", "a")], template=None)
