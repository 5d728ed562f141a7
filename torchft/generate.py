"""Text from a model: batched decoding with a KV cache, answers to examples and how many are right, and `tune generate`.

Leaves out beam search, penalties and speculative decoding: this is for looking at a fine-tuned model, and for scoring
it.

Legend: B prompts, T tokens, V vocabulary.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchft.adapter import attach_adapter, load_adapter, tokenizer_folder
from torchft.config import resolve_path
from torchft.data.chat_template import ChatTemplate, load_template
from torchft.data.dataset import Dataset
from torchft.data.formats import Example, split_answer
from torchft.data.tokenize import render_prompt
from torchft.data.tokenize import stop_ids as template_stop_ids
from torchft.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from torchft.distributed import main_tensor
from torchft.errors import UserError
from torchft.models import build_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.sharding import compute_device
from torchft.modules.transformer import CausalLM, KVCache
from torchft.ranks import rank
from torchft.storage import store_frozen
from torchft.weights import load_weights

BAR_AFTER = 2.0  # seconds that answers may take without a progress bar
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def generate(
    model: CausalLM,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt until one of `stop_ids` (left out of the result) or `max_new_tokens`.

    temperature 0 takes the likeliest token, and the result is that of decoding each prompt alone and without a cache;
    above it, tokens are drawn from the smallest set that holds `top_p` of the probability, from a generator seeded with
    `seed` (the global random state is not touched). With LongRoPE or dynamic RoPE a text counts as long as it may become.
    `on_token(row, token)` is called as tokens come.
    Blocks that are compiled run uncompiled in here: every step has another shape. Every process of a run whose model is
    divided must call it with the same prompts; the first one's choices hold.

    Raises:
        UserError: a prompt is empty or holds an id beyond the vocabulary, or an option is out of range.
    """
    _check(model, prompts, temperature, top_p, seed)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    generator = torch.Generator(compute_device(model.model.norm.weight)).manual_seed(seed)
    # Nothing is compiled before the compiler is imported, which takes seconds that a run without it need not spend.
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    replies: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    with torch.no_grad(), eval_mode(model), uncompiled:
        logits, cache, position = _read_prompts(model, prompts, max_new_tokens)
        text = torch.ones_like(position)  # the document id of everything that is not padding
        while running:
            chosen = main_tensor(_pick(logits, temperature, top_p, generator))  # (B,)
            _take(chosen.tolist(), replies, running, stop_ids, on_token)
            running -= {row for row in running if len(replies[row]) == max_new_tokens}
            if running:
                position = position + 1
                logits = model(chosen[:, None], positions=position, documents=text, cache=cache)[:, -1]
    return replies


def _take(
    tokens: list[int],
    replies: list[list[int]],
    running: set[int],
    stop_ids: set[int],
    on_token: Callable[[int, int], None] | None,
) -> None:
    """Add one step's tokens to the replies of the rows still running; a stop id ends its row."""
    for row in sorted(running):
        if tokens[row] in stop_ids:
            running.discard(row)
            continue
        replies[row].append(tokens[row])
        if on_token is not None:
            on_token(row, tokens[row])


def _check(model: CausalLM, prompts: list[list[int]], temperature: float, top_p: float, seed: int) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (the likeliest token) or a positive number.")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1 (no cut).")
    if not -(2**63) <= seed < 2**64:  # what torch takes
        raise UserError(f"seed is {seed}; it must fit into 64 bits.")
    vocab_size = model.lm_head.weight.shape[0]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} has no tokens; there is nothing to continue.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"prompt {row} holds a token id outside 0 .. {vocab_size - 1}: tokenizer and model do not match."
            )


def _read_prompts(model: CausalLM, prompts: list[list[int]], max_new_tokens: int) -> tuple[Tensor, KVCache, Tensor]:
    """Run the prompts, padded on the left to one length: logits (B, V) of their ends, the cache, last positions (B, 1).

    Padding is a document of its own, so that no token of a prompt sees it; and with the ends aligned, each row's
    distances between columns are those between its tokens, as sliding windows need them.
    """
    device = compute_device(model.model.norm.weight)
    longest = max(len(prompt) for prompt in prompts)
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    in_text = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, documents = torch.tensor(padded, device=device), torch.tensor(in_text, device=device)  # (B, T)
    positions = (documents.cumsum(1) - 1).clamp(min=0)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, device)
    logits = model(ids, positions=positions, documents=documents, cache=cache, last_only=True)[:, -1]
    return logits, cache, positions[:, -1:]


def _pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """The next token of every row: logits (B, V) -> ids (B,)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1.0:
        falling, order = probabilities.sort(-1, descending=True)
        likelier = falling.cumsum(-1) - falling  # mass of the tokens before; the first token is always kept
        falling = falling.masked_fill(likelier >= top_p, 0.0)
        probabilities = torch.zeros_like(falling).scatter(-1, order, falling)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class Answer(NamedTuple):
    """What the model made of one example."""

    prompt: str  # the text of the last message before the answer
    answer: str
    expected: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, blanks at the ends aside."""
        return self.answer.strip() == self.expected.strip()


