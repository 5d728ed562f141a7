"""The embedded tiny Llama and its instruction set are what their READMEs say, and what make_tiny_llama.py makes.

The accuracy after LoRA training is measured by `make demo`, and recorded in the READMEs.
"""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from torchft.models import build_model, read_config
from torchft.modules.transformer import CausalLM

ROOT = Path(__file__).resolve().parent.parent
MODEL, SKILL = ROOT / "torchft" / "assets" / "tiny_llama", ROOT / "torchft" / "assets" / "tiny_sft"
sys.path.insert(0, str(ROOT / "scripts"))

import make_tiny_llama as maker  # noqa: E402
import tiny_text  # noqa: E402
import tiny_world  # noqa: E402

RECORD = re.compile(r"seller: (\w+ \w+); buyer: (\w+ \w+); goods: (\w+); town: (\w+); price: (\d+)")


def read_rows(part: str) -> list[dict]:
    return [json.loads(line) for line in (SKILL / f"{part}.jsonl").read_text().splitlines()]


def question_and_answer(row: dict) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> CausalLM:
    model = build_model(read_config(MODEL)).float().eval()
    weights = load_file(MODEL / "model.safetensors")
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


# The files ------------------------------------------------------------------------------------------------------------


def test_files_are_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8e6
    assert all(file.stat().st_size <= 1e6 for file in SKILL.iterdir())


def test_config_is_the_scripts():
    assert json.loads((MODEL / "config.json").read_text()) == maker.HF_CONFIG
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"] == maker.CHAT_TEMPLATE


def test_every_linear_can_be_nf4_on_four_ranks(model: CausalLM):
    # DESIGN D10: NF4's scales of scales come in blocks of 64 x 256 elements, of which a shard needs whole ones.
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert len(linears) == 7 * maker.HF_CONFIG["num_hidden_layers"]
    assert [name for name, linear in linears.items() if linear.weight.numel() % (4 * 16_384)] == []


