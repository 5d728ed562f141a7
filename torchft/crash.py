"""How a run that fails says so: an error of the user's without a traceback, any other with its own.

On several processes, under torchrun (which sets TORCHELASTIC_ERROR_FILE) the failure goes to that file instead of the
screen, for the launcher to print the first failing rank's last; `torchft/launch.py` and torchrun itself both do.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from torchft.errors import ConfigError, UserError
from torchft.ranks import rank

MODELS = (Path(__file__).parent / "models").resolve()
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
GAVE_UP = re.compile(r"time(d )?out", re.IGNORECASE)  # an error of a process that waited for another in vain
NO_MEMORY = (
    "the GPU's memory ran out. Least is lost by model.activation_checkpointing=auto, which recomputes what does not fit; then come "
    "full, model.offload=[activations] beside it, a lower run.micro_batch_size, a lower data.max_seq_len. Below adapters: "
    "model.quantize=nf4, or nf4_int8_head with model.offload=[embeddings] too; where all weights are trained: more processes, "
    "optim.name=adamw_bf16, and in full_finetune_distributed model.offload=[weights]. "
    "Where much was free in pieces, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment helps"
)
LOOKING_SECONDS = 0.5  # between two looks at whether another process has failed
SPEAKING_SECONDS = 2  # for all of them to have looked, and said where they stand, before the first one leaves


def install_excepthook() -> None:
    """From now on, an exception that nobody catches ends the process as `report` says."""
    sys.excepthook = report


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an uncaught exception and leaves: exit code 2 for a wrong config, 130 for Ctrl-C, else 1."""
    text, code = describe(kind, error, trace)
    sys.stdout.flush()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file and write_error_file(error_file, f"{kind.__name__}: {error}", text, code):
        # With --max-restarts the launcher prints only the last attempt's failure.
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            print(text, file=sys.stderr)
        if GAVE_UP.search(text):  # the one that it waited for may tell where it stands, before the launcher ends it
            time.sleep(LOOKING_SECONDS + 2 * SPEAKING_SECONDS)
        # Not SystemExit: shutting down communicators with the other ranks waiting in a collective can hang for minutes.
        sys.stderr.flush()
        os._exit(code)
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(code)


def another_failed() -> bool:
    """Whether another process of this machine has written its error file: the launcher stops the rest because of it."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <attempt>/<local rank>/error.json
    return bool(error_file) and bool(set(Path(error_file).parent.parent.glob("*/error.json")) - {Path(error_file)})


def leave_when_another_fails() -> None:
    """From now on this process ends within three seconds of another one of this machine, wherever it is: most likely in a
    collective that the other will never join. Where it stood goes into its error file, for the case that it was
    this one that the others had been waiting for. A launcher that is gone is SIGTERM, which it can no longer pass on: all its
    processes would train on unseen, beside the run that is started next.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        args = (error_file, os.getppid())
        threading.Thread(target=_watch, args=args, name="watch the others", daemon=True).start()


def _watch(error_file: str, launcher: int) -> None:
    while not another_failed():
        if os.getppid() != launcher:
            return os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LOOKING_SECONDS)
    frame = sys._current_frames().get(threading.main_thread().ident)
    stack = "".join(traceback.format_stack(frame)).rstrip()
    if os.path.exists(error_file):
        return  # it is on its way out itself
    write_error_file(error_file, "another process failed", "it left because another process failed", 1, stack)
    time.sleep(SPEAKING_SECONDS)  # the launcher ends all as soon as one has left
    os._exit(1)


def describe(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> tuple[str, int]:
    """What to print for an exception, and the exit code."""
    if issubclass(kind, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    users = issubclass(kind, UserError) or kind.__name__ == "CannotPin"  # of modules/offload.py, which may not import that
    if users or (kind is ValueError and raised_in_models(trace)):
        return f"error: {error}", 2 if issubclass(kind, ConfigError) else 1
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    return f"{text}\nerror: {NO_MEMORY}" if kind.__name__ == "OutOfMemoryError" else text, 1


def raised_in_models(trace: TracebackType | None) -> bool:
    """Whether an exception comes from torchft/models, which tells users what is wrong with a config.json.

    Those files may not import UserError (D1), and raise plain ValueErrors.
    """
    *_, (frame, _) = traceback.walk_tb(trace) if trace else [(None, 0)]
    return frame is not None and Path(frame.f_code.co_filename).resolve().parent == MODELS


def write_error_file(path: str, message: str, text: str, code: int, stack: str = "") -> bool:
    """Writes torchrun's error file; False if that fails.

    The format is torch.distributed.elastic.multiprocessing.errors.ErrorHandler's; `rank`, `time` and `exit_code` are
    added for torchft/launch.py, because torchrun orders failures by whole seconds. `stack`: where a process stood that left
    because of another.
    """
    now = time.time()
    extra = {"py_callstack": text, "timestamp": str(int(now)), "time": now, "rank": rank(), "exit_code": code, "stack": stack}
    try:
        new = f"{path}.{threading.get_ident()}"  # `report` and `_watch` may come here at once, in threads of one process
        with open(new, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
        os.replace(new, path)  # others look for it at any time
    except OSError:
        return False
    return True
