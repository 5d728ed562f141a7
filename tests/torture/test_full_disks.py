"""A disk that is full, read-only or failing at any offset: a clear error, older checkpoints verify, and with room again the same bits.

PITFALLS K7 and 2b. EFBIG by RLIMIT_FSIZE at an exact byte; ENOSPC, EROFS, EIO and EDQUOT raised by a file operation.
"""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import fail_at_operation, no_room_at_byte
from scale import random_of, scaled, spread
from victim import NAMES, WAYS, Victim, only

CODES = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Victim:
    return Victim(*request.param, tmp_path)


@pytest.mark.parametrize("victim", WAYS, ids=NAMES, indirect=True)
def test_no_room_behind_any_byte(victim: Victim, tally: Callable) -> None:
    """20 offsets, over the files of the checkpoint after step 5; the one after step 3 stays."""
    random = random_of("no room", victim.saver, victim.processes)
    files = [(file, size) for file, size in victim.sizes().items() if file.startswith("step_000005")]
    for number in range(scaled({1: 2, 2: 1}[victim.processes], {1: 20, 2: 6}[victim.processes])):
        file, size = files[number % len(files)]
        writer = int(file[18:23]) - 1 if "shard" in file and victim.processes > 1 else 0
        limit = random.randrange(size)
        said = victim.refuse("run", only(writer, no_room_at_byte, file.replace("/", ".tmp/"), limit))
        assert "refused: could not write" in said and "step_000005" in said and "continue with run.resume=auto" in said
        assert "File too large" in said or "error 27" in said
        victim.finish("run")
    tally(victim.points, "offsets")


@pytest.mark.parametrize("victim", WAYS if scaled(0, 1) else WAYS[::3], ids=str, indirect=True)
def test_a_file_operation_that_fails(victim: Victim, tally: Callable) -> None:
    """Whatever the first thing is that no longer works, no traceback: the error names the place, and the run can go on."""
    for rank, listed in enumerate(victim.operations):
        total = len(listed.read_text().splitlines())
        for turn, number in enumerate(spread(total, {1: scaled(3, 80), 2: scaled(1, 8)}[victim.processes])):
            said = victim.refuse("run", only(rank, fail_at_operation, number, CODES[turn % len(CODES)]))
            assert "Traceback" not in said or "UserError" in said or "Connection" in said, said
            victim.finish("run")
    tally(victim.points, "failing operations")
