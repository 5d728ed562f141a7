"""`%` and str.format for templates, with the runs kept of what goes through a bare %s or {}."""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from torchft.data.limits import MAX_FIELD, LimitExceeded
from torchft.data.tracked import cut, derived, join, to_text

_FIELD = re.compile(
    r"%(?:\((?P<key>[^)]*)\))?(?P<spec>[#0\- +]*(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d+))?)[hlL]?(?P<kind>.)",
    re.DOTALL,
)


def percent(template: str, values: Any) -> str:
    """`template % values`, with the runs of what goes through a bare %s."""
    parts: list[str] = []
    done = 0
    queue = list(values) if isinstance(values, tuple) else [values]
    for match in _FIELD.finditer(template):
        parts += [cut(template, done, match.start()), _field(match, values, queue)]
        done = match.end()
    if queue and not isinstance(values, Mapping):
        raise TypeError("not all arguments converted during string formatting")
    return join([*parts, cut(template, done, len(template))])


def _field(match: re.Match[str], values: Any, queue: list[Any]) -> str:
    """One %-field's text; a field without a name takes its value from the queue."""
    if match["kind"] == "%":
        return "%"
    check_field(match["spec"])
    if match["key"] is None and not queue:
        raise TypeError("not enough arguments for format string")
    value = queue.pop(0) if match["key"] is None else values[match["key"]]
    if match["kind"] == "s" and not match["spec"]:
        return to_text(value)
    return derived(f"%{match['spec']}{match['kind']}" % (value,), value)


def check_field(spec: str) -> None:
    """Refuses the widths and precisions that would make a bomb of a formatted number.

    Raises:
        LimitExceeded: a field of more than MAX_FIELD characters, or of a width computed at run time.
    """
    if (
        "*" in spec
        or "{" in spec
        or any(len(digits) > 9 or int(digits) > MAX_FIELD for digits in re.findall(r"\d+", spec))
    ):
        raise LimitExceeded(f"the format {spec!r} asks for a field wider than {MAX_FIELD:,}")


def braces(formatter: Formatter, template: str, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """`template.format(*args, **kwargs)`; `formatter` looks fields up (the sandbox's refuses unsafe attributes)."""
    parts: list[str] = []
    automatic = 0
    for literal, name, spec, conversion in Formatter().parse(template):
        parts.append(derived(literal, template))  # plain, unless the row itself is the format
        if name is None:
            continue
        if name == "" or name[0] in ".[":
            name = f"{automatic}{name}"
            automatic += 1
        value, _ = formatter.get_field(name, args, kwargs)
        check_field(spec or "")
        if conversion == "s":
            value = to_text(value)
        elif conversion:
            value = derived(formatter.convert_field(value, conversion), value)
        parts.append(derived(format(value, spec), value) if spec else to_text(value))
    return join(parts)
