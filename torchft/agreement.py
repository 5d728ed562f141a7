"""Whether two configs mean the same run: one now and one when a checkpoint was saved, or those of the processes of a run.

One launcher gives all its processes one command line, but each node has a launcher, and files, of its own: an option that
differs there would go unnoticed, and the processes would train different models without an error.
"""

from typing import Any

from torchft.distributed import from_all
from torchft.errors import UserError
from torchft.names import MOVED_KEYS
from torchft.redact import redact

# Where things lie may differ from node to node: what is read is compared by itself (distributed.check_agreement), and what
# stands in run.out where that matters.
PLACES = ("model.path", "data.train", "data.valid", "data.chat_template", "run.out")


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, where two configs differ; None for a key that one lacks.

    An option that did not exist then and is empty now is no difference, nor is one that was moved with its value.
    """
    old, new = ({MOVED_KEYS.get(key, (key,))[0]: value for key, value in _flatten(config)} for config in (then, now))
    new = {key: value for key, value in new.items() if key in old or value not in ([], {}, "")}
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flatten(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """{"run": {"out": "a"}} as [("run.out", "a")]; lists are values."""
    if not isinstance(value, dict):
        return [(key, value)]
    return [pair for name, item in value.items() for pair in _flatten(item, f"{key}.{name}" if key else name)]


def check_same_options(config: dict[str, Any]) -> None:
    """Raises UserError, on every process, where one was started with other options than process 0; PLACES may differ."""
    first, *others = from_all(redact(config))
    for number, other in enumerate(others, start=1):
        changed = {key: pair for key, pair in differences(first, other).items() if key not in PLACES}
        if changed:
            lines = "".join(f"\n  {key}: {mine!r} there, {theirs!r} on process 0" for key, (theirs, mine) in changed.items())
            raise UserError(
                f"process {number} was started with other options than process 0:{lines}\ngive all nodes the same command and "
                "the same config file"
            )
