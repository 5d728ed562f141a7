"""A tokenizer with one token per byte and a template of one control token per turn: every length and every mask is
known.

A row of one question and one answer is `<s>` question `<a>` answer `<e>`.
"""

import json

import tokenizers
from tokenizers import decoders, pre_tokenizers

from torchft.data.chat_template import load_template
from torchft.data.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ {'system': '<y>', 'user': '<s>', 'assistant': '<a>', 'tool': '<t>'}[m.role] }}"
    "{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}<e>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
CONTROL = ("<b>", "<y>", "<s>", "<a>", "<t>", "<e>")


def write_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in CONTROL])
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<b>", "eos_token": "<e>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_template("", tokenizer)


def row(question, answer, **more):
    return {"question": question, "answer": answer} | more


def texts(dataset, tokenizer):
    """Each sample as (text, text of its targets)."""
    found = []
    for start, length in zip(dataset.starts, dataset.lengths, strict=True):
        ids = dataset.ids[start : start + length]
        targets = ids[1:][dataset.supervised[start : start + length - 1]]
        assert not dataset.supervised[start + length - 1]
        found.append((tokenizer.decode(ids, skip_special=False), tokenizer.decode(targets, skip_special=False)))
    return found
