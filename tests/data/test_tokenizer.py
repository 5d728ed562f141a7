"""Control tokens with flags, models that would forge them, configuration files, new tokens, errors."""

import json
import random
import re
import shutil

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers_for_tests import CONTROL, check_offsets, for_template, metaspace, save, trained_bpe

from torchft.data.backends import PieceBackend, find_controls
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError


def written(tokenizer, text: str, foreign: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    return find_controls(text, foreign, tokenizer.backend._pattern, tokenizer.special_tokens)


# ---- control tokens with flags, and models that would forge them -----------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lstrip": True},
        {"rstrip": True},
        {"lstrip": True, "rstrip": True},
        {"single_word": True},
        {"normalized": True},
    ],
)
@pytest.mark.parametrize("scheme", ["bytes", "first", "always", "prepend", "lowercase"])
def test_flags_and_prefix_schemes_are_transformers(flags, scheme, tmp_path):
    """By the straight way and around (as for hostile rows), with blanks wherever a flag might swallow them."""
    from transformers import PreTrainedTokenizerFast

    if scheme in ("bytes", "lowercase"):
        base = tokenizers.Tokenizer.from_str(trained_bpe())
        base.normalizer = normalizers.Lowercase() if scheme == "lowercase" else None
    else:
        base = tokenizers.Tokenizer.from_file(str(metaspace(tmp_path, scheme) / "tokenizer.json"))
    base.add_special_tokens(
        [AddedToken("<|x|>", **{"normalized": False} | flags), AddedToken("<|y|>", normalized=False)]
    )
    path = save(base, tmp_path / "made", unk_token="<unk>" if base.token_to_id("<unk>") is not None else None)
    ours, reference = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    rng = random.Random(3)
    for _ in range(150):
        parts = [
            rng.choice(["<|x|>", "<|y|>", "the", "a", " ", "  ", "\n", "b", "_"]) for _ in range(rng.randint(1, 9))
        ]
        text = "".join(parts)
        want = reference.encode(text, add_special_tokens=False)
        ids, offsets, controls = ours.encode_rendered(text, [])
        assert ids == want
        assert [ids[i] for i in controls] == [i for i in want if i in ours.control_ids]
        # Around, a token that the template wrote is one always: in a word (single_word), or where Prepend spells it
        # otherwise.
        if not flags.get("single_word") and (scheme, flags) != ("prepend", {"normalized": True}):
            around, around_offsets = ours.backend.encode_around(text, written(ours, text, []))
            assert (around, around_offsets) == (ids, offsets), parts


def test_blanks_that_a_control_token_swallows_may_be_the_rows(tmp_path):
    tokenizer = load_tokenizer(for_template("phi3_5", tmp_path))
    text = "<|user|>\n  Hi<|end|>\n"
    foreign = [(9, 13)]  # "  Hi"
    ids, offsets, controls = tokenizer.encode_rendered(text, foreign)
    assert offsets[0] == (0, 11) and controls == [0, len(ids) - 1]
    hostile = "<|user|>\n  <|end|><|end|>\n"
    ids, offsets, controls = tokenizer.encode_rendered(hostile, [(9, 18)])
    assert [offsets[i] for i in controls] == [(0, 11), (18, 26)]
    assert tokenizer.decode(ids[1:-1]) == "<|end|>"


def test_a_control_token_half_of_the_row_is_none(tmp_path):
    tokenizer = load_tokenizer(for_template("qwen2_5", tmp_path))
    text = "<|im_start|>user\n<|im_end|><|im_end|>\n"
    for start, end in ((17, 22), (22, 27), (18, 19), (17, 27)):  # any part of the first <|im_end|>
        ids, _, controls = tokenizer.encode_rendered(text, [(start, end)])
        assert [ids[i] for i in controls] == [
            tokenizer.special_tokens["<|im_start|>"],
            tokenizer.special_tokens["<|im_end|>"],
        ]
        assert tokenizer.decode(ids, skip_special=False) == text


