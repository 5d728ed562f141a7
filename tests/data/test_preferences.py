"""Preference rows: every shape that a pair or a verdict comes in, what is trained of it, and what becomes of bad ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchft.config import ASSETS, DataConfig, SourceConfig
from torchft.data.chat_template import load_template
from torchft.data.dataset import Dataset, build_dataset, build_datasets
from torchft.data.loader import make_batch
from torchft.data.report import report
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.fit import check_ids
from torchft.models import model_config, read_config
from torchft.modules.rope import RopeConfig

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "why?"), ("assistant", "yes"), ("assistant", "no no")))
SYSTEM = {"role": "system", "content": "be kind"}
HUMAN, YES, NO = ({"from": role, "value": text} for role, text in (("human", "why?"), ("gpt", "yes"), ("gpt", "no no")))
TOKENIZER = load_tokenizer(ASSETS / "tiny_llama")
TEMPLATE = load_template("", TOKENIZER)


def build(tmp_path: Path, rows: list[Any], kind: str = "pairs", source: dict | None = None, **options: Any) -> Dataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(train=[SourceConfig(path=str(file), **(source or {}))], **({"max_bad_rows": 1.0} | options))
    return build_dataset(cfg.train, cfg, TOKENIZER, TEMPLATE, kind=kind, use_cache=False, quiet=True)


def texts(dataset: Dataset, index: int = 0) -> tuple[list[str], list[str]]:
    """The sequences of a sample, trunk and branch, decoded; and what is trained of each."""
    start, length = int(dataset.starts[index]), int(dataset.lengths[index])
    ids, on = dataset.ids[start : start + length], np.append(False, dataset.supervised[start : start + length - 1])
    trunk, chosen = (0, length) if dataset.parts is None else dataset.parts[index]
    cuts = [slice(trunk, trunk + chosen), slice(trunk + chosen, length)][: 1 if dataset.parts is None else 2]
    whole = [TOKENIZER.decode([*ids[:trunk], *ids[cut]], skip_special=False) for cut in cuts]
    return whole, [TOKENIZER.decode(ids[cut][on[cut]].tolist(), skip_special=False) for cut in cuts]


PROMPT = "<|begin_of_text|><|start|>user\nwhy?<|end|><|start|>assistant\n"
PAIRS = {
    "text": {"prompt": "why?", "chosen": "yes", "rejected": "no no"},
    "messages": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "single turns": {"prompt": [Q], "chosen": A, "rejected": B},
    "sharegpt": {"conversations": [HUMAN], "chosen": YES, "rejected": NO},
    "sharegpt, text": {"conversations": [HUMAN], "chosen": "yes", "rejected": "no no"},
    "whole conversations": {"chosen": [Q, A], "rejected": [Q, B]},
    "prompt said twice": {"prompt": "why?", "chosen": [Q, A], "rejected": [Q, B]},
    "openai": {"messages": [Q], "chosen": A, "rejected": B},
}


@pytest.mark.parametrize("shape", PAIRS)
def test_every_shape_of_a_pair_is_the_same_sample(tmp_path: Path, shape: str) -> None:
    dataset = build(tmp_path, [PAIRS[shape]])
    whole, trained = texts(dataset)
    assert whole == [f"{PROMPT}yes<|end|>", f"{PROMPT}no no<|end|>"]
    assert trained == ["yes<|end|>", "no no<|end|>"]
    example = dataset.example(0)
    assert example.messages == [Q, A] and example.rejected == [Q, B] and example.num_prompt == 1


def test_the_prompt_is_stored_once_but_for_the_token_that_predicts_both(tmp_path: Path) -> None:
    dataset = build(tmp_path, [PAIRS["text"]])
    trunk, chosen = dataset.parts[0]
    ids = dataset.ids
    assert ids[trunk] == ids[trunk + chosen] and not dataset.supervised[:trunk].any()
    assert dataset.supervised[trunk] and dataset.supervised[trunk + chosen] and not dataset.supervised[trunk + chosen - 1]
    batch = make_batch(dataset, [np.array([0, 0])], num_rows=1, max_seq_len=64, packing=True)
    length, p = len(ids), int(trunk)
    answers = [chosen, length - p - chosen]
    one = [0] * p + [1] * answers[0] + [2] * answers[1]
    assert batch.branches[0].tolist() == one * 2 + [0] * (64 - 2 * length)
    places = [*range(p), *range(p, p + answers[0]), *range(p, p + answers[1])]
    assert batch.positions[0, : 2 * length].tolist() == places * 2
    owners = [4] * p + [0] * answers[0] + [1] * answers[1]
    assert batch.sequences[0, : 2 * length].tolist() == owners + [4] * p + [2] * answers[0] + [3] * answers[1]
    assert (batch.sequences[0, 2 * length :] == 4).all() and batch.num_sequences == 4
    assert ((batch.labels >= 0) == (batch.labels != -100)).all() and batch.num_supervised == int((batch.labels >= 0).sum())


def test_turns_before_the_answer_are_not_trained(tmp_path: Path) -> None:
    """Also of a conversation whose answer is more than one turn: train_on says which."""
    long = {"prompt": [Q, B, Q], "chosen": [A, Q, B], "rejected": [B]}
    assert texts(build(tmp_path, [long]))[1] == ["yes<|end|>no no<|end|>", "no no<|end|>"]
    assert texts(build(tmp_path, [long], train_on="last"))[1] == ["no no<|end|>", "no no<|end|>"]
    led = texts(build(tmp_path, [PAIRS["text"] | {"system": "be kind"}]))[0]
    assert all(text.startswith("<|begin_of_text|><|start|>system\nbe kind") for text in led)


BAD = {
    "chosen and rejected are equal": {"prompt": "a", "chosen": "x", "rejected": "x"},
    'blank "rejected"': {"prompt": "a", "chosen": "x", "rejected": " "},
    'null "chosen"': {"prompt": "a", "chosen": None, "rejected": "x"},
    'no "prompt"': {"chosen": "y", "rejected": "x"},
    'blank "prompt"': {"prompt": "", "chosen": "y", "rejected": "x"},
    "the prompts of chosen and rejected differ": {"prompt": "why?", "chosen": [Q, A], "rejected": [SYSTEM, Q, B]},
    "no assistant turn to judge": {"prompt": "why?", "chosen": [], "rejected": "x"},
    "blank content in turn of assistant": {"prompt": [Q], "chosen": [A | {"content": " "}], "rejected": [B]},
    "the prompt ends in an answer": {"prompt": [Q, A], "chosen": "x", "rejected": "y"},
    "no prompt before the answer": {"prompt": [SYSTEM], "chosen": "x", "rejected": "y"},
    '"chosen" is not text': {"prompt": "a", "chosen": 3, "rejected": "x"},
    "longer than data.max_seq_len=64": {"prompt": "a", "chosen": "word " * 90, "rejected": "x"},
}


def test_bad_pairs_are_counted_once_and_named_by_line(tmp_path: Path) -> None:
    dataset = build(tmp_path, [PAIRS["text"], *BAD.values()], max_seq_len=64)
    found = dataset.reports[0]
    empty = {"no assistant turn to judge": 'empty "chosen"'}
    expected = {empty.get(reason, reason): f"rows.jsonl:{line}" for line, reason in enumerate(BAD, start=2)}
    assert {reason: places[0].split("/")[-1].split(": ")[0] for reason, places in found.places.items()} == expected
    assert found.reasons.total() == len(BAD) and found.used == 1
    assert "1 chosen and rejected are equal" in report(dataset)
    with pytest.raises(UserError, match=r"12 of 13 rows cannot be used(?s:.*)/rows.jsonl:2(?s:.*)chosen and rejected are equal: line 2"):
        build(tmp_path, [PAIRS["text"], *BAD.values()], max_seq_len=64, max_bad_rows=0.1)


def test_too_long_a_pair_loses_the_ends_of_its_answers(tmp_path: Path) -> None:
    row = {"prompt": "why?", "chosen": "a b c d e f g h i j k l m n o p q r s t", "rejected": "a b x"}
    whole = build(tmp_path, [row])
    trunk, (full,) = int(whole.parts[0, 0]), whole.lengths
    for limit in range(int(full) - 30, int(full) + 2):
        try:
            cut = build(tmp_path, [row], max_seq_len=limit, truncation="right")
        except UserError as error:
            assert "no answer left" in str(error) or "equal: " in str(error)
            continue
        assert cut.lengths[0] == min(limit, full) or cut.lengths[0] == limit - 1
        sides = [int(cut.parts[0, 1]), int(cut.lengths[0] - trunk - cut.parts[0, 1])]
        assert cut.parts[0, 0] == trunk and texts(whole)[0][0].startswith(texts(cut)[0][0])
        assert sides[0] - sides[1] >= 0 and (limit >= full) == (texts(cut)[1][0].endswith("<|end|>"))
    same = {"prompt": "why?", "chosen": "a b c d e f g", "rejected": "a b c d e f h"}
    with pytest.raises(UserError, match="chosen and rejected are equal: .*within data.max_seq_len"):
        build(tmp_path, [same], max_seq_len=int(build(tmp_path, [same]).lengths[0]) - 6, truncation="right")


VERDICTS = {
    "messages": {"messages": [Q, A], "label": True},
    "sharegpt": {"conversations": [HUMAN, YES], "label": 1},
    "text": {"prompt": "why?", "completion": "yes", "label": "true"},
    "turns": {"prompt": [Q], "completion": [A], "label": True},
}


@pytest.mark.parametrize("shape", VERDICTS)
def test_every_shape_of_a_verdict_is_the_same_sample(tmp_path: Path, shape: str) -> None:
    row = VERDICTS[shape]
    dataset = build(tmp_path, [row, row | {"label": False}, row | {"label": "so so"}, row | {"label": None}], kind="verdicts")
    assert texts(dataset) == ([f"{PROMPT}yes<|end|>"], ["yes<|end|>"])
    assert dataset.desirable.tolist() == [True, False] and dataset.reports[0].reasons == {'"label" is not true or false': 2}
    batch = make_batch(dataset, [np.array([0, 1])], num_rows=1, max_seq_len=64, packing=True)
    length = int(dataset.lengths[0])
    assert batch.sequences[0].tolist() == [0] * length + [1] * length + [2] * (64 - 2 * length)
    assert batch.desirable.tolist() == [True, False] and batch.branches is None


def test_a_kind_is_refused_where_it_does_not_belong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="instruct is not trained on here; known are auto, preference"):
        build(tmp_path, [PAIRS["text"]], source={"format": "instruct"})
    with pytest.raises(UserError, match="not trained on here but in dpo_distributed"):
        build(tmp_path, [PAIRS["text"]], kind="sft")
    renamed = {"question": "why?", "good": "yes", "bad": "no no"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert texts(build(tmp_path, [renamed], source={"columns": columns}))[1] == ["yes<|end|>", "no no<|end|>"]


def test_pairs_come_back_from_the_cache_and_are_held_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(PAIRS["text"] | {"prompt": f"why {i}?"}) + "\n" for i in range(8)))
    cfg = DataConfig(train=[SourceConfig(path=str(file))], valid_fraction=0.25)
    first, again = (build_datasets(cfg, TOKENIZER, TEMPLATE, 0, kind="pairs", quiet=True) for _ in range(2))
    assert "from the cache" in again[0].cache_note
    for one, other in zip(first, again, strict=True):
        assert one.fingerprint == other.fingerprint and np.array_equal(one.parts, other.parts)
    assert [len(part) for part in again] == [6, 2] and again[1].parts.shape == (2, 2)
    with pytest.raises(UserError, match="preference data"):  # the kind is part of the key
        build_datasets(cfg, TOKENIZER, TEMPLATE, 0, quiet=True)


def test_shared_files_are_read(shared_data: Path) -> None:
    for name, kind, used in (("dpo_en_demo", "pairs", 300), ("kto_en_demo", "verdicts", 300)):
        cfg = DataConfig(train=[SourceConfig(path=str(shared_data / f"preference/{name}.json"))], max_seq_len=20_000)
        dataset = build_dataset(cfg.train, cfg, TOKENIZER, TEMPLATE, kind=kind, use_cache=False, quiet=True)
        assert dataset.reports[0].used == used and not dataset.reports[0].reasons


def test_pairs_longer_than_a_rope_that_goes_by_length_are_refused(tmp_path: Path) -> None:
    """Beyond the original context each answer would want its prompt rotated by its own length."""
    dataset = build(tmp_path, [PAIRS["text"]])
    trunk, chosen = dataset.parts[0]
    longest = max(trunk + chosen, dataset.lengths[0] - chosen)
    factors = {"short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4}
    for kind, more in (("longrope", factors), ("dynamic", {"factor": 2.0})):
        for limit, fits in ((longest, True), (longest - 1, False)):
            rope = RopeConfig(8, kind=kind, original_max_positions=int(limit), **more)
            config = replace(model_config(read_config(ASSETS / "tiny_llama")), rope=rope, head_dim=8)
            if fits:
                check_ids(config, TOKENIZER, dataset, None)
                continue
            with pytest.raises(UserError, match=rf"takes {longest:,} tokens. Beyond {limit:,} this model's RoPE \({kind}\)"):
                check_ids(config, TOKENIZER, dataset, None)
