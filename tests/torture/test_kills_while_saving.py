"""Killed at an exact byte or file operation of a run's saves, once or again and again: `resume=auto` ends with the same bits.

PITFALLS K1, K5 and 2b. Each kill is in a forked child; the run then goes on in another one, without help.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from faults import die_at_byte, die_at_operation
from scale import random_of, scaled, spread
from victim import NAMES, WAYS, Victim, only

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Victim:
    return Victim(*request.param, tmp_path)


@pytest.mark.parametrize("victim", WAYS, ids=NAMES, indirect=True)
def test_at_any_byte_of_any_file(victim: Victim, tally: Callable) -> None:
    """The first, the last and random ones, of each kind of file in the checkpoints after steps 3 and 5."""
    random = random_of("bytes", victim.saver, victim.processes)
    each = {1: scaled(1, 12), 2: scaled(1, 2)}[victim.processes]
    sizes = victim.sizes()
    for file in random.sample(sorted(sizes), scaled(2 // victim.processes, len(sizes))):
        size = sizes[file]
        limits = [random.randrange(size), size - 1, 0, 8, *(random.randrange(size) for _ in range(each))][:each]
        writers = range(victim.processes) if "shard" in file else (0,)
        folder, _, name = file.partition("/")
        for limit in limits:
            number = int(name[6:11]) - 1 if "shard" in file and len(writers) > 1 else 0
            victim.kill("run", only(number, die_at_byte, f"{folder}.tmp/{name}", limit))
            victim.finish("run")
    tally(victim.points, "bytes")


@pytest.mark.parametrize("victim", WAYS, ids=NAMES, indirect=True)
def test_at_any_file_operation(victim: Victim, tally: Callable) -> None:
    """Of one process: every one that its run makes below run.out, from the log's first line to the last pruning."""
    for rank, listed in enumerate(victim.operations):
        total = len(listed.read_text().splitlines())
        for number in spread(total, {1: scaled(4, 10_000), 2: scaled(1, 12)}[victim.processes]):
            victim.kill("run", only(rank, die_at_operation, number))
            victim.finish("run")
    tally(victim.points, "file operations")


@pytest.mark.parametrize("victim", WAYS, ids=NAMES, indirect=True)
def test_again_and_again(victim: Victim, tally: Callable) -> None:
    """One run is killed at random operations until it has survived, on top of what the kills before have left."""
    random = random_of("again", victim.saver, victim.processes)
    for _ in range({1: scaled(1, 6), 2: scaled(0, 1)}[victim.processes]):
        for _ in range({1: scaled(2, 10), 2: 4}[victim.processes]):
            rank = random.choice([n for n, listed in enumerate(victim.operations) if listed.stat().st_size])
            total = len(victim.operations[rank].read_text().splitlines())
            victim.kill("run", only(rank, die_at_operation, random.randint(1, total)))
        victim.finish("run")
    tally(victim.points, "repeated")
