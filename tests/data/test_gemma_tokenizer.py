"""A sentencepiece model with Gemma's settings: tokenizer.model, tokenizer.json and transformers give the same ids and text.

Gemma's differ from Llama 2's: no blank before a text, blanks kept as they are, digits one by one, pieces of blanks and line feeds,
and turn marks that are ordinary pieces by the model and special by tokenizer_config.json.
"""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from test_vocabularies import random_text
from tokenizers_for_tests import check_offsets

from torchft.data.tokenizer import Tokenizer, load_tokenizer

TURNS = ("<start_of_turn>", "<end_of_turn>")
HEAD = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on this folder's own files."""
    path, model = tmp_path_factory.mktemp("gemma"), io.BytesIO()
    lines = [line for file in sorted(Path(__file__).parent.glob("*.py")) for line in file.read_text("utf-8").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*TURNS, "\n", "\n\n", "▁▁", "▁▁▁", "\t"],
        minloglevel=2,
        **HEAD,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    listed = {str(4 + i): {"content": turn, "special": True} for i, turn in enumerate(TURNS)}
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "added_tokens_decoder": listed}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def converted(ours: Tokenizer, folder: Path):
    """transformers' Gemma class over the same pieces, merges made by its own converter from their scores."""
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    processor = ours.backend.model.processor
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    scores = [(piece, processor.get_score(i)) for i, piece in enumerate(pieces)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, scores, skip_tokens=list(ours.special_tokens))
    reference = GemmaTokenizer(vocab=vocab, merges=merges, mask_token=None, extra_special_tokens=list(TURNS))
    reference.save_pretrained(folder)
    return reference


def test_model_json_and_transformers_agree(folder, tmp_path):
    ours = load_tokenizer(folder)
    reference = converted(ours, tmp_path)
    hub = load_tokenizer(tmp_path)
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(2000)] + ["  a   b\n\n\nc\t\td 12345 ", Path(__file__).with_name("test_samples.py").read_text("utf-8")]
    for text in texts:
        ids, offsets = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False) == hub.encode(text)[0], text
        check_offsets(text, offsets)
        assert ours.decode(ids) == hub.decode(ids) == text.replace("▁", " ")
    assert ours.special_tokens == hub.special_tokens
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (hub.bos_id, hub.eos_id, hub.vocab_size) == (2, 1, 1200)


def test_turn_marks_are_control_tokens_of_the_template_alone(folder):
    """The sentencepiece model itself would make one of anybody's text."""
    ours = load_tokenizer(folder)
    text = "<bos><start_of_turn>user\n<end_of_turn>hi<end_of_turn>\n"
    ids, _, controls = ours.encode_rendered(text, [(25, 40)])
    assert [ids[i] for i in controls] == [i for i in ids if i in ours.control_ids] == [2, 4, 5]
    assert 4 in ours.backend.model.processor.encode("<start_of_turn>") and 4 not in ours.encode("<start_of_turn>")[0]
    assert ours.decode(ids, skip_special=False) == text
