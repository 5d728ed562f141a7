"""How much of the torture suite runs, from which seed: a little in `make faults`, all of it in `make torture`.

    TORTURE=all TORTURE_SEED=7 python -m pytest tests/torture
"""

import os
from collections.abc import Iterator
from random import Random

ALL = os.environ.get("TORTURE") == "all"
SEED = int(os.environ.get("TORTURE_SEED", "0"))


def scaled(few: int, all_of_them: int) -> int:
    """The number for continuous integration, or the one that the table promises."""
    return all_of_them if ALL else few


def random_of(*place: object) -> Random:
    """Random numbers of one test: other ones for every seed and place, the same ones in every process."""
    return Random("/".join(map(str, (SEED, *place))))


def spread(total: int, number: int) -> Iterator[int]:
    """`number` of 1 .. total, evenly, the last one among them; all where there are no more."""
    number = min(number, total)
    yield from (total * (i + 1) // number for i in range(number))
