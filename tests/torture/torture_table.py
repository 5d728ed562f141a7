"""Which rows the torture suite has, what each must reach, and the table that says what was measured."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One requirement of the issue."""

    title: str
    target: str
    minimum: int  # of what is counted, when all of it runs


@dataclass(frozen=True)
class Part:
    """What one test added to a row."""

    file: str
    passed: bool
    found: list[tuple[int, str, str, dict[str, float]]]  # number, what, note, name -> error
    seconds: float


ROWS = {
    "test_kills_while_saving": Row(
        "Killed while saving a checkpoint", "300 points, whole and in parts, 1 and 2 processes: the same bits as never stopped", 300
    ),
    "test_exports": Row(
        "Killed or out of room while exporting", "adapter, model, merge at any byte and operation: old or new, the next one needs no help", 200
    ),
    "test_full_disks": Row(
        "Disk full, read-only, failing", "20 offsets a saver and file operations: clear error, older ones verify, the same bits after", 150
    ),
    "test_kills_of_recipes": Row(
        "Recipes killed at any moment", "kill -9 at file operations, and 200 at random, dp 1 and 2: bitwise, at most save_every steps lost", 260
    ),
    "test_signals": Row("SIGTERM to one process", "load, first step, step, eval, answers, save: saved at that step, bitwise after", 50),
    "test_damage": Row("Damaged files", "1,000 byte flips and 200 structural damages: 0 loaded as if they were whole", 1_200),
    "test_failing_processes": Row(
        "One process fails under tune run", "raise, MemoryError, SIGKILL, stall at 6 points on 2 and 4: down in time, the cause last", 18
    ),
    "test_changed_runs": Row("Another world size, another config", "2 -> 1 -> 4: each row once an epoch; an edited option refused or said", 100),
    "test_bad_inputs": Row(
        "Fuzzed configs, malformed rows", "5,000 configs, 2,000 rows: one clear error each, 0 imports, no None trained, each row counted once", 7_000
    ),
    "test_hostile": Row("Hostile files", "pickle bombs, templates, names, links, headers: 0 executed, 0 written outside", 150),
    "test_run_twice": Row("Run twice", "100 steps: log and weights bit for bit", 3),
    "test_numerics": Row(
        "Released proportions",
        "14 families, 1,024 tokens: logits 2e-5 and gradients 1e-5 from transformers'; against fp64 at most 1.5 times its errors, bf16 KL 3e-4",
        14,
    ),
    "test_curves": Row("Loss curves", "50 steps against peft and TRL: each within 1e-4, the mean drift 1e-5", 5),
    "test_kernel_shapes": Row("Kernels", "500 random shapes, forward and backward, memory poisoned, inputs kept: fp64, or the twin's bits", 500),
    "test_tokenizers": Row("Tokenizers", "100,000 random strings each: ids as transformers, sentencepiece, tiktoken; decoded back", 100_000),
    "test_secrets": Row("Secrets", "canaries in environment and config are in no file and no output of any recipe", 3),
}
HEAD = """\
# What the torture suite measured

Written by `make torture` (tests/torture, all of it; `make faults` runs a small part of the same tests). Every row was met when this was
written; a failed one keeps the file as it was. Another seed: `TORTURE_SEED=7 make torture`.

"""


def render(parts: list[Part], seed: int, whole: bool) -> tuple[str, bool]:
    """The table as Markdown, and whether every row was there and met."""
    lines, all_met = ["| what | target | measured | seed | met |", "|---|---|---|---|---|"], True
    for file, row in ROWS.items():
        mine = [part for part in parts if part.file == file]
        counted: Counter[str] = Counter()
        worst: dict[str, float] = {}
        found = [entry for part in mine for entry in part.found]
        for number, what, _, errors in found:
            counted[what] += number
            worst |= {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
        notes = list(dict.fromkeys(note for *_, note, _ in found if note)) + [f"{name} {error:.2g}" for name, error in worst.items()]
        enough = not whole or counted.total() >= row.minimum
        met = bool(mine) and all(part.passed for part in mine) and enough
        all_met = all_met and met
        measured = "; ".join([*(f"{number:,} {what}" for what, number in counted.items()), *notes]) or "not run"
        seconds = sum(part.seconds for part in mine)
        lines.append(f"| {row.title} | {row.target} | {measured} ({seconds:.0f} s) | {seed} | {'yes' if met else 'NO'} |")
    return HEAD + "\n".join(lines) + "\n", all_met
