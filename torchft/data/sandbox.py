"""The Jinja environment of chat templates: what transformers gives a template, sandboxed, bounded and origin-keeping.

Four changes to Jinja's own ImmutableSandboxedEnvironment, none but the first to what a well-behaved template prints:
- strftime_now tells one fixed date: with today's, a data set would have other tokens tomorrow, and its run no resume.
- row text stays `Tracked`: a literal gets Tracked's methods when one is called on it; `~`, `%`, str.format, output and
  filters are our own functions; a filter that gives a plain string for row text gives text derived from it.
- every loop turn, call, filter and operator draws on the budget (limits.py), before it makes something large.
- touching an unsafe attribute raises at once, where Jinja prints nothing; no inclusion, no autoescaping, no markup.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from torchft.data.formatting import braces, percent
from torchft.data.limits import BUDGET, MAX_BITS, MAX_FIELD, LimitExceeded
from torchft.data.tracked import SHARED, Tracked, derived, join, make, owner, promote, runs_of, to_text

# Filters that make HTML, are random, or print Python objects: no chat template has a use for them.
DROPPED_FILTERS = ("urlize", "xmlattr", "random", "pprint", "filesizeformat", "wordwrap", "striptags", "forceescape")
# Filters that hand on what they are given, or keep runs themselves: a plain string from them is the template's own.
EXACT_FILTERS = frozenset(
    "first last min max default d attr tojson join format replace indent truncate string safe trim upper lower".split()
)
SIZED_FILTERS = frozenset(("center", "batch", "slice", "round"))  # a number given to them is the size of what they make
# What strftime_now says: the date that Llama 3.1's template holds, and Llama 3.2's where there is no strftime_now.
NOW = datetime(2024, 7, 26)
REFUSED_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.ScopedEvalContextModifier)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return derived(NOW.strftime(form), form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' tojson: plain JSON, no HTML escapes. All of it is the row's, but for the template's own scalars."""
    if indent is not None and len(indent if isinstance(indent, str) else range(indent)) > MAX_FIELD:
        raise LimitExceeded(f"tojson is asked to indent by more than {MAX_FIELD:,}")
    source = owner(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    BUDGET.spend(len(text))
    if source is None and isinstance(value, (Mapping, list, tuple)):
        source = SHARED
    return make(text, ((len(text), source, -1),))


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, values: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return join((to_text(value) for value in values), to_text(d))


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.TemplateRuntimeError("format takes positional or named values, not both")
    return percent(to_text(value), kwargs or args)


def _replace_filter(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = to_text(value)
    return promote(text, runs_of(text)).replace(to_text(old), to_text(new), -1 if count is None else count)


def _indent_filter(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's indent: the first line and blank lines only on request; a closing newline counts as a line."""
    margin = width if isinstance(width, str) else " " * min(width, MAX_FIELD + 1)
    if len(margin) > MAX_FIELD:
        raise LimitExceeded(f"indent is asked for more than {MAX_FIELD:,}")
    text = to_text(value) + "\n"
    lines = promote(text, runs_of(text)).splitlines()
    if blank:
        text = join(lines, "\n" + margin)
    else:
        text = join([lines[0]] + [piece for line in lines[1:] for piece in ("\n", margin if line else "", line)])
    return margin + text if first else text


def _truncate_filter(
    value: Any, length: int = 255, killwords: bool = False, end: str = "...", leeway: int | None = None
) -> str:
    text = to_text(value)
    leeway = 5 if leeway is None else leeway  # Jinja's truncate.leeway policy
    if length < len(end) or leeway < 0:
        raise jinja2.TemplateRuntimeError(f"truncate needs a length of at least {len(end)} and a leeway of at least 0")
    if len(text) <= length + leeway:
        return text
    kept = text[: length - len(end)]
    return (kept if killwords else promote(kept, runs_of(kept)).rsplit(" ", 1)[0]) + end


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    for name in {**dict(*args), **kwargs}:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")
    return Namespace(*args, **kwargs)


def _new_dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


class _Rewriter(NodeTransformer):
    """Puts the budget into loops and macros, sends `~` and containers through the environment, refuses inclusion."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, REFUSED_NODES):
            raise jinja2.TemplateSyntaxError(f"{type(node).__name__} has no place in a chat template", node.lineno)
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_call("tick", [], node), node.test, lineno=node.lineno)  # turns that it skips, too
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body = [nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno), *node.body]
        elif isinstance(node, nodes.Concat):
            return _call("concatenate", node.nodes, node)
        elif isinstance(node, (nodes.List, nodes.Dict, nodes.Tuple)) and not _is_constant(node):
            return _call("measured", [node], node)
        elif isinstance(node, nodes.NSRef) and node.attr.startswith("_"):
            raise jinja2.TemplateSyntaxError(
                f"namespace attribute {node.attr!r} starts with an underscore", node.lineno
            )
        return node


def _is_constant(node: nodes.Node) -> bool:
    """Whether a literal holds only constants, or is the target of an assignment."""
    if isinstance(node, nodes.Const) or (isinstance(node, nodes.Tuple) and node.ctx == "store"):
        return True
    literal = isinstance(node, (nodes.List, nodes.Dict, nodes.Pair, nodes.Tuple))
    return literal and all(map(_is_constant, node.iter_child_nodes()))


def _call(name: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(function, args, [], None, None, lineno=at.lineno)


class _Generation(Extension):
    """{% generation %} marks an answer for transformers' mask, which ours does not need: it prints its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """See the module's docstring. The methods below are called by compiled templates."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})
    concat = staticmethod(join)  # of a macro's, a set block's output

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=to_text)
        self.globals = {
            "range": self.globals["range"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "dict": _new_dict,
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters.update(
            tojson=_tojson, join=_join_filter, format=_format_filter, replace=_replace_filter, indent=_indent_filter,
            truncate=_truncate_filter, string=to_text, safe=to_text,
        )  # fmt: skip
        self.filters = {name: self._guard(name, f) for name, f in self.filters.items() if name not in DROPPED_FILTERS}

    def compile_template(self, source: str) -> jinja2.Template:
        tree = _Rewriter().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree, filename="chat template"), self.globals)

    def tick(self) -> bool:
        BUDGET.spend()
        return True

    def concatenate(self, *values: Any) -> str:
        return join(map(to_text, values))

    def measured(self, value: Any) -> Any:
        owner(value)
        return value

    def _guard(self, name: str, function: Callable) -> Callable:
        """A filter that draws on the budget, and whose text belongs to the row if any of its arguments does."""

        @functools.wraps(function)  # keeps Jinja's mark of functions that want the context or environment first
        def guarded(*args: Any, **kwargs: Any) -> Any:
            asked = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, int)] if name in SIZED_FILTERS else []
            BUDGET.spend(max([0, *asked]))
            result = function(*args, **kwargs)
            if isinstance(result, str) and type(result) is not Tracked and name not in EXACT_FILTERS:
                return derived(result, args, kwargs)
            return _bounded(result)

        return guarded

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        BUDGET.spend()
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return join((left, right))
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        BUDGET.spend(_size_of_result(operator, left, right))
        return _bounded(self.binop_table[operator](left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r}")
        return super().getattr(promote(obj, runs_of(obj)) if type(obj) is str else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is str and isinstance(argument, str):
            obj = promote(obj, runs_of(obj))
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in ("encode", "maketrans"):
            return False  # bytes would come back as text of unknown origin
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, (MethodType, BuiltinMethodType)) or value.__name__ not in ("format", "format_map"):
            return None
        text = value.__self__
        if not isinstance(text, str):
            return None
        formatter = SandboxedFormatter(self)
        if value.__name__ == "format_map":
            return lambda mapping: braces(formatter, text, (), mapping)
        return lambda *args, **kwargs: braces(formatter, text, args, kwargs)


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """Items that `left * right` would have.

    Raises:
        LimitExceeded: `left ** right` would be a huge integer.
    """
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
        raise LimitExceeded(f"it computes an integer of more than {MAX_BITS} bits")
    if operator != "*":
        return 0
    sequence, times = (right, left) if isinstance(left, int) else (left, right)
    return len(sequence) * max(0, times) if isinstance(sequence, (str, list, tuple)) and isinstance(times, int) else 0


def _bounded(result: Any) -> Any:
    """A result as it is, if it is no bomb: integers by their bits, containers by walking them."""
    if isinstance(result, int):
        if result.bit_length() > MAX_BITS:
            raise LimitExceeded(f"it computes an integer of more than {MAX_BITS} bits")
    elif isinstance(result, (list, tuple, dict)):
        owner(result)
    return result
