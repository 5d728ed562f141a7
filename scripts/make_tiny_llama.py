"""Makes what `make demo` runs on: a tiny Llama with its tokenizer, pre-trained here, and an instruction set for it.

    python scripts/make_tiny_llama.py                # everything, into torchft/assets: a few minutes on an H200
    python scripts/make_tiny_llama.py --evaluate     # only print the figures of what is in --out
    python scripts/make_tiny_llama.py --out /tmp/try --steps 250 --rows 8 --documents 20000   # a trial on a CPU

The text comes from scripts/tiny_text.py, a pure function of the seed; a part of it (documents named "held_out") is
never trained on. The base is measured against a bigram model of the same training text, and against the instruction
set, which it must not solve: that is left to the LoRA. The READMEs beside the files hold the figures of those bundled.

Left out: dropout, several GPUs, resuming. The model has 3 million parameters and trains in minutes.
"""

import argparse
import json
import random
import time
from pathlib import Path

import tiny_text
import tiny_world
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from torchft.config import OptimConfig
from torchft.generate import generate
from torchft.models import build_model
from torchft.modules.transformer import CausalLM
from torchft.optim import lr_at, set_lr

ASSETS = Path(__file__).resolve().parent.parent / "torchft" / "assets"
BOS, START, END = "<|begin_of_text|>", "<|start|>", "<|end|>"  # ids 0, 1, 2
CONTEXT = 512  # tokens; three examples and a question of the instruction set take about 400
VOCAB_SIZE = (
    1280  # every kind of goods is one token, every name two or three: pieces that names of all shares have in common
)
HELD_OUT_DOCUMENTS = 1000
TRAIN_ROWS, VALID_ROWS = 2400, 300  # of the instruction set
# Every linear has a multiple of 4 x 16,384 elements, so that NF4 works on its shards over up to 4 ranks.
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('this model knows the roles system, user and assistant, not ' + message.role) }}"
    "{%- endif %}"
    "{{- '<|start|>' + message.role + '\\n' + message.content | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"
)


def render(document: str | list[dict[str, str]], *, to_answer: bool = False) -> str:
    """A document as the model reads it; messages as CHAT_TEMPLATE does, `to_answer` with the head of the next turn."""
    if isinstance(document, str):
        return f"{BOS}{document}{END}"
    turns = [f"{START}{message['role']}\n{message['content']}{END}" for message in document]
    return BOS + "".join(turns) + (f"{START}assistant\n" if to_answer else "")


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE; words, single digits and runs of marks are kept apart, as by Llama 3, which groups digits."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (piece for text in documents for piece in text.replace(BOS, "").replace(START, "").split(END))
    tokenizer.train_from_iterator(pieces, trainer)
    assert [tokenizer.token_to_id(token) for token in (BOS, START, END)] == [0, 1, 2]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """Ids of rendered documents, whose control tokens are read as such: the text is our own."""
    encoded = []
    for first in range(0, len(texts), 10_000):  # a batch's encodings hold much more than its ids
        batch = tokenizer.encode_batch_fast(texts[first : first + 10_000], add_special_tokens=False)
        encoded += [torch.tensor(item.ids, dtype=torch.int32) for item in batch]
    return encoded


