"""Files made to attack whoever opens them: nothing in them is executed, nothing is written outside, and each ends in one clear error.

Pickle bombs in the place of every file, templates that reach for Python or never end, names and links that lead out, headers that
promise too much. Under a canary: an audit hook that sees every process start, import, and file written outside. PITFALLS S1 to S5.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults import WRITING
from scale import random_of, scaled
from test_hf_checkpoint import HOSTILE_NAMES, Bomb
from test_sandbox import BOMBS, PAYLOADS
from tiny_training import TinyRun, hide_cuda

from torchft.adapter import add_adapter, attach_adapter, init_adapter, load_adapter, save_adapter
from torchft.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from torchft.config import DataConfig, LoraOptions
from torchft.crash import raised_in_models
from torchft.data.chat_template import load_template
from torchft.data.dataset import build_datasets
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.hf_checkpoint import INDEX
from torchft.models import build_model, read_config
from torchft.weights import load_weights

STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.mkdir", "socket.connect", "ctypes.dlopen")
seen: list[str] = []
watched: list[Path] = []  # while there is one: the only directory that may be written below


def _canary(event: str, arguments: tuple) -> None:
    if not watched:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        path = str(arguments[0])
        if not path.startswith((str(watched[0]), "/dev/null", os.environ["XDG_CACHE_HOME"])):
            seen.append(f"writes {path}")
    elif event in STARTS and not (event == "os.mkdir" and str(arguments[0]).startswith(os.environ["XDG_CACHE_HOME"])):
        seen.append(f"{event} {arguments[:1]}")
    elif event == "pickle.find_class":
        seen.append(f"unpickles {arguments}")


sys.addaudithook(_canary)


@pytest.fixture
def safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], str]]:
    """safe(action) -> the error that it ended in, without a traceback for the user; the canary has seen nothing."""
    hide_cuda(monkeypatch)

    def run(action: Callable[[], object]) -> str:
        seen.clear()
        watched.append(tmp_path)
        try:
            action()
        except UserError as error:
            return str(error)
        except ValueError as error:  # torchft.models knows no UserError
            assert raised_in_models(error.__traceback__), error
            return str(error)
        finally:
            watched.clear()
            assert not seen
        return ""

    yield run


def test_the_canary_sings(tmp_path: Path, safe: Callable) -> None:
    """What it must see, it sees."""
    for action in (
        lambda: pickle.loads(pickle.dumps(Bomb(tmp_path / "executed"))),
        lambda: subprocess.run(["true"], check=True),
        lambda: open("/tmp/torture_canary", "w").close(),  # noqa: SIM115
    ):
        with pytest.raises(AssertionError):
            safe(action)
    os.remove("/tmp/torture_canary")


def use_model(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    load_template("", tokenizer)
    with torch.device("meta"):
        model = build_model(read_config(folder))
    load_weights(model, folder, device="cpu", dtype=torch.float32)


def use_adapter(base: Path, folder: Path) -> None:
    with torch.device("meta"):
        model = build_model(read_config(base))
    _, rows = attach_adapter(model, folder)
    load_weights(model, base, device="cpu", dtype=torch.float32, new_rows=rows)
    load_adapter(model, folder)


def use_data(base: Path, file: Path) -> None:
    tokenizer = load_tokenizer(base)
    from torchft.config import SourceConfig

    build_datasets(DataConfig(train=[SourceConfig(path=str(file))]), tokenizer, load_template("", tokenizer), 0)


def replaced_by_pickles(folder: Path, canary: Path) -> Iterator[Path]:
    """The folder with one file after the other replaced by a bomb in each protocol; put back afterwards."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for protocol in (0, 2, 5):
            path.write_bytes(pickle.dumps(Bomb(canary), protocol))
            yield path
        path.write_bytes(content)


