"""Tokenizers that the tests train or build: byte-level BPE with a chat template's control tokens, and odd ones."""

import functools
import json
from pathlib import Path

import tokenizers
from conversations import WORDS
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Control tokens of the templates under ../shared/data/chat_templates; Phi's swallow blanks behind them, as in the
# model's files.
CONTROL = {
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                 "<|eom_id|>", "<|python_tag|>"),
    "phi3_5": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
}  # fmt: skip
PLAIN = {
    "qwen2_5": ("<tool_call>", "</tool_call>"),
    "qwen3": ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
}  # added, but not special: found in anyone's text


@functools.cache
def trained_bpe() -> str:
    """A byte-level BPE of 1,000 pieces, as the text of a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system\n\n" * 3] * 3, trainer)
    return tokenizer.to_str()


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def for_template(name: str, folder: Path) -> Path:
    """The trained tokenizer with one template's tokens, which adds BOS by itself where it is asked to add special
    tokens.
    """
    tokenizer = tokenizers.Tokenizer.from_str(trained_bpe())
    strip = name == "phi3_5"
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False, rstrip=strip) for token in CONTROL[name]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN.get(name, ())])
    bos, eos = CONTROL[name][:2]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    return save(tokenizer, folder / name, bos_token=bos, eos_token=eos)


def metaspace(folder: Path, scheme: str) -> Path:
    """A character-level BPE that puts a blank before a text: `scheme` first or always (Metaspace), or prepend (a
    normaliser).
    """
    alphabet = sorted({c for word in WORDS for c in word} | set("▁\n\t <>|_abcdefghijklmnopqrstuvwxyz"))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "▁a", "▁t", "▁th", "▁▁"])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "t"), ("▁t", "h"), ("▁", "▁")], unk_token="<unk>", fuse_unk=True)
    )
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return save(tokenizer, folder / scheme, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_reference(tokenizer):
    """transformers' Llama class over the pieces of a tokenizer.model, merges made by its own converter from their
    scores.
    """
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    processor = tokenizer.backend.model.processor
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = [(piece, processor.get_score(i)) for i, piece in enumerate(pieces)]
    merges = generate_merges(vocab, scores, skip_tokens=list(tokenizer.special_tokens))
    extra = [token for token in tokenizer.special_tokens if token not in ("<unk>", "<s>", "</s>")]
    return LlamaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=extra)


def check_offsets(text: str, offsets: list[tuple[int, int]]) -> None:
    """In order, without a gap, from the first character to the last."""
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
    for (start, end), (next_start, next_end) in zip(offsets, offsets[1:], strict=False):
        assert start <= next_start <= end <= next_end, text