def pretrain(model: CausalLM, tokens: torch.Tensor, *, steps: int, rows: int, peak_lr: float, seed: int) -> None:
    """Next-token training on windows of the stream `tokens` (N,), `rows` of them a step, each window once an epoch."""
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)  # (windows, CONTEXT + 1); neighbours share one token
    if len(windows) < rows:
        raise SystemExit(f"--rows {rows}: the text has {len(windows)} windows. Take fewer rows or more --documents.")
    order = torch.Generator().manual_seed(seed)
    schedule = OptimConfig(lr=peak_lr, schedule="cosine", warmup_steps=max(1, steps // 20), min_lr_ratio=0.05)
    decay = {dimensions: {"params": [], "weight_decay": 0.1 * (dimensions == 2)} for dimensions in (1, 2)}
    for parameter in model.parameters():  # from scratch the embedding is decayed, too
        decay[parameter.ndim]["params"].append(parameter)
    optimizer = torch.optim.AdamW(decay.values(), betas=(0.9, 0.98), fused=True)
    permutation, start = torch.empty(0, dtype=torch.int64), time.perf_counter()
    for step in range(steps):
        if len(permutation) < rows:
            permutation = torch.randperm(len(windows), generator=order)
        batch = windows[permutation[:rows].to(windows.device)].long()  # (rows, CONTEXT + 1)
        permutation = permutation[rows:]
        set_lr(optimizer, lr_at(step, steps, schedule))
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            logits = model(batch[:, :-1])  # (rows, CONTEXT, VOCAB_SIZE): few enough to hold
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            seconds = time.perf_counter() - start
            speed, left = (step + 1) * rows * CONTEXT / seconds, seconds / (step + 1) * (steps - step - 1)
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.4f}  {speed:,.0f} tokens/s  {left:.0f} s left", flush=True
            )


def bigram_log_probs(documents: list[torch.Tensor]) -> torch.Tensor:
    """(V, V) fp64: log p(next | token), interpolated Kneser-Ney (Ney, Essen and Kneser 1994).

    The discount is their estimate from how many pairs occur once and twice.
    """
    pairs = torch.cat([ids[:-1].long() * VOCAB_SIZE + ids[1:].long() for ids in documents])
    counts = torch.bincount(pairs, minlength=VOCAB_SIZE**2).view(VOCAB_SIZE, VOCAB_SIZE).double()
    ones, twos = (counts == 1).sum(), (counts == 2).sum()
    discount = ones / (ones + 2 * twos)
    kinds = (counts > 0).double()
    continuation = (kinds.sum(0) + 1) / (kinds.sum() + VOCAB_SIZE)  # + 1: no token has probability zero
    total = counts.sum(1, keepdim=True)
    backed_off = discount * kinds.sum(1, keepdim=True) * continuation
    seen = ((counts - discount).clamp(min=0) + backed_off) / total.clamp(min=1)
    return torch.where(total > 0, seen, continuation).log()


def bigram_loss(log_probs: torch.Tensor, documents: list[torch.Tensor]) -> float:
    """Nats per token over `documents`; as in `model_loss`, the begin token is given."""
    total = sum(log_probs[ids[:-1].long(), ids[1:].long()].sum() for ids in documents)
    return -float(total) / sum(len(ids) - 1 for ids in documents)


@torch.no_grad()
def model_loss(model: CausalLM, documents: list[torch.Tensor]) -> float:
    """Nats per token over `documents`, each on its own from its begin token; at most CONTEXT + 1 tokens each."""
    total, count = 0.0, 0
    for first in range(0, len(documents), 50):
        batch = [ids.long() for ids in documents[first : first + 50]]
        # Padding is on the right, where no token of the text looks.
        inputs = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids in batch], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([ids[1:] for ids in batch], batch_first=True, padding_value=-100)
        total += model(inputs, labels=labels).item()
        count += int((labels != -100).sum())
    return total / count


def exact_match(model: CausalLM, tokenizer: Tokenizer, rows: list[dict], shots: list[list[dict]]) -> float:
    """Share of `rows` answered to the letter by greedy decoding, each after its own `shots`: solved rows as turns."""
    prompts, answers = [], []
    for row, solved in zip(rows, shots, strict=True):
        earlier = [message for shot in solved for message in shot["messages"]]
        prompts.append(render(earlier + row["messages"][:-1], to_answer=True))
        answers.append(row["messages"][-1]["content"])
    ids = [prompt.tolist() for prompt in encode(tokenizer, prompts)]
    right = 0
    for first in range(0, len(ids), 50):
        replies = generate(model, ids[first : first + 50], max_new_tokens=64, stop_ids={tokenizer.token_to_id(END)})
        right += sum(tokenizer.decode(reply) == answer for reply, answer in zip(replies, answers[first:], strict=False))
    return right / len(rows)


