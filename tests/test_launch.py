"""`tune run` on one process and on two: whose traceback is shown, exit codes, torchrun's options (D2, PITFALLS D2)."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from torchft import crash, launch
from torchft.config import ModelConfig
from torchft.distributed import require_single_process
from torchft.errors import ConfigError, UserError
from torchft.models.llama import config_from_hf
from torchft.names import RECIPES

RECIPE = '''
"""A throw-away recipe: on rank `fail_on` a shape is wrong, the other ranks wait for it in a collective."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from torchft.config import RunConfig
from torchft.ranks import rank, world_size
from torchft.modules.feed_forward import FeedForward
from torchft.parse import parse


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    fail_on: int = -1


def main(cfg):
    if world_size() > 1:
        dist.init_process_group("gloo")
    if rank() == cfg.fail_on:
        FeedForward(8, 16, bias=False)(torch.ones(2, 3, 9))
    total = torch.ones(1)
    if world_size() > 1:
        dist.all_reduce(total)
        dist.barrier()
        dist.destroy_process_group()
    print(f"rank {rank()} sums {total.item():.0f}, seed {cfg.run.seed}\\n", end="", flush=True)  # one write: ranks share the pipe


if __name__ == "__main__":
    main(parse(Config))
'''


QUICK = '''
"""A recipe without torch: rank `fail_on` ends as `how` says, the others wait to be stopped."""

import os
import time
from dataclasses import dataclass, field

from torchft.config import RunConfig
from torchft.ranks import rank
from torchft.errors import UserError
from torchft.parse import parse


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    fail_on: int = 0
    how: str = "wait"


