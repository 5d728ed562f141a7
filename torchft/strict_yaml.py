"""YAML as a tree of nodes with line numbers, and nothing else: no object is ever constructed from a tag.

PyYAML's scanner and parser, with the scalar rules of YAML 1.2's core schema
(https://yaml.org/spec/1.2.2/#103-core-schema), so that `on`, `off`, `yes` and `no` are words and `2e-4` is a number.
Aliases are refused (a few lines of them make gigabytes), deep nesting and large files too: a config needs neither,
and the parser takes quadratic time for them.
"""

import re
from pathlib import Path

import yaml
from yaml.composer import Composer
from yaml.error import MarkedYAMLError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from torchft.errors import ConfigError

COMMAND_LINE = "command line"  # the name of a source without lines
MAX_BYTES = 32 * 1024  # about 0.2 s of parsing
MAX_DEPTH = 12
TAG = "tag:yaml.org,2002:"
STR, INT, FLOAT, BOOL, NULL = (TAG + name for name in ("str", "int", "float", "bool", "null"))
PLAIN_TAGS = {STR, INT, FLOAT, BOOL, NULL, TAG + "map", TAG + "seq"}


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Composes nodes; it has no constructor, so `!!python/...` tags are text that `check_node` refuses."""

    def __init__(self, text: str, name: str):
        Reader.__init__(self, text)
        self.name = name
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def fetch_flow_collection_start(self, token_class: type) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Node | None, index: Node | int | None) -> Node | None:
        event = self.peek_event()
        if isinstance(event, AliasEvent):
            raise MarkedYAMLError(
                problem="aliases (*name) are not accepted; write the value out", problem_mark=event.start_mark
            )
        if self.depth >= MAX_DEPTH:
            raise MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def compose_text(text: str, name: str) -> Node | None:
    """The node tree of one YAML document, or None for an empty one. `name` is what errors call the source.

    Raises ConfigError with the line for text that is not YAML, for tags, aliases, deep nesting and large documents.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name} is {len(text)} characters long; a config has at most {MAX_BYTES}")
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
    except ReaderError as error:  # NUL and other characters that YAML does not allow
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: character {error.character!r} is not allowed in YAML") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise ConfigError(f"{where}: not valid here: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    if node is not None:
        _check_tags(node)
    return node


def compose_file(path: Path) -> Node | None:
    """`compose_text` of a file. Raises ConfigError for a file that cannot be read or is not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_BYTES} bytes; a config holds only what differs from the defaults"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    return compose_text(text, str(path))


def where(node: Node) -> str:
    """`file:line` of a node, or `command line`, for messages."""
    mark = node.start_mark
    return COMMAND_LINE if mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}"


def _check_tags(node: Node) -> None:
    if node.tag not in PLAIN_TAGS:
        raise ConfigError(
            f"{where(node)}: the tag {node.tag!r} is refused: nothing in a config is imported or executed"
        )
    if isinstance(node, SequenceNode):
        for child in node.value:
            _check_tags(child)
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise ConfigError(f"{where(key)}: a key must be a plain word, not a list or a mapping")
            _check_tags(key)
            _check_tags(value)