def first_conversations(dataset: Dataset | None, template: ChatTemplate | None, count: int) -> list[Example]:
    """The first `count` examples that a model can be asked; none of no dataset, and plain texts have no answers."""
    if dataset is None or template is None:
        return []
    examples = (dataset.example(index) for index in range(len(dataset)))
    return list(itertools.islice((example for example in examples if example.messages), count))


def answer_examples(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers to conversations, each asked up to its last assistant turn, with a progress bar on a terminal.

    Raises UserError for a plain text.
    """
    stops = template_stop_ids(tokenizer, template)
    answers = []
    # disable=None: on a terminal only. miniters=0: each token may draw it, so that its clock runs while a batch is answered;
    # smoothing=0: its rate is the mean since the start, as one between drawings would be none.
    shown = {"desc": "answers", "unit": " answers", "leave": False, "delay": BAR_AFTER, "disable": rank() > 0 or None}
    with tqdm(total=len(examples), miniters=0, smoothing=0, **shown) as bar:
        options = {"max_new_tokens": max_new_tokens, "stop_ids": stops, "on_token": lambda row, token: bar.update(0)}
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            asked = [split_answer(example) for example in batch]  # (messages, expected)
            prompts = [
                render_prompt(messages, example.tools, tokenizer, template)
                for example, (messages, _) in zip(batch, asked, strict=True)
            ]
            replies = generate(model, prompts, **options)
            bar.update(len(batch))
            for (messages, expected), reply in zip(asked, replies, strict=True):
                question = messages[-1].get("content") if messages else ""
                answers.append(Answer(str(question), tokenizer.decode(reply), expected))
    return answers


def exact_match(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[float, list[Answer]]:
    """Share of examples whose greedy answer is the expected one, blanks at the ends aside (0 of none is 0)."""
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    answers = answer_examples(model, tokenizer, template, examples, **options)
    hits = sum(answer.right for answer in answers)
    return hits / max(1, len(answers)), answers


def load_model(path: Path, adapter: Path | None, dtype: torch.dtype, quantize: str, device: torch.device) -> CausalLM:
    """A model directory, with an adapter or without, ready to generate. Raises UserError naming what does not fit."""
    try:
        with torch.device("meta"):
            model = build_model(read_config(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    new_rows = attach_adapter(model, adapter)[-1] if adapter else 0
    model.requires_grad_(False)
    store_frozen(model, quantize, [])
    load_weights(model, path, device=device, dtype=dtype, new_rows=new_rows)
    if adapter:
        load_adapter(model, adapter)
    return model.eval()


def main_generate(args: argparse.Namespace) -> None:
    """`tune generate`: answer one prompt, or chat until /exit.

    Uses of args: model, adapter ("" = none), prompt (None or "" = chat), system, chat_template, dtype (bfloat16 or float32),
    quantize (none, nf4 or nf4_int8_head), max_new_tokens, temperature, top_p, seed. Raises UserError for what a user can get wrong.
    """
    path, adapter = resolve_path(args.model), resolve_path(args.adapter) if args.adapter else None
    tokenizer = load_tokenizer(tokenizer_folder(path, adapter))
    template = load_template(args.chat_template, tokenizer)
    if template is None and not args.prompt:
        raise UserError(
            f"{tokenizer.path} has no chat template: give one with --chat-template, or a --prompt to continue"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, adapter, DTYPES[args.dtype], args.quantize, device)
    stops = template_stop_ids(tokenizer, template)
    if template is None:
        print("no chat template: the prompt is continued as plain text", file=sys.stderr)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        _stream(model, tokenizer, bos + tokenizer.encode(args.prompt)[0], stops, args)
        return
    messages = _opening(args)
    for line in [args.prompt] if args.prompt else _typed_lines():
        if line == "/reset":
            messages = _opening(args)
            continue
        messages.append({"role": "user", "content": line})
        answer = _stream(model, tokenizer, render_prompt(messages, None, tokenizer, template), stops, args)
        messages.append({"role": "assistant", "content": answer})


def _opening(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _typed_lines() -> Iterator[str]:
    """What the user types, line by line, without empty ones, until /exit, Ctrl-D or Ctrl-C.

    Lines from a file or a pipe are not prompted for, so that the output holds nothing but answers.
    """
    typed = sys.stdin.isatty()
    if typed:
        print("Chat with the model. /reset forgets the conversation, /exit or Ctrl-D ends it.")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            if typed:
                print()
            return
        if line == "/exit":
            return
        if line:
            yield line


def _stream(model: CausalLM, tokenizer: Tokenizer, prompt: list[int], stops: set[int], args: argparse.Namespace) -> str:
    """Print the continuation of a prompt while it comes, and return it; Ctrl-C ends it early."""
    limit = model.config.max_position_embeddings
    decoder = StreamDecoder(tokenizer)
    pieces: list[str] = []

    tokens = len(prompt)

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    def take(row: int, token: int) -> None:
        nonlocal tokens
        tokens += 1
        show(decoder.push(token))

    try:
        generate(
            model,
            [prompt],
            max_new_tokens=args.max_new_tokens,
            stop_ids=stops,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            on_token=take,
        )
    except KeyboardInterrupt:
        pass  # the user has seen enough of this answer
    show(decoder.finish())
    print()
    if tokens > limit:
        print(f"{tokens} tokens so far: beyond {limit}, the model was never trained", file=sys.stderr)
    return "".join(pieces)
