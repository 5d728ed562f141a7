"""Renders a conversation through a chat template and says, for each character, which string of the row it is.

The template is the tokenizer's own, a shipped one (chatml, alpaca) or a .jinja file: `data.chat_template`. It sees what
transformers shows it: messages without null fields, tools, documents, add_generation_prompt, the named special tokens.
Everything of the row is tracked (tracked.py), but for the roles that chat formats know: `<|` + role + `|>` is a
template's way of writing a control token. Left out: `continue_final_message`, documents.
"""

import functools
import itertools
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from torchft.data.limits import BUDGET, LimitExceeded
from torchft.data.sandbox import Sandbox
from torchft.data.tokenizer import Tokenizer
from torchft.data.tracked import Source, runs_of
from torchft.data.wrapping import RowError, size_of, wrap, wrap_message
from torchft.errors import UserError

SHIPPED = {name: Path(__file__).parent / "templates" / f"{name}.jinja" for name in ("chatml", "alpaca")}
MAX_SOURCE = 1 << 20  # characters of a template; the longest in use have some ten thousand
# What a template's own operations raise on a row they do not fit.
MISFITS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
)


RowSpan = tuple[int, int, Source, int]  # start, end in the text; whose it is; offset there, -1: derived from it


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation. `spans` are the parts of `text` that the template did not write: in order, apart."""

    text: str
    spans: list[RowSpan]


class ChatTemplate:
    """A compiled template. `tools_source`: the one used when there are tools, where a tokenizer brings two.

    Raises:
        UserError: Jinja cannot compile it (with the line), or it is too long.
    """

    def __init__(
        self, source: str, special: Mapping[str, str], tools_source: str | None = None, name: str = "chat template"
    ):
        self.source = source
        self.tools_source = tools_source
        self.special = dict(special)  # bos_token, eos_token, ...: variables of the template
        self.name = name
        self._template = _compile(source, name)
        self._tools_template = self._template if tools_source is None else _compile(tools_source, name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """The text of a conversation.

        Raises:
            RowError: the template refuses the conversation (raise_exception), or fails on it.
            UserError: the template leaves the sandbox or its limits: no row is to blame.
        """
        return _assemble(self._pieces(messages, tools, add_generation_prompt, variables))

    def _pieces(self, messages: Sequence, tools: Sequence | None, prompt: bool, variables: dict[str, Any]) -> list[str]:
        """What the template puts out, statement by statement."""
        if not messages:
            raise RowError("the conversation is empty: nothing to render")
        template = self._template if tools is None else self._tools_template
        try:
            row = [wrap_message(message, index) for index, message in enumerate(messages)]
            given = {
                **self.special,
                **variables,
                "messages": row,
                "tools": None if tools is None else wrap(tools, -1, "other"),
                "documents": None,
                "add_generation_prompt": prompt,
            }
            BUDGET.start(size_of(row) + size_of(given["tools"]))
            return list(template.root_render_func(template.new_context(given)))
        except LimitExceeded as error:
            raise UserError(f"{self.name} was stopped: {error}; choose another with data.chat_template") from None
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"{self.name} is refused: {error}; choose another with data.chat_template") from None
        except RowError:
            raise
        except MISFITS as error:
            raise RowError(f"{self.name}{_line(error, template)}: {_reason(error)}") from None
        finally:
            BUDGET.stop()

    @property
    def is_dated(self) -> bool:
        """Whether it prints the current date, for which it gets a fixed one (sandbox.py)."""
        return "strftime_now" in self.source + (self.tools_source or "")

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template writes where an answer begins, e.g. `<|im_start|>assistant` and a newline; or ""."""
        probe = [{"role": "user", "content": "?"}]
        try:
            plain, prompted = self._pieces(probe, None, False, {}), self._pieces(probe, None, True, {})
        except RowError:
            return ""
        # Piece by piece first: Phi ends a text without prompt in "<|endoftext|>", and "<|" is not part of
        # "<|assistant|>".
        same = next(
            (i for i, (a, b) in enumerate(zip(plain, prompted, strict=False)) if a != b), min(len(plain), len(prompted))
        )
        return "".join(prompted[same:]).removeprefix("".join(plain[same:]))


def load_template(choice: str, tokenizer: Tokenizer, new_tokens: Sequence[str] = ()) -> ChatTemplate | None:
    """The template that `data.chat_template` chooses: "" is the tokenizer's own; chatml, alpaca, or a .jinja file.

    `new_tokens` are added to the tokenizer first, as control tokens where the template spells them. None if the
    tokenizer has no template and none is chosen, which is enough for plain texts.

    Raises:
        UserError: it cannot be read or compiled, or it needs control tokens that the tokenizer lacks.
    """
    source, name = tokenizer.chat_template, f"the chat template of {tokenizer.path}"
    if choice:
        source, name = _read_template(choice)
    if new_tokens:
        tokenizer.add_tokens(new_tokens, source or "")
    if source is None:
        return None
    missing = [
        token
        for token in ("<|im_start|>", "<|im_end|>")
        if choice == "chatml" and token not in tokenizer.special_tokens
    ]
    if missing:
        raise UserError(
            f"data.chat_template: chatml needs the control tokens {' and '.join(missing)}, which {tokenizer.path} "
            f"lacks: choose another template, or add them (data.new_tokens={missing})"
        )
    return ChatTemplate(source, tokenizer.named, None if choice else tokenizer.tools_template, name)


def _read_template(choice: str) -> tuple[str, str]:
    """Source and name of a chosen template."""
    path = SHIPPED.get(choice, Path(choice))
    if not path.is_file():
        raise UserError(f"data.chat_template: {choice!r} is no file and none of {', '.join(SHIPPED)}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {path} cannot be read: {error}") from None


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


def _compile(source: str, name: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise UserError(f"{name} has {len(source):,} characters; the limit is {MAX_SOURCE:,}")
    try:
        BUDGET.start(len(source))
        return _sandbox().compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}, line {error.lineno}: {error.message}") from None
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
        OverflowError,
        LimitExceeded,
        jinja2.TemplateError,
    ) as error:
        raise UserError(f"{name} cannot be compiled: {_reason(error)}") from None
    finally:
        BUDGET.stop()


def _assemble(pieces: list[str]) -> Rendered:
    """One text and its row spans from what the template put out; runs that continue one another become one span."""
    spans: list[RowSpan] = []
    position = 0
    for length, source, offset in itertools.chain.from_iterable(map(runs_of, pieces)):
        if source is not None:
            span = position, position + length, source, offset
            if spans and _continues(spans[-1], span):
                span = spans[-1][0], span[1], source, spans.pop()[3]
            spans.append(span)
        position += length
    return Rendered("".join(pieces), spans)


def _continues(left: RowSpan, right: RowSpan) -> bool:
    if left[2] is not right[2] or left[1] != right[0] or (left[3] < 0) != (right[3] < 0):
        return False
    return left[3] < 0 or right[3] - left[3] == right[0] - left[0]


def _line(error: BaseException, template: jinja2.Template) -> str:
    """The template's line that raised, as ", line 12"."""
    frames = [
        line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "chat template"
    ]
    return f", line {template.get_corresponding_lineno(frames[-1])}" if frames else ""


def _reason(error: BaseException) -> str:
    known = isinstance(error, (jinja2.TemplateError, LimitExceeded))
    return str(error) if known else f"{type(error).__name__}: {error}"