def test_pickle_bombs_in_the_place_of_every_file(
    small_model: Path, chat_data: Path, tmp_path: Path, safe: Callable, tally: Callable
) -> None:
    """Of a model directory, an adapter, a checkpoint, and data under each ending; beside them too, under names that others load."""
    base, canary, bombs = tmp_path / "base", tmp_path / "executed", 0
    shutil.copytree(small_model, base)
    with torch.device("meta"):
        model = build_model(read_config(base))
    spec = add_adapter(model, LoraOptions(rank=2), range(0))[0]
    load_weights(model, base, device="cpu", dtype=torch.float32)
    init_adapter(model, LoraOptions(rank=2), range(0), torch.Generator())
    save_adapter(model, spec, tmp_path / "adapter", base_path=str(base))
    run, out = TinyRun().train(0, 1), tmp_path / "out"
    checkpoint = save_checkpoint(out, 1, params=run.params, optimizer=run.optimizer, state={}, config={}, keep_last=1)

    def use_checkpoint() -> None:
        load_checkpoint(checkpoint, params=run.params, optimizer=run.optimizer, unchanged={})

    uses = {base: lambda: use_model(base), tmp_path / "adapter": lambda: use_adapter(base, tmp_path / "adapter"), checkpoint: use_checkpoint}
    for folder, use in uses.items():
        for path in replaced_by_pickles(folder, canary):
            assert safe(use) or path.name == "README.md", path
            bombs += 1
    assert find_checkpoint(out, "auto", {}, lambda text: None) == checkpoint
    for name in ("pytorch_model.bin", "training_args.bin", "rng_state.pth", "optimizer.pt", "scheduler.pt", "x.ckpt", "modeling_x.py"):
        (base / name).write_bytes(pickle.dumps(Bomb(canary)))
        assert safe(lambda: use_model(base)) == "", name
        bombs += 1
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.pkl", "a.pt", "a.bin", "a"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(canary)))
        assert safe(lambda: use_data(base, tmp_path / name)), name  # noqa: B023
        bombs += 1
    assert not canary.exists()
    tally(bombs, "pickle bombs")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_templates_of_a_model_directory(place: str, small_model: Path, chat_data: Path, tmp_path: Path, safe: Callable, tally: Callable) -> None:
    """Payloads and bombs where a downloaded model has its template: no process, no file, refused while the data is read."""
    base, random = tmp_path / "base", random_of("templates", place)
    shutil.copytree(small_model, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    sources = random.sample(PAYLOADS, scaled(6, len(PAYLOADS))) + random.sample(BOMBS, scaled(1, len(BOMBS)))
    for source in sources:
        if place == "chat_template.jinja":
            (base / place).write_text(source)
        else:
            (base / place).write_text(json.dumps(config | {"chat_template": source}))
        began = time.thread_time()
        assert safe(lambda: use_data(base, chat_data)), source
        assert time.thread_time() - began < 10, source
    tally(len(sources), "templates")


def test_names_and_links_that_lead_out(
    small_model: Path, tmp_path: Path, safe: Callable, tally: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an index, as links of every file, and as a checkpoint's own files."""
    base, outside, tried = tmp_path / "base", tmp_path / "outside.safetensors", 0
    shutil.copytree(small_model, base)
    os.rename(base / "model.safetensors", outside)
    for name in [*HOSTILE_NAMES, "....//outside.safetensors", "%2e%2e/outside.safetensors", "base/../../outside.safetensors", "\u2024./outside.safetensors"]:
        (base / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert safe(lambda: use_model(base)), name
        tried += 1
    (base / INDEX).unlink()
    shutil.copy(outside, base / "model.safetensors")
    monkeypatch.setenv("CANARY_TOKEN", "canary-in-the-environment")
    for path in sorted(base.iterdir()):
        os.rename(path, tmp_path / "moved")
        for target in ("../moved", path.name, "/proc/self/environ", "/etc/passwd", "/dev/zero"):
            if (path.name, target) == ("config.json", "/dev/zero"):
                continue  # torchft.models reads whatever bears that name
            path.symlink_to(target)
            said = safe(lambda: use_model(base))
            assert said or path.suffix != ".safetensors", (path, target)  # a text file may be a link, or count as missing
            assert "canary" not in said and "root:" not in said
            path.unlink()
            tried += 1
        os.rename(tmp_path / "moved", path)
    use_model(base)
    tally(tried, "names and links")


def test_headers_that_promise_too_much(small_model: Path, tmp_path: Path, safe: Callable, tally: Callable) -> None:
    """100,000 tensors, lengths of 2^63, a header of one brace after another: refused within seconds, without the memory they ask for."""
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    file = base / "model.safetensors"
    many = {f"model.layers.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(scaled(20_000, 100_000))}
    huge = {"model.norm.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    deep = b'{"a":' * 50_000
    headers = [json.dumps(many).encode(), json.dumps(huge).encode(), deep, b"[" * 10**6, b" " * 10**6]
    contents = [len(header).to_bytes(8, "little") + header for header in headers]
    contents += [size.to_bytes(8, "little") + b"{}" for size in (2**63, 2**40, 10**8, 100_000_001, 3)]
    for content in contents:
        file.write_bytes(content)
        began = time.thread_time()
        assert safe(lambda: use_model(base)), content[:40]
        assert time.thread_time() - began < 10, content[:40]
    tally(len(contents), "headers")