def test_a_vocabulary_that_holds_control_tokens_as_words_forges_none(tmp_path):
    """Unigram and word-level models give a control token's id for its plain spelling, where nobody cuts it apart."""
    unigram = models.Unigram(
        [("<unk>", 0.0), ("</s>", 0.0), *[(c, -5.0) for c in "abc</>s ▁"]], unk_id=0, byte_fallback=False
    )
    unigram = tokenizers.Tokenizer(unigram)
    unigram.add_special_tokens([AddedToken("</s>", normalized=False)])
    path = save(unigram, tmp_path / "unigram", eos_token="</s>", unk_token="<unk>")
    tokenizer = load_tokenizer(path)
    ids, offsets = tokenizer.encode("ab</s>c</s>")
    assert tokenizer.eos_id not in ids
    check_offsets("ab</s>c</s>", offsets)
    ids, _, controls = tokenizer.encode_rendered("ab</s></s>", [(0, 6)])
    assert controls == [len(ids) - 1] and ids.count(tokenizer.eos_id) == 1

    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "#": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken("#", normalized=False)])
    tokenizer = load_tokenizer(save(words, tmp_path / "words", eos_token="#", unk_token="[UNK]"))
    with pytest.raises(UserError, match="control token of the plain text '#'"):
        tokenizer.encode("a # a")
    assert tokenizer.encode("a what")[0] == [0, 2]  # the model's own unk is no control token


@pytest.mark.parametrize("scheme", ["first", "always", "prepend"])
def test_unk_spelled_out_is_plain_and_unk_of_the_model_is_left(scheme, tmp_path):
    tokenizer = load_tokenizer(metaspace(tmp_path, scheme))
    unk = tokenizer.special_tokens["<unk>"]
    for text in ("the <unk> a", "<unk>"):
        assert unk not in tokenizer.encode(text)[0]
        assert unk not in tokenizer.encode_rendered(text, [(0, len(text))])[0]
    before = tokenizer.encode_rendered("<s>the", [])[0]
    assert tokenizer.encode("the", first=False)[0] == before[1:]  # as behind a control token
    tokenizer = load_tokenizer(tokenizer.path)
    assert unk in tokenizer.encode_rendered("<s>the \u4dff a</s>", [(3, 9)])[0] and tokenizer.backend._twin is None
    ids, _, controls = tokenizer.encode_rendered("<s>the \u4dff <unk></s>", [(3, 13)])
    assert ids.count(unk) == 1 and [ids[i] for i in controls] == [tokenizer.bos_id, tokenizer.eos_id]


def test_pieces_that_are_words_and_control_tokens_at_once_are_cut():
    """As in sentencepiece models that have a chat's control tokens among their user-defined pieces."""

    class Model:
        unk_id = 0

        def encode(self, text, first):
            found = [(m.start(), m.end()) for m in re.finditer("<e>|.", text)]
            return [7 if end - start == 3 else 100 + ord(text[start]) for start, end in found], found

    backend = PieceBackend(Model(), {"<e>": 7, "<e>>": 8, "<unk>": 0})
    ids, offsets = backend.encode("a<e><e>b", first=True)
    assert 7 not in ids and offsets == [(i, i + 1) for i in range(8)]
    ids, offsets = backend.encode_rendered("a<e><e>>b<e>", [(0, 4)])
    assert (ids[-3:], offsets[-3:]) == ([8, 100 + ord("b"), 7], [(4, 8), (8, 9), (9, 12)])  # the longest that fits


def test_a_named_token_is_a_control_token_whatever_its_flags(tmp_path):
    base = tokenizers.Tokenizer.from_str(trained_bpe())
    base.add_tokens(
        [AddedToken("<end>", special=False, normalized=False), AddedToken("<tag>", special=False, normalized=False)]
    )
    path = save(base, tmp_path / "t", eos_token="<end>", bos_token="<new>", pad_token={"content": "<pad>"})
    tokenizer = load_tokenizer(path)
    assert set(tokenizer.special_tokens) == {"<end>", "<new>", "<pad>"}
    ids, _ = tokenizer.encode("a<end><tag><new><pad>")
    assert tokenizer.backend.tokenizer.token_to_id("<tag>") in ids and not tokenizer.control_ids & set(ids)


def test_the_config_beside_tokenizer_json_is_read_as_transformers_reads_it(tmp_path):
    from transformers import PreTrainedTokenizerFast

    base = tokenizers.Tokenizer.from_str(trained_bpe())
    base.add_special_tokens([AddedToken("<|a|>", normalized=False), AddedToken("<|b|>", normalized=False)])
    first = base.token_to_id("<|a|>")
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    listed = {str(first): {"content": "<|a|>", **flags}, str(first + 2): {"content": "<|c|>", **flags}}
    path = save(
        base, tmp_path / "t", bos_token="<|a|>", added_tokens_decoder=listed, additional_special_tokens=["<|d|>"]
    )
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|b|>"}}), encoding="utf-8")
    ours, reference = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    text = "<|a|>  x<|b|> y<|c|> \n<|d|>z"
    assert ours.encode_rendered(text, [])[0] == reference.encode(text, add_special_tokens=False)
    assert (ours.bos_token, ours.eos_token) == ("<|a|>", "<|b|>")
    assert set(ours.special_tokens) == {"<|a|>", "<|b|>", "<|c|>", "<|d|>"}
    assert ours.vocab_size == first + 4


