"""Text from a model: batched decoding with a KV cache.

Leaves out beam search, penalties and speculative decoding: this is for looking at a fine-tuned model, and for scoring
it.

Legend: B prompts, T tokens, V vocabulary.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from torchft.distributed import main_tensor
from torchft.errors import UserError
from torchft.modules.eval_mode import eval_mode
from torchft.modules.sharding import compute_device
from torchft.modules.transformer import CausalLM, KVCache


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
