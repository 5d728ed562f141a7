"""`tune download ORG/NAME`: a model directory from the Hugging Face hub into `<output-dir>/<org>/<name>`.

Only what training and loading need: safetensors (never pickled weights), configs, tokenizer, templates, licence.
Every name that the hub sends is checked to stay inside the directory before a byte is fetched. The token comes from
HF_TOKEN alone: other users of a machine can read command lines.
"""

import fnmatch
import glob
import os
import re
from pathlib import Path, PurePosixPath

from torchft.errors import UserError

# Pickled weights can run code when they are opened; the others are copies of the same weights for other software.
NOT_WANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite"]
NOT_WANTED += ["original/*", "onnx/*", "consolidated*.safetensors", "*.py", "*.png", "*.jpg", ".gitattributes"]
FORMAT_HINT = (
    "torchft reads safetensors only, pickled weights could run code; look for a copy of the model with .safetensors"
)


def download(repo_id: str, output_dir: str = ".", revision: str = "main", ignore: tuple[str, ...] = ()) -> Path:
    """Fetches a model and returns its directory; files that are already there in full are not fetched again.

    Raises UserError for a repository that is missing, gated, offline or without safetensors, and for hostile file
    names.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    target = target_directory(repo_id, output_dir)
    token = os.environ.get("HF_TOKEN") or False  # False: send none, not even one that another tool has stored
    try:
        info = HfApi().model_info(repo_id, revision=revision, token=token)
        names = wanted_files([sibling.rfilename for sibling in info.siblings or []], target, ignore)
        make_private(target, Path(output_dir))
        patterns = [glob.escape(name) for name in names]
        # The commit's hash, not the branch: what is fetched is what was listed and checked.
        snapshot_download(repo_id, revision=info.sha, local_dir=target, allow_patterns=patterns, token=token)
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(explain(error, repo_id, revision)) from None
    check_no_escape(target)
    return target


def target_directory(repo_id: str, output_dir: str) -> Path:
    """`<output-dir>/<org>/<name>`. Raises UserError for an id that is not two plain names."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
        raise UserError(f"{repo_id!r} is not a model's id; write ORG/NAME, such as Qwen/Qwen3-0.6B")
    org, name = repo_id.split("/")
    return Path(output_dir).expanduser() / org / name


def wanted_files(names: list[str], target: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """The files to fetch of those in a repository. Raises UserError for a hostile name, or if no weights remain."""
    for name in names:
        check_inside(name, target)
    unwanted = [*NOT_WANTED, *ignore]
    chosen = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted)]
    if not any(name.endswith(".safetensors") for name in chosen):
        weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
        raise UserError(
            f"the repository has no safetensors (its weights: {', '.join(weights[:5]) or 'none'}); {FORMAT_HINT}"
        )
    return chosen


def check_inside(name: str, target: Path) -> None:
    """Raises UserError for a remote file name that leaves `target`, by its text or through a link on the disk."""
    path = PurePosixPath(name)
    bad = (
        not name.isprintable()
        or "\\" in name
        or ":" in name
        or path.is_absolute()
        or ".." in path.parts
        or name in ("", ".")
    )
    if bad or not (target / path).resolve().is_relative_to(target.resolve()):
        raise UserError(
            f"the repository names a file {name!r}, which would be written outside {target}; nothing was fetched"
        )


def check_no_escape(target: Path) -> None:
    """Raises UserError if a link below `target` points outside it."""
    for path in target.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(target.resolve()):
            raise UserError(f"{path} is a link that leaves {target}; remove it")


def make_private(target: Path, output_dir: Path) -> None:
    """Makes `<org>` and `<name>`, readable by their owner only: gated weights are licensed to one person."""
    output_dir.expanduser().mkdir(parents=True, exist_ok=True)
    for folder in (target.parent, target):
        folder.mkdir(mode=0o700, exist_ok=True)


def explain(error: Exception, repo_id: str, revision: str) -> str:
    """What a failed download means and what to do; the messages of huggingface_hub are long and name Python calls."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{repo_id}"
    first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its licence on {page}, then set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist on the hub, or is private: check the spelling, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; see {page}/tree/main"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} was not fetched: HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a model's id: {first_line}"
    if isinstance(error, HfHubHTTPError):
        return f"the hub refused {repo_id}: {first_line}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{repo_id} was not fetched: {error.filename}: {error.strerror}"
    return f"{repo_id} was not fetched: {first_line}; check the network and run the same command again, it continues"