def evaluate(
    model: CausalLM, tokenizer: Tokenizer, documents: list[torch.Tensor], skill: Path, seed: int
) -> dict[str, float]:
    """The figures that make the demo honest: what the base knows of its own text, and that it cannot do the skill."""
    texts = [render(tiny_text.document(f"held_out/{seed}", index)) for index in range(HELD_OUT_DOCUMENTS)]
    held_out = [ids[: CONTEXT + 1] for ids in encode(tokenizer, texts)]
    train, valid = (
        [json.loads(line) for line in (skill / f"{part}.jsonl").read_text().splitlines()] for part in ("train", "valid")
    )
    pick = random.Random(seed)
    bigram, base = bigram_loss(bigram_log_probs(documents), held_out), model_loss(model, held_out)
    return {
        "training tokens": sum(len(ids) for ids in documents),
        "held-out tokens": sum(len(ids) - 1 for ids in held_out),
        "bigram loss on the held-out text": bigram,
        "base loss on the held-out text": base,
        "base below bigram": 1 - base / bigram,
        "base exact match, no example": exact_match(model, tokenizer, valid, [[] for _ in valid]),
        "base exact match, 3 examples": exact_match(model, tokenizer, valid, [pick.sample(train, 3) for _ in valid]),
    }


def save_model(model: CausalLM, tokenizer: Tokenizer, out: Path, config: dict = HF_CONFIG) -> None:
    """The Hugging Face directory; weights in bf16, the tied head once."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: t.to("cpu", torch.bfloat16).contiguous()
        for name, t in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 2, "do_sample": False}
    files = {"config": config, "tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def save_skill(out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for share, count in (("train", TRAIN_ROWS), ("valid", VALID_ROWS)):
        rows = tiny_world.skill_rows(share, f"skill/{seed}", count)
        (out / f"{share}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--out", type=Path, default=ASSETS, help="holds tiny_llama/ and tiny_sft/ (default: %(default)s)")
    add("--evaluate", action="store_true", help="train nothing; print the figures of the files in --out")
    add("--seed", type=int, default=0, help="of text, weights and order (default: %(default)s)")
    add("--documents", type=int, default=150_000, help="for training, about 165 tokens each (default: %(default)s)")
    add("--steps", type=int, default=6700, help="optimizer steps (default: %(default)s)")
    add("--rows", type=int, default=128, help=f"windows of {CONTEXT} tokens in a step (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--device", default=gpu, help="to train on; figures are taken on the CPU (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    model_dir, skill_dir = args.out / "tiny_llama", args.out / "tiny_sft"
    if args.evaluate and not (model_dir / "model.safetensors").is_file():
        raise SystemExit(f"--evaluate: there is no {model_dir / 'model.safetensors'}. Leave --evaluate out to make it.")
    texts = [render(tiny_text.document(f"pretrain/{args.seed}", index)) for index in range(args.documents)]
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
    model = build_model(HF_CONFIG)
    if args.evaluate:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        documents = encode(tokenizer, texts)
    else:
        save_skill(skill_dir, args.seed)
        tokenizer = train_tokenizer(texts[:20_000])
        documents = encode(tokenizer, texts)
        model.init_weights(torch.Generator().manual_seed(args.seed))
        tokens = torch.cat(documents).to(args.device)
        pretrain(model.to(args.device), tokens, steps=args.steps, rows=args.rows, peak_lr=args.lr, seed=args.seed)
        save_model(model, tokenizer, model_dir)
    weights = load_file(model_dir / "model.safetensors")  # what is measured is what was saved
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    for name, value in evaluate(model.to("cpu"), tokenizer, documents, skill_dir, args.seed).items():
        print(f"{name}: {value:,.4f}" if isinstance(value, float) else f"{name}: {value:,}")


if __name__ == "__main__":
    main()