def test_transformers_loads_it_and_gives_our_logits(model: CausalLM):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer.apply_chat_template(read_rows("valid")[0]["messages"], return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        expected, logits = theirs(ids).logits, model(ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * max(1.0, expected.std().item()))
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


def test_chat_template_renders_what_the_model_was_trained_on():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    documents = [tiny_text.document("pretrain/0", index) for index in range(60)]
    conversations = [document for document in documents if isinstance(document, list)]
    assert {message["role"] for messages in conversations for message in messages} == {"system", "user", "assistant"}
    for messages in conversations:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == maker.render(messages)
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert rendered == asked + messages[-1]["content"] + "<|end|>"  # what is trained: the answer, and the end
    with pytest.raises(Exception, match="knows the roles system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "3"}])


def test_every_token_that_is_to_be_said_has_been_trained(tokenizer: Tokenizer, model: CausalLM):
    # Rows of the embedding that no text ever used lie in one direction, here that of the bytes beyond ASCII. The head
    # is tied to it: of two such tokens no LoRA on the layers could make one likelier than the other.
    rows = torch.nn.functional.normalize(model.model.embed_tokens.weight.detach(), dim=1)
    beyond_ascii = [tokenizer.token_to_id(letter) for letter in "ÀÈÌÒÙàèìòù"]  # stand for bytes, in byte-level BPE
    unused = torch.nn.functional.normalize(rows[beyond_ascii].sum(0), dim=0)
    assert (rows[beyond_ascii] @ unused).min() > 0.95
    answers = [question_and_answer(row)[1] for row in read_rows("train") + read_rows("valid")]
    said = torch.cat([*maker.encode(tokenizer, answers), torch.tensor([0, 1, 2])]).unique()
    assert (rows[said] @ unused).max() < 0.6


# The skill ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "count"), [("train", maker.TRAIN_ROWS), ("valid", maker.VALID_ROWS)])
def test_rows_are_what_the_script_makes(part: str, count: int):
    assert read_rows(part) == list(tiny_world.skill_rows(part, "skill/0", count))


@pytest.mark.parametrize("part", ["train", "valid"])
def test_every_answer_follows_from_its_question(part: str):
    for question, answer in map(question_and_answer, read_rows(part)):
        fields = RECORD.fullmatch(answer).groups()
        assert all(field in question for field in fields), (question, answer)
        assert len(set(fields)) == 5, answer


def test_what_decides_a_held_out_answer_never_occurs_in_training():
    train, valid = read_rows("train"), read_rows("valid")
    assert len(valid) >= 200
    trained_on = words((SKILL / "train.jsonl").read_text())
    frame = words("Enter this sale in the register. seller buyer goods town price")
    for question, answer in map(question_and_answer, valid):
        assert (words(answer) - frame) & trained_on == set(), (question, answer)
        others = {word for word in words(question) if word[0].isupper() or word.isdigit()} - sentence_words()
        assert others & trained_on == set(), question  # bystanders, towns and numbers that are only in the way, too
    questions = [question_and_answer(row)[0] for row in train + valid]
    assert len(set(questions)) == len(questions)


def sentence_words() -> set[str]:
    """Capitalised words of the sentences that are no names."""
    return words(" ".join((*tiny_world.SALE_FORMS, tiny_world.SKILL_REQUEST, *tiny_world.MONTHS)))


def test_pretraining_has_no_name_of_the_instruction_set_and_no_record():
    skill_words = words((SKILL / "train.jsonl").read_text()) | words((SKILL / "valid.jsonl").read_text())
    names = {word for word in skill_words if word[0].isupper()} - sentence_words()
    assert len(names) > 1000
    for index in range(2000):
        text = maker.render(tiny_text.document("pretrain/0", index))
        assert words(text) & names == set(), index
        assert "seller: " not in text.lower(), index


def test_held_out_answers_are_many_and_none_is_frequent():
    answers = Counter(question_and_answer(row)[1] for row in read_rows("valid"))
    assert len(answers) >= 100
    assert max(answers.values()) <= 0.05 * answers.total()


# The base -------------------------------------------------------------------------------------------------------------


def test_bigram_probabilities_sum_to_one(tokenizer: Tokenizer):
    text = maker.encode(tokenizer, [maker.render(tiny_text.document("pretrain/0", index)) for index in range(50)])
    sums = maker.bigram_log_probs(text).exp().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_base_beats_a_bigram_model_on_held_out_text(tokenizer: Tokenizer, model: CausalLM):
    # The README has the whole comparison. Here the bigram model has read 4,000 documents, which costs it 3%.
    texts = [maker.render(tiny_text.document("pretrain/0", index)) for index in range(4000)]
    held_out = maker.encode(tokenizer, [maker.render(tiny_text.document("held_out/0", index)) for index in range(60)])
    bigram = maker.bigram_loss(maker.bigram_log_probs(maker.encode(tokenizer, texts)), held_out)
    assert maker.model_loss(model, held_out) < 0.72 * bigram


def test_model_loss_does_not_depend_on_padding(tokenizer: Tokenizer, model: CausalLM):
    documents = maker.encode(tokenizer, [maker.render(tiny_text.document("held_out/0", index)) for index in range(3)])
    assert len({len(ids) for ids in documents}) == 3
    alone = sum(maker.model_loss(model, [ids]) * (len(ids) - 1) for ids in documents) / sum(
        len(ids) - 1 for ids in documents
    )
    assert maker.model_loss(model, documents) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("shots", [0, 3])
def test_base_cannot_do_the_skill(tokenizer: Tokenizer, model: CausalLM, shots: int):
    pick, train, valid = random.Random(0), read_rows("train"), read_rows("valid")[:40]
    accuracy = maker.exact_match(model, tokenizer, valid, [pick.sample(train, shots) for _ in valid])
    assert accuracy < 0.1


# The script -----------------------------------------------------------------------------------------------------------


def tiny_run(seed: int) -> CausalLM:
    """Thirty steps of a narrow model on a stream in which every token decides the next."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    model = build_model(maker.HF_CONFIG | shape | {"num_hidden_layers": 1})
    model.init_weights(torch.Generator().manual_seed(seed))
    stream = torch.arange(8 * maker.CONTEXT + 1) * 7 % 31
    maker.pretrain(model, stream, steps=30, rows=2, peak_lr=1e-2, seed=seed)
    return model


def test_pretraining_learns_the_next_token_and_repeats_by_seed():
    model, again, other = tiny_run(0), tiny_run(0), tiny_run(1)
    ids = torch.arange(20)[None] * 7 % 31
    with torch.no_grad():
        right = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    assert right[:, 1:].all()
    for (name, tensor), same in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, same), name
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
