"""What torch.compile needs from the machine beside torch itself, asked first so that the answer is one clear line."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on this machine for code on `device`, with the package that has it; "" if nothing.

    Looks where torch does: $CXX or g++ (clang++ on macOS) for CPU code, torch/_inductor/config.py; for CUDA, Triton and
    the compiler of its launchers, $CC, gcc or clang, triton/runtime/build.py. All of them include Python.h.
    """
    if device.type == "cpu":
        candidates = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    else:
        candidates = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        if importlib.util.find_spec("triton") is None:
            return "triton (pip install triton)"
    if not any(shutil.which(name) for name in candidates):
        package = "g++" if device.type == "cpu" else "gcc"
        return f"a C compiler, {' or '.join(candidates)} (Debian, Ubuntu: apt install {package})"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the header Python.h (Debian, Ubuntu: apt install python3-dev)"
    return ""
