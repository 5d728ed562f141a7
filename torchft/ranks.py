"""Which process this is: the rank variables that torchrun sets. The one place that reads the environment for them."""

import os

from torchft.errors import UserError


def rank() -> int:
    """This process's number over all nodes, 0 where nothing launched it."""
    return _environment_number("RANK", 0)


def local_rank() -> int:
    """This process's number on its node, which is also its GPU's."""
    return _environment_number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this node."""
    return _environment_number("LOCAL_WORLD_SIZE", 1)


def world_size() -> int:
    """Number of processes over all nodes."""
    return _environment_number("WORLD_SIZE", 1)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {name} is {text!r}, not a number; unset it, or start with `tune run`"
        )
    return int(text)