def test_where_chat_templates_are_found(tmp_path):
    base = tokenizers.Tokenizer.from_str(trained_bpe())
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    assert load_tokenizer(save(base, tmp_path / "none")).chat_template is None
    assert load_tokenizer(save(base, tmp_path / "one", chat_template="config")).chat_template == "config"
    tokenizer = load_tokenizer(save(base, tmp_path / "two", chat_template=several))
    assert (tokenizer.chat_template, tokenizer.tools_template) == ("plain", "tools")
    path = save(base, tmp_path / "file", chat_template="config")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}), encoding="utf-8")
    assert load_tokenizer(path).chat_template == "json"
    (path / "chat_template.jinja").write_text("file", encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert tokenizer.chat_template == "file"
    assert [file.name for file in tokenizer.files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
    ]


# ---- new tokens ------------------------------------------------------------------------------------------------------


def test_added_tokens_are_saved_and_transformers_reads_them(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(for_template("llama3", tmp_path))
    before = tokenizer.vocab_size
    ids = tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<answer>"], template="{{ '<|im_start|>' }} <|im_end|>")
    assert ids == [before, before + 1, before + 2] and tokenizer.vocab_size == before + 3
    plain, _ = tokenizer.encode("<|im_start|><answer>x")
    assert ids[2] in plain and ids[0] not in plain  # a word of the text; a control token
    text = "<|im_start|>user\n<answer>x<|im_end|>\n"
    rendered, _, controls = tokenizer.encode_rendered(text, [(17, 26)])
    assert [rendered[i] for i in controls] == ids[:2]
    tokenizer.save(tmp_path / "saved")
    assert (
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").encode(text, add_special_tokens=False) == rendered
    )
    again = load_tokenizer(tmp_path / "saved")
    assert again.special_tokens == tokenizer.special_tokens and again.encode_rendered(text, [(17, 26)])[0] == rendered
    with pytest.raises(UserError, match=r"data\.new_tokens: '<answer>' is empty, listed twice, or in the vocabulary"):
        tokenizer.add_tokens(["<answer>"])
    with pytest.raises(UserError, match="listed twice"):
        tokenizer.add_tokens(["<n>", "<n>"])


def test_saving_copies_the_files(tmp_path, shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/llama2")
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == tokenizer.files[0].read_bytes()
    with pytest.raises(UserError, match="no tokenizer.json to add tokens to"):
        tokenizer.add_tokens(["<x>"])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_file_and_the_fix(tmp_path, shared_data):
    with pytest.raises(UserError, match=r"no tokenizer\.json and no tokenizer\.model; a model directory has"):
        load_tokenizer(tmp_path)
    path = tmp_path / "t"
    path.mkdir()
    (path / "tokenizer.json").write_text("{]", encoding="utf-8")
    with pytest.raises(UserError, match=r"t/tokenizer\.json: not a readable tokenizer\.json"):
        load_tokenizer(path)
    save(tokenizers.Tokenizer.from_str(trained_bpe()), path)
    for content, said in (
        ("{", "not readable as JSON"),
        ("[]", "holds a list"),
        ('{"bos_token": {}}', ""),
        ('{"eos_token": 3}', "shaped as"),
    ):
        (path / "tokenizer_config.json").write_text(content, encoding="utf-8")
        if said:
            with pytest.raises(UserError, match=rf"tokenizer_config\.json: .*{said}"):
                load_tokenizer(path)
    model = tmp_path / "m"
    model.mkdir()
    (model / "tokenizer.model").write_bytes(b"\x00\x01garbage")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(model)
    (model / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="holds 2 ranks, but of this kind only Llama 3's"):
        load_tokenizer(model)
    (model / "tokenizer.model").write_bytes(b"IQ== 0\nIg== one\n")
    with pytest.raises(UserError, match=r"tokenizer\.model:2: not a line"):
        load_tokenizer(model)
    shutil.copy(shared_data / "tokenizers/llama2/tokenizer.model", model)
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"'<\|im_end\|>' is not in tokenizer\.model"):
        load_tokenizer(model)


def test_every_template_has_its_tokens(tmp_path):
    for name, tokens in CONTROL.items():
        assert set(load_tokenizer(for_template(name, tmp_path)).special_tokens) == set(tokens)
