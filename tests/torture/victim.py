"""One way of saving under attack: its run that was never stopped, lives that are cut short, and the end that must be the same."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from faults import list_operations
from tiny_loop import SAVERS, assert_same_end, in_children, result, train

from torchft.errors import UserError
from torchft.run_dir import checkpoints, verify_checkpoint

WAYS = [(saver, processes) for saver, counts in SAVERS.items() for processes in counts]
NAMES = [f"{saver} on {processes}" for saver, processes in WAYS]
REFUSED = 3  # exit code of a life that ended with a UserError, which is what a user reads without a traceback


class Victim:
    """One way of saving, its run that was never stopped, and what that run did to its files."""

    def __init__(self, saver: str, processes: int, folder: Path) -> None:
        self.saver, self.processes, self.folder, self.points = saver, processes, folder, 0
        (folder / "straight").mkdir()
        self.operations = [folder / f"operations_{rank}" for rank in range(processes)]
        codes = self.go("straight", lambda out, rank: list_operations(out, self.operations[rank]))
        assert codes == [0] * processes, self.said
        self.expected = result(folder / "straight/out", folder / "straight/state.safetensors")
        assert [line["step"] for line in self.expected[0]] == [1, 2, 3, 4, 5, 5]

    def go(self, name: str, arm: Callable[[Path, int], None]) -> list[int]:
        """One life of the run `name`, after arm(out, rank) in each process; exit codes."""
        home = self.folder / name

        def live(rank: int) -> None:
            arm(home / "out", rank)
            try:
                train(home / "out", self.saver, home / "state.safetensors")
            except UserError as error:
                print(f"refused: {error}", flush=True)
                os._exit(REFUSED)

        shutil.rmtree(home / "life", ignore_errors=True)
        codes, self.said = in_children(live, self.processes, home / "life")
        return codes

    def kill(self, name: str, arm: Callable[[Path, int], None]) -> None:
        """A life that is cut short, unless it ends before the fault."""
        codes = self.go(name, arm)
        if any(codes):
            assert {-signal.SIGKILL, -signal.SIGXFSZ} & set(codes), self.said
            self.points += 1
        self.verify(name)

    def refuse(self, name: str, arm: Callable[[Path, int], None]) -> str:
        """A life that a disk ends with a clear error, or that does without what failed; what was said."""
        codes = self.go(name, arm)
        if any(codes):
            assert REFUSED in codes, self.said
            self.points += 1
        self.verify(name)
        return self.said

    def verify(self, name: str) -> None:
        """Every checkpoint that has its name is whole."""
        for path in checkpoints(self.folder / name / "out").values():
            verify_checkpoint(path)

    def finish(self, name: str) -> None:
        """The run goes on to its end, which is that of the run that was never stopped; nothing of the faults is left."""
        codes = self.go(name, lambda out, rank: None)
        assert codes == [0] * self.processes, self.said
        home = self.folder / name
        assert_same_end(result(home / "out", home / "state.safetensors"), self.expected)
        left = {path.name for path in (home / "out").iterdir() if not path.name.startswith("earlier_")}
        assert left == {"config.yaml", "log.jsonl", "step_000003", "step_000005"}
        shutil.rmtree(home)

    def sizes(self) -> dict[str, int]:
        """Every file of the checkpoints that are left, and its size."""
        out = self.folder / "straight/out"
        return {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.glob("step_*/*"))}


def only(number: int, arm: Callable[..., None], *details: object) -> Callable[[Path, int], None]:
    """Arms process `number` alone."""
    return lambda out, rank: arm(out, *details) if rank == number else None
