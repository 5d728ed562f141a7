"""100,000 random unicode strings for each tokenizer: the ids of transformers, sentencepiece and tiktoken, decoded back. PITFALLS 2c.

The trained one is always there; the released ones where ../shared/data has them. `-k trained` for the first alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from scale import random_of, scaled
from test_vocabularies import check_llama3, check_sentencepiece, random_text
from tokenizers_for_tests import check_offsets, for_template, llama_reference

from torchft.data.tokenizer import Tokenizer, load_tokenizer

NUMBER = scaled(200, 100_000)


def strings(*place: object) -> Iterator[str]:
    random: Random = random_of(*place)
    return (random_text(random) for _ in range(NUMBER))


def test_trained_bpe(tmp_path: Path, tally: Callable) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = for_template("qwen3", tmp_path)
    ours, reference = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in strings("trained"):
        ids, offsets = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == text
        check_offsets(text, offsets)
        assert not ours.control_ids & set(ids)
    tally(NUMBER, "strings", "a trained BPE")


@pytest.fixture
def load(shared_data: Path) -> Callable[[str], Tokenizer]:
    return lambda name: load_tokenizer(shared_data / "tokenizers" / name)


def test_llama3_by_tiktoken_and_json(load: Callable, shared_data: Path, tally: Callable) -> None:
    from transformers import PreTrainedTokenizerFast

    ours, by_tiktoken = load("llama3_hf"), load("llama3")
    reference = PreTrainedTokenizerFast.from_pretrained(shared_data / "tokenizers/llama3_hf")
    for text in strings("llama3"):
        check_llama3(text, ours, by_tiktoken, reference)
    tally(NUMBER, "strings", "Llama 3")


@pytest.mark.parametrize("name", ["llama2", "mistral_v3"])
def test_sentencepiece(name: str, load: Callable, tally: Callable) -> None:
    ours = load(name)
    reference = llama_reference(ours)
    for text in strings(name):
        check_sentencepiece(text, ours, reference)
    tally(NUMBER, "strings", name)
