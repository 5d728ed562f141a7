"""Makes the preference set behind `tune run dpo_distributed --config tiny/dpo`, into torchft/assets/tiny_dpo: two JSONL files.

    python scripts/make_tiny_dpo.py              # in a second; the same bytes everywhere

The rows are pure functions of the seed (scripts/tiny_world.py). What a run on them gives stands in the README beside the files.
"""

import argparse
import json
from pathlib import Path

import tiny_world

ASSETS = Path(__file__).resolve().parent.parent / "torchft" / "assets"
ROWS = {"train": 480, "valid": 120}


def write_rows(out: Path, seed: int) -> None:
    """out/train.jsonl and out/valid.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for share, count in ROWS.items():
        rows = (tiny_world.preference_row(share, f"preference/{seed}", index) for index in range(count))
        (out / f"{share}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny_dpo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_rows(args.out, args.seed)


if __name__ == "__main__":
    main()