def main(cfg):
    if rank() == cfg.fail_on and cfg.how == "user":
        raise UserError("rows.jsonl:3: no answer; add one")
    if rank() == cfg.fail_on and cfg.how == "kill":
        os.kill(os.getpid(), 9)
    if rank() == cfg.fail_on and cfg.how == "exit":
        os._exit(7)
    if cfg.how == "print":
        print(f"seed {cfg.run.seed}")
        return
    print("waiting", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main(parse(Config))
'''


JOINED = '''
"""A recipe that fails after its process has joined the others, of which there are none."""

from dataclasses import dataclass, field

from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.distributed import join_processes
from torchft.errors import ConfigError
from torchft.parse import parse


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    how: str = "user"


def main(cfg):
    join_processes(ModelConfig(), OptimConfig(), cfg.run)
    raise ConfigError("model.shard=2 divides nothing") if cfg.how == "user" else RuntimeError("shapes differ")


if __name__ == "__main__":
    main(parse(Config))
'''


STOPPED = '''
"""A recipe that waits for a signal; rank `fail_on` raises as soon as all are ready for one."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from torchft.checkpoint import StopSignal
from torchft.config import RunConfig
from torchft.crash import leave_when_another_fails
from torchft.errors import UserError
from torchft.parse import parse
from torchft.ranks import rank, world_size


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    fail_on: int = -1


def main(cfg):
    stop = StopSignal()
    leave_when_another_fails()
    Path(cfg.run.out, f"ready_{rank()}").touch()
    while len(list(Path(cfg.run.out).glob("ready_*"))) < world_size():
        time.sleep(0.05)
    if rank() == cfg.fail_on:
        raise UserError("rows.jsonl:3: no answer; add one")
    patience = time.monotonic() + 20
    while not stop.exit_code:
        time.sleep(0.05)
        if time.monotonic() > patience:
            sys.exit("no signal came")
    Path(cfg.run.out, f"saved_{rank()}").touch()
    sys.exit(stop.exit_code)


if __name__ == "__main__":
    main(parse(Config))
'''


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quick") / "quick.py"
    path.write_text(QUICK, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "my_copy.py"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def tune(*argv: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchft", *map(str, argv)], capture_output=True, text=True, timeout=120, **options
    )


def frames(stderr: str) -> list[str]:
    """The files of the last traceback that was printed, outermost first."""
    last = stderr[stderr.rindex("Traceback (most recent call last)") :]
    return [line.split('"')[1] for line in last.splitlines() if line.startswith('  File "')]


def check_own_traceback(run: subprocess.CompletedProcess[str], recipe: Path) -> None:
    """The traceback holds the user's file first, then our module, then torch, and is the last thing on the screen."""
    files = frames(run.stderr)
    assert files[:2] == [str(recipe), str(recipe)]
    assert any(file.endswith("modules/feed_forward.py") for file in files)
    assert files[-1].endswith("torch/nn/modules/linear.py")
    assert not any("launch" in file or "elastic" in file or "cli.py" in file for file in files)
    assert run.stderr.rstrip().splitlines()[-1].startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert run.returncode == 1


def test_one_process_becomes_the_recipe(quick):
    run = tune("run", quick, "run.seed=5", "how=print")
    assert (run.stdout, run.stderr, run.returncode) == ("seed 5\n", "", 0)


@pytest.mark.parametrize("start", ["tune run", "python"])
def test_a_wrong_shape_on_one_process(recipe, start):
    begin = ["-m", "torchft", "run"] if start == "tune run" else []
    run = subprocess.run([sys.executable, *begin, recipe, "fail_on=0"], capture_output=True, text=True)
    check_own_traceback(run, recipe)
    assert run.stderr.count("Traceback") == 1


def test_two_processes_and_torchruns_options(recipe, capfd):
    assert launch.run_workers(["--nproc-per-node", "2", "--monitor-interval=0.05", str(recipe), "seed=3"]) == 0
    printed = capfd.readouterr()
    assert sorted(printed.out.split("\n")) == ["", "rank 0 sums 2, seed 3", "rank 1 sums 2, seed 3"]
    assert printed.err == ""


def test_a_wrong_shape_on_the_second_of_two_processes(recipe):
    run = tune("run", "--nproc_per_node", "2", recipe, "fail_on=1")
    check_own_traceback(run, recipe)
    assert run.stderr.count("Traceback") == 1  # rank 0's broken collective and the launcher's own are not shown
    assert "\nrank 1 failed first" in run.stderr


@pytest.mark.parametrize(
    "how, code, last",
    [
        ("user", 1, "error: rows.jsonl:3: no answer; add one"),
        ("kill", 137, "it was ended by SIGKILL, which is often the kernel's answer to memory running out"),
        ("exit", 7, "it left with exit code 7; what it printed stands above"),
    ],
)
def test_other_ends_of_the_first_of_two_processes(quick, how, code, last, capfd):
    assert launch.run_workers(["--nproc_per_node", "2", str(quick), "fail_on=0", f"how={how}"]) == code
    stderr = capfd.readouterr().err
    assert stderr.rstrip().splitlines()[-1] == last
    assert "Traceback" not in stderr


def test_a_wrong_option_is_printed_once_for_all_ranks(quick, capfd):
    assert launch.run_workers(["--nproc_per_node", "2", str(quick), "fial_on=1"]) == 2
    assert capfd.readouterr().err == "error: command line: fial_on is not an option; did you mean fail_on?\n"


def test_a_wrong_option_and_a_users_mistake_on_one_process(quick):
    run = tune("run", quick, "seed=x")
    assert run.stderr == "error: command line: run.seed expects a whole number, got the text 'x'\n"
    assert run.returncode == 2
    run = tune("run", quick, "how=user")
    assert (run.stderr, run.returncode) == ("error: rows.jsonl:3: no answer; add one\n", 1)


def test_a_failure_after_joining_is_printed_on_one_process(tmp_path):
    """torch.distributed puts an excepthook of its own over ours, which would swallow what ours prints."""
    file = tmp_path / "joined.py"
    file.write_text(JOINED, encoding="utf-8")
    run = tune("run", file)
    assert (run.stderr, run.returncode) == ("error: model.shard=2 divides nothing\n", 2)
    run = tune("run", file, "how=trace")
    assert frames(run.stderr) == [str(file), str(file)]
    assert run.stderr.endswith("\nRuntimeError: shapes differ\n") and "[rank0]" not in run.stderr
    assert run.returncode == 1


def test_ctrl_c_leaves_without_a_traceback(quick):
    argv = [sys.executable, "-m", "torchft", "run", str(quick)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


@contextmanager
def two_that_stop(folder: Path) -> Iterator[subprocess.Popen]:
    """The launcher of two processes that save when they are told to stop, as soon as both are there."""
    (folder / "stopped.py").write_text(STOPPED, encoding="utf-8")
    argv = [sys.executable, "-m", "torchft", "run", "--nproc_per_node", "2", str(folder / "stopped.py"), f"out={folder}"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        while len(list(folder.glob("ready_*"))) < 2 and process.poll() is None:
            time.sleep(0.05)
        yield process


def test_ctrl_c_on_two_processes_is_answered_in_one_line(tmp_path):
    """Not by each of them, nor by torchrun's log."""
    with two_that_stop(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "\nSIGINT: saving after this step\nstopped by SIGINT\n"
    assert process.returncode == 130


def test_processes_whose_launcher_is_killed_save_and_leave(tmp_path):
    with two_that_stop(tmp_path) as process:
        process.kill()
        said = process.stderr.read()  # to its end: the processes hold it open
    assert said.startswith("\nSIGTERM: saving after this step")
    assert sorted(path.name for path in tmp_path.glob("saved_*")) == ["saved_0", "saved_1"]


def test_a_process_that_is_stopped_because_another_failed_promises_nothing(tmp_path, capfd):
    (tmp_path / "stopped.py").write_text(STOPPED, encoding="utf-8")
    assert launch.run_workers(["--nproc_per_node", "2", str(tmp_path / "stopped.py"), f"out={tmp_path}", "fail_on=1"]) == 1
    assert capfd.readouterr().err == "error: rows.jsonl:3: no answer; add one\n"


# ---------------------------------------------------------------------------------------------------- without processes


def test_options_in_the_wrong_place_and_missing_recipes():
    for argv in (["x.py", "--nproc_per_node", "2"], ["x.py", "--nnodes=2"]):
        with pytest.raises(UserError, match="stands before the recipe"):
            launch.run(argv)
    with pytest.raises(UserError, match="there is no recipe file x.py"):
        launch.run(["x.py"])
    without = ([], ["--nproc_per_node", "2"], ["--config", "tiny/lora"], ["--nproc_per_node", "2", "--config=tiny/lora", "optim.lr=1"])
    for argv in without:  # what stands alone after --config is not taken for a recipe's name
        where = " before --config" if any(argument.startswith("--config") for argument in argv) else ""
        with pytest.raises(UserError, match=f"no recipe is given{where}; tune run .*; `tune ls` lists the recipes"):
            launch.run(argv)
    with pytest.raises(UserError, match="argument --nproc-per-node/--nproc_per_node: expected one argument; tune run "):
        launch.run(["--nproc_per_node"])


@pytest.mark.parametrize("config", ["tiny/lora", "mine.yaml"])
def test_a_config_without_its_option_is_told_before_the_recipe_starts(config, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail("it starts"))
    for arguments in ([config], ["seed=1", config], ["--config", "tiny/qlora", config]):
        with pytest.raises(ConfigError, match=f"^'{config}' is not understood; write --config {config}$"):
            launch.run(["lora_single_device", *arguments])
        with pytest.raises(ConfigError, match=f"write --config {config}$"):
            launch.parse_torchrun_options(["--nproc_per_node=2", "lora_distributed", *arguments])


@pytest.mark.parametrize("arguments", [["--config", "tiny/lora"], ["--config=mine.yaml", "run.out=a.yaml"], ["tiny/lora", "-h"]])
def test_a_config_behind_its_option_is_left_to_the_recipe(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    launch.check_config(RECIPES / "lora_single_device.py", arguments)
    launch.check_config(Path("mine.py"), ["c.yaml"])  # a recipe of somebody's own may take it


@pytest.mark.parametrize(
    "recipe, config, named",
    [
        ("lora_single_device", "tiny/full", "full_finetune_distributed"),
        ("full_finetune_distributed", "tiny/lora", "lora_single_device"),
        ("kto_distributed", "old.yaml", "dpo_distributed"),
        ("dpo_distributed", "old.yaml", ""),
        ("lora_single_device", "tiny/lora", ""),
        ("lora_distributed", "tiny/lora", ""),
        ("lora_single_device", "llama3_1/70B_lora", ""),
        ("lora_distributed", "none.yaml", ""),
        ("lora_distributed", "bytes.yaml", ""),
    ],
)
def test_a_config_whose_header_runs_another_recipe(recipe, config, named, tmp_path, monkeypatch, capsys):
    """One line of warning; the recipes that train adapters are one, and torchtune's names are ours."""
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("# mine\n#   tune run --nproc_per_node 2 lora_dpo_distributed --config llama3_1/8B_lora_dpo\n")
    Path("none.yaml").write_text("model: {}\n")
    Path("bytes.yaml").write_bytes(b"# \xff\n")  # for the recipe to refuse
    monkeypatch.setattr(os, "execv", lambda *command: sys.exit(0))
    warning = f"WARNING: {config} is for {named}, as its header says; {recipe} runs with its settings\n" if named else ""
    for arguments in (["--config", config, "seed=1"], [f"--config={config}"]):
        with pytest.raises(SystemExit):
            launch.run([recipe, *arguments])
        assert capsys.readouterr().err == warning
    launch.parse_torchrun_options(["--nproc_per_node=2", recipe, "--config", config])
    assert capsys.readouterr().err == warning


def test_torchrun_options_are_torchruns(recipe):
    argv = ["--nnodes", "2", "--rdzv-endpoint", "host:1", "--node_rank=1", str(recipe), "a=1"]
    args = launch.parse_torchrun_options(argv)
    assert (args.nnodes, args.rdzv_endpoint, args.node_rank) == ("2", "host:1", 1)
    assert not args.standalone
    assert (args.training_script, args.training_script_args) == (str(recipe), ["a=1"])
    assert launch.parse_torchrun_options(["--nproc_per_node=2", str(recipe)]).standalone
    assert not launch.parse_torchrun_options(["--master-port=3", str(recipe)]).standalone


def test_the_command_as_it_can_be_typed(tmp_path, monkeypatch):
    """`make demo` activates no environment: the name alone would not be found."""
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(bin / "python"))
    monkeypatch.chdir(tmp_path)
    assert launch.tune_command() == ".venv/bin/python -m torchft"  # nothing is installed there
    (bin / "tune").touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    assert launch.tune_command() == ".venv/bin/tune"
    monkeypatch.chdir(bin)
    assert launch.tune_command() == "./tune"
    monkeypatch.chdir("/usr")
    assert launch.tune_command() == str(bin / "tune")
    monkeypatch.setenv("PATH", str(bin))
    assert launch.tune_command() == "tune"
    (tmp_path / "tune").touch(mode=0o755)  # another environment's
    monkeypatch.setenv("PATH", f"{tmp_path}:{bin}")
    assert launch.tune_command() == str(bin / "tune")


def test_impossible_torchrun_values_are_user_errors(recipe):
    wrong = ("--nproc_per_node=many", "--nproc_per_node=0", "--nproc_per_node=-1", "--nnodes=0", "--nnodes=a", "--max-restarts=-1")
    for option in wrong:
        with pytest.raises(UserError, match="torchrun refuses these options"):
            launch.launch_config(launch.parse_torchrun_options([option, str(recipe)]))


def test_a_port_that_is_taken_is_a_user_error(quick):
    with socket.create_server(("127.0.0.1", 0)) as server:
        argv = ["--nproc_per_node=1", f"--master-port={server.getsockname()[1]}", str(quick)]
        with pytest.raises(UserError, match="could not find each other: .*; check --rdzv-endpoint"):
            launch.run_workers(argv)


def test_a_node_says_that_it_waits_and_for_what(quick, capsys):
    argv = ["--nproc_per_node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-conf=join_timeout=1"]
    with pytest.raises(UserError, match="each other: the launchers of --nnodes=2 nodes were not there in time; check --rdzv-"):
        launch.run_workers([*argv, str(quick)])
    assert "waiting at localhost:0 for the launchers of --nnodes=2 nodes" in capsys.readouterr().err


def test_a_host_that_is_not_there_is_named_without_traces_of_torch():
    argv = ["--nproc_per_node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a.invalid:1"]
    run = tune("run", *argv, "--rdzv-conf=timeout=1,read_timeout=1", "lora_distributed", "--config", "tiny/lora")
    waiting, error = run.stderr.splitlines()
    assert run.returncode == 1 and waiting.startswith("waiting at a.invalid:1") and "connect to (a.invalid, 1); check" in error


class Ended:
    """What torchrun tells of a process: torch.distributed.elastic.multiprocessing.errors.ProcessFailure."""

    def __init__(self, exitcode: int, timestamp: int = 100):
        self.exitcode, self.timestamp = exitcode, timestamp


def write_error(folder: Path, rank: int, time: float, text: str, attempt: int = 0, code: int = 1) -> None:
    path = folder / "run" / f"attempt_{attempt}" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    extra = {"py_callstack": text, "timestamp": str(int(time)), "time": time, "rank": rank, "exit_code": code}
    path.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def test_the_first_failure_is_the_earliest_within_a_second(tmp_path, capsys):
    write_error(tmp_path, 0, 100.9, "second")
    write_error(tmp_path, 3, 100.2, "first", code=5)
    code = launch.print_failure({0: Ended(1), 1: Ended(-signal.SIGTERM), 3: Ended(-signal.SIGTERM)}, str(tmp_path))
    assert code == 5
    assert capsys.readouterr().err == "\nrank 3 failed first (after it: rank 0):\nfirst\n"


def test_a_rank_that_left_when_it_was_told_to_was_not_first(tmp_path, capsys):
    """The launcher's time of it is the whole second, before the failure within it."""
    write_error(tmp_path, 1, 100.9, "error: rows.jsonl:3: no answer; add one")
    assert launch.print_failure({0: Ended(128 + signal.SIGTERM), 1: Ended(1)}, str(tmp_path)) == 1
    assert capsys.readouterr().err == "error: rows.jsonl:3: no answer; add one\n"
    (tmp_path / "alone").mkdir()
    both = {0: Ended(128 + signal.SIGTERM), 1: Ended(128 + signal.SIGTERM)}  # all saved and stopped: nobody failed
    assert launch.print_failure(both, str(tmp_path / "alone")) == 143
    interrupted = {0: Ended(128 + signal.SIGINT), 1: Ended(-signal.SIGTERM)}  # Ctrl-C reached a process and not the launcher
    assert launch.print_failure(interrupted, str(tmp_path / "alone")) == 130
    assert capsys.readouterr().err == "stopped by SIGTERM\nstopped by SIGINT\n"
    assert launch.print_failure(both | {2: Ended(7)}, str(tmp_path / "alone")) == 7
    assert capsys.readouterr().err.startswith("\nrank 2 failed first")


def test_two_threads_of_a_process_write_its_error_file_at_once(tmp_path):
    """The main one, whose collective failed, and the one that watches the others: what is not written is printed."""
    written = []

    def write():
        written.extend(crash.write_error_file(str(tmp_path / "error.json"), "m", "text", 1) for _ in range(300))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [True] * 600 and list(tmp_path.iterdir()) == [tmp_path / "error.json"]


def test_a_killed_rank_comes_before_those_that_noticed(tmp_path, capsys):
    write_error(tmp_path, 0, 100.7, "connection closed by peer")
    assert launch.print_failure({0: Ended(1), 2: Ended(-signal.SIGKILL)}, str(tmp_path)) == 137
    assert capsys.readouterr().err.startswith("\nrank 2 failed first (after it: rank 0):\nit was ended by SIGKILL")


def test_a_lost_connection_is_never_the_cause(tmp_path, capsys):
    """The launcher notices a killed process when the others have long written why they left: whole seconds later on a busy machine."""
    write_error(tmp_path, 0, 100.7, "RuntimeError: [gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:41")
    write_error(tmp_path, 1, 100.8, "RuntimeError: Connection reset by peer")
    failures = {0: Ended(1), 1: Ended(1), 2: Ended(-signal.SIGKILL, 103), 3: Ended(-signal.SIGTERM, 100)}
    assert launch.print_failure(failures, str(tmp_path)) == 137
    assert capsys.readouterr().err.startswith("\nrank 2 failed first (after it: rank 0, 1):\nit was ended by SIGKILL")
    assert launch.print_failure({0: Ended(1), 1: Ended(1), 2: Ended(-signal.SIGKILL, 800)}, str(tmp_path)) == 1  # long after
    assert capsys.readouterr().err.startswith("\nrank 0 failed first")


def test_only_the_last_attempt_counts_and_broken_files_do_not(tmp_path, capsys):
    write_error(tmp_path, 0, 100.1, "old attempt")
    old = tmp_path / "run" / "attempt_0"
    os.utime(old, (1, 1))
    write_error(tmp_path, 1, 200.1, "new attempt", attempt=1)
    write_error(tmp_path, 2, 200.0, "cut", attempt=1)
    (tmp_path / "run" / "attempt_1" / "2" / "error.json").write_text('{"message": {"ext')
    assert launch.print_failure({1: Ended(1, 201)}, str(tmp_path)) == 1
    assert "new attempt" in capsys.readouterr().err


def test_an_error_file_has_torchruns_format(tmp_path, monkeypatch):
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    monkeypatch.setenv("RANK", "4")
    file = tmp_path / "error.json"
    assert crash.write_error_file(str(file), "ValueError: x", "Traceback ...", 1)
    failure = errors.ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "ValueError: x"
    assert failure.message["extraInfo"]["rank"] == 4 and failure.timestamp > 1e9
    assert not crash.write_error_file(str(tmp_path / "no" / "error.json"), "", "", 1)


def test_describe():
    from torch import OutOfMemoryError

    def caught(error: BaseException) -> tuple[str, int]:
        try:
            raise error
        except BaseException as raised:  # noqa: BLE001  the hook gets every kind
            return crash.describe(type(raised), raised, raised.__traceback__)

    assert caught(UserError("a: b")) == ("error: a: b", 1)
    assert caught(ConfigError("a: b")) == ("error: a: b", 2)
    assert caught(KeyboardInterrupt()) == ("interrupted", 130)
    try:
        config_from_hf({"architectures": ["LlamaForCausalLM"], "new_knob": 1})
    except ValueError as error:
        assert crash.describe(type(error), error, error.__traceback__) == (f"error: {error}", 1)
    text, code = caught(ValueError("a"))
    assert text.startswith("Traceback") and text.endswith("ValueError: a") and code == 1
    text, code = caught(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "Tried to allocate 2 GiB\nerror: the GPU's memory ran out" in text and code == 1
    assert "model.activation_checkpointing=auto" in text and "run.micro_batch_size" in text


def test_require_single_process(monkeypatch):
    require_single_process("lora_single_device", ModelConfig())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="lora_single_device runs on one process, not on 2: .* run lora_distributed"):
        require_single_process("lora_single_device", ModelConfig())
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two', not a number"):
        require_single_process("lora_single_device", ModelConfig())
