"""The DPO cases of scripts/bench_recipe.py: their inputs, the recipe's run, and TRL's on the very same token ids.

    python scripts/bench_dpo.py --dry-run dpo_1b_bf16_1024x4_noac      # both, tiny, on any device; records nothing

dpo_1b_bf16_1024x4_<noac|ac>: 4 pairs a step, each a prompt of 512 tokens and two answers of 512. dpo_1b_bf16_ragged: the
pairs of ../shared/data/preference/dpo_en_demo.json with the real Llama 3 tokenizer, 4 a step in TRL, rows of 8,192 tokens
here. Tokens are counted alike on both sides: those of prompt + chosen and of prompt + rejected, without padding. The recipe
computes fewer, since it holds a prompt once; its own tokens/s, which counts those, is scaled by that ratio over the data.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared" / "data"
PROMPT, ANSWER, PAIRS = 512, 512, 4  # tokens, tokens, pairs a step
ROW = 8192  # tokens of a row of ragged pairs
CASES = ["dpo_1b_bf16_1024x4_noac", "dpo_1b_bf16_1024x4_ac", "dpo_1b_bf16_ragged"]
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def model_config(dry_run: bool) -> dict:
    """config.json of Llama 3.2 1B, or of something of its kind that a CPU steps in a moment."""
    from torchft.models.llama import SIZES

    config = SIZES["Llama-3.2-1B"] | {"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16"}
    return config | (TINY | {"head_dim": 16, "vocab_size": 1280} if dry_run else {})


def write_model(folder: Path, case: str, dry_run: bool) -> None:
    """A model directory without weights: the case's tokenizer beside the config."""
    folder.mkdir(parents=True)
    config = model_config(dry_run) | ({"vocab_size": 128256} if "ragged" in case else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    source = SHARED / "tokenizers/llama3_hf" if "ragged" in case else REPO / "torchft/assets/tiny_llama"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


def write_pairs(file: Path, count: int, shrink: int) -> None:
    """`count` pairs, each exactly PROMPT + ANSWER tokens on either side with the tiny tokenizer, divided by `shrink`.

    Words of one token each, of which the number in each part follows from what the chat template adds.
    """
    from torchft.config import ASSETS
    from torchft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ASSETS / "tiny_llama")
    candidates = "the of at and to for on sold had saw it was that by from paid".split()
    words = [word for word in candidates if len(tokenizer.encode(f" {word}")[0]) == 1]
    # begin, start, user, newline .. end, start, assistant, newline .. end: as tiny_llama's template has them
    head, tail = 4, 4

    def text(tokens: int, seed: int) -> str:
        return "a" + "".join(f" {words[(seed * i * i + 7 * i + seed) % len(words)]}" for i in range(tokens - 1))

    with file.open("w") as out:
        for index in range(count):
            prompt = text(PROMPT // shrink - head - tail, index)
            sides = [text(ANSWER // shrink - 1, 3 * index + side) for side in (1, 2)]
            out.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), (prompt, *sides), strict=True))) + "\n")


def prepare(folder: Path, case: str, steps: int, dry_run: bool) -> dict:
    """Model and data of a case in `folder`, the ids for TRL beside them, and what the recipe needs: options and the ratio."""
    from torchft.config import DataConfig, SourceConfig
    from torchft.data.chat_template import load_template
    from torchft.data.dataset import build_dataset
    from torchft.data.tokenizer import load_tokenizer

    shrink = 16 if dry_run else 1
    write_model(folder / "model", case, dry_run)
    data = SHARED / "preference/dpo_en_demo.json"
    if "ragged" not in case:
        data = folder / "pairs.jsonl"
        write_pairs(data, PAIRS * steps, shrink)
    tokenizer = load_tokenizer(folder / "model")
    limit = ROW if "ragged" in case else PAIRS * (PROMPT // shrink - 1 + 2 * (ANSWER // shrink + 1))
    cfg = DataConfig(train=[SourceConfig(path=str(data))], max_seq_len=limit, max_bad_rows=1.0)
    template = load_template("", tokenizer)
    dataset = build_dataset(cfg.train, cfg, tokenizer, template, kind="pairs", use_cache=False, quiet=True)
    rows = []
    for start, length, (trunk, chosen) in zip(dataset.starts, dataset.lengths, dataset.parts, strict=True):
        ids = dataset.ids[start : start + length].tolist()
        sides = ids[: trunk + chosen], ids[:trunk] + ids[trunk + chosen :]
        # a branch begins with the prompt's last token
        answers = {f"{name}_ids": side[trunk + 1 :] for name, side in zip(("chosen", "rejected"), sides, strict=True)}
        rows.append({"prompt_ids": ids[: trunk + 1]} | answers)
    if "ragged" not in case:
        lengths = {len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")}
        prompts = {len(row["prompt_ids"]) for row in rows}
        assert (lengths, prompts) == ({(PROMPT + ANSWER) // shrink}, {PROMPT // shrink}), (lengths, prompts)
    (folder / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart = int((dataset.lengths + dataset.parts[:, 0]).sum())  # the prompt, or nearly all of it, once more
    options = {"data.train": data, "data.max_seq_len": limit, "data.max_bad_rows": 1.0, "run.global_batch_size": 1}
    options |= {"model.activation_checkpointing": "full" if case.endswith("_ac") else "none", "run.epochs": steps}
    return {"options": options, "ratio": apart / int(dataset.lengths.sum())}


def run_recipe(case: str, steps: int, timeout_s: int, more: list[str], dry_run: bool) -> list[dict]:
    """The recipe's log records, one a step, tokens/s as TRL would count them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepare(folder, case, steps, dry_run)
        fixed = {"model.path": folder / "model", "model.weights": "random", "lora.rank": 16, "run.out": folder / "out"}
        fixed |= {"run.max_steps": steps, "run.sample_rows": 0}
        options = fixed | prepared["options"] | dict(option.split("=", 1) for option in more)
        args = [f"{key}={value}" for key, value in options.items()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "torchft", "run", "dpo_distributed", *args]
        subprocess.run(command, check=True, timeout=timeout_s, cwd=REPO, env=environment)
        records = [json.loads(line) for line in (Path(options["run.out"]) / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if "tokens_per_s" in record]
    return [record | {"tokens_per_s": record["tokens_per_s"] * prepared["ratio"]} for record in records]


def run_trl(case: str, steps: int, timeout_s: int, dry_run: bool) -> dict:
    """scripts/baselines/trl_dpo.py on the same ids; it needs trl, peft and transformers on the path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepare(folder, case, steps, dry_run)
        ac = prepared["options"]["model.activation_checkpointing"]
        args = [f"--folder={folder}", f"--pairs={PAIRS}", f"--steps={steps}", f"--activation_checkpointing={ac}"]
        command = [sys.executable, str(REPO / "scripts/baselines/trl_dpo.py"), *args]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, check=True, timeout=timeout_s, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", choices=CASES, required=True)
    case = parser.parse_args().dry_run
    ours = run_recipe(case, 3, 600, ["model.dtype=float32"], dry_run=True)
    theirs = run_trl(case, 3, 600, dry_run=True)
    print("recipe", [(round(record["loss"], 4), round(record["tokens_per_s"])) for record in ours])
    print("trl   ", theirs)


if __name__ == "__main__":
    main()
