"""`tune generate`: a model with its adapter answers one prompt, or chats."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from torchft.adapter import attach_adapter, load_adapter, tokenizer_folder
from torchft.config import resolve_path
from torchft.data.chat_template import load_template
from torchft.data.tokenize import render_prompt
from torchft.data.tokenize import stop_ids as template_stop_ids
from torchft.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from torchft.errors import UserError
from torchft.generate import generate
from torchft.models import build_model, read_config
from torchft.modules.transformer import CausalLM
from torchft.peft_config import other_base
from torchft.storage import store_frozen
from torchft.weights import load_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
    if adapter and (warning := other_base(adapter, path)):
        print(warning, file=sys.stderr, flush=True)
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
