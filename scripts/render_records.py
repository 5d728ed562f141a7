"""Render docs/records.jsonl, one object per measured run, as the tables of docs/RECORDS.md.

    python scripts/render_records.py            # rewrite docs/RECORDS.md
    python scripts/render_records.py --check    # exit 1 where it is not what the records say (a test does this)
"""

import argparse
import json
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADER = """# Records

What was measured, newest first. One row is one run of a recipe by `scripts/bench_recipe.py`, which writes `docs/records.jsonl`; this page is
rendered from it by `scripts/render_records.py`. A case is named method_model_dtype_sequence x rows_ac|noac|min; the method is
the recipe's own loop with `model.weights=random` and fully supervised rows. tokens/s: median of 10 steps after 5 (min to max).
Memory: peak of allocated GPU memory over the whole run. Baselines ran in the same call on the same GPU. A step that was recorded as a CUDA graph
(torchft/step_graph.py) keeps the temporary part of that for itself from then on, and what the optimizer takes comes beside it: "in a graph" says how
much; rows up to commit 96bff03 do not say it. In the `dpo_` rows tokens count as a padded peer computes them, each pair's prompt
twice: 1.33 times what the recipe computes of the pairs of 1,024, 1.41 times of the ragged ones.

To run a row again: `git checkout COMMIT` and the command.

| case | tokens/s (min to max) | peak GiB | loss first, last | baseline: tokens/s, GiB (ours / theirs) | GPU | versions | date, commit | command |
|---|---|---|---|---|---|---|---|---|
"""
START_HEADER = """
## The first finished step

Seconds from the start of the process to the recipe's line on step 1, by `scripts/bench_start.py`: real files of the model's shapes, in the page
cache; "cold" with empty compile caches, "warm" with those of a cold run. Of several runs the median, and all of them in brackets. Beside it the
seconds at which the imports were done, the model was built, the weights were on the GPU and the data was planned.

| case | cold: seconds (until ...) | warm: seconds (until ...) | baseline: seconds (until ...) | GPU | versions | date, commit | command |
|---|---|---|---|---|---|---|---|
"""


def recomputed(record: dict) -> str:
    """How that was reached, where the record says it."""
    parts = []
    if "recomputed_blocks" in record:
        parts.append(f"{record['recomputed_blocks']} blocks recomputed")
    if record.get("offloaded_gib"):
        parts.append(f"{record['offloaded_gib']} GiB offloaded")
    if record.get("graph_gib"):
        parts.append(f"{record['graph_gib']} GiB in a graph")
    return f" ({', '.join(parts)})" if parts else ""


def row(record: dict) -> str:
    """One table row. Ratios are our tokens/s over the baseline's."""
    low, high = record["tokens_per_s_min_max"]
    baselines = ", ".join(
        f"{name}: {b['tokens_per_s']:,}, {b['peak_alloc_gib']} ({record['tokens_per_s'] / b['tokens_per_s']:.2f}x)"
        for name, b in record["baselines"].items()
    )
    cells = [
        f"`{record['case']}`",
        f"{record['tokens_per_s']:,} ({low:,} to {high:,})",
        f"{record['peak_alloc_gib']:.2f}{recomputed(record)}",
        f"{record['loss_first']:.3f}, {record['loss_last']:.3f}",
        baselines or "none",
        *origin(record),
    ]
    return "| " + " | ".join(cells) + " |\n"


def start_row(record: dict) -> str:
    """One row of the table of first steps."""
    baselines = ", ".join(f"{name}: {start_time(runs)}" for name, runs in record["baselines"].items())
    cells = [f"`{record['case']}`", start_time(record["cold"]), start_time(record["warm"]), baselines or "none", *origin(record)]
    return "| " + " | ".join(cells) + " |\n"


def start_time(runs: dict) -> str:
    """The median run's seconds, all runs' where there are several, and the median run's way there."""
    each = f" [{', '.join(f'{seconds:.1f}' for seconds in runs['all_seconds'])}]" if len(runs["all_seconds"]) > 1 else ""
    way = ", ".join(f"{name} {seconds:.1f}" for name, seconds in list(runs["until"].items())[:-1])
    return f"{runs['seconds']:.1f}{each} ({way})"


def origin(record: dict) -> list[str]:
    """The cells on where, with what, when and how it was measured."""
    versions = " ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = f"{record['num_gpus']} x {record['gpu']}"
    return [machine, versions, f"{record['date']}, {record['commit']}", f"`{record['command']}`"]


def render() -> str:
    """The whole page."""
    lines = (DOCS / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in reversed(lines) if line.strip()]
    steps = "".join(row(record) for record in records if "tokens_per_s" in record)
    starts = "".join(start_row(record) for record in records if "cold" in record)
    return HEADER + steps + (START_HEADER + starts if starts else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    page = DOCS / "RECORDS.md"
    if parser.parse_args().check:
        sys.exit(0 if page.exists() and page.read_text() == render() else "docs/RECORDS.md is stale: run scripts/render_records.py")
    page.write_text(render())


if __name__ == "__main__":
    main()
