"""What every test runs under: offline, a cache of its own, one torch thread per worker, GPU tests only with a GPU."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# Before torch and the Hugging Face libraries are imported, which read these once.
_cache = tempfile.TemporaryDirectory(prefix="torchft-test-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms; on Hopper the usual size
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "HF_TOKEN"):
    os.environ.pop(_name, None)
# Tests start processes that import torchft too: they get this tree, and not one that is installed somewhere else.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels run in its interpreter
    # The first backward decides for how many devices autograd has threads, with which a process cannot fork. After a
    # torch.compile, a build for CUDA would count one that is not there.
    torch.zeros((), requires_grad=True).backward()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Other workers' tests find the memory that this one's has left in the allocator's cache."""
    if torch.cuda.is_available() and item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


@pytest.fixture
def whole_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests of tens of GiB: those of all workers one after the other."""
    with open(tmp_path_factory.getbasetemp().parent / "whole_gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()  # before others begin, which is sooner than the hook above


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of this tree."""
    return REPO


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files whose tests fork: see hide_cuda."""
    from tiny_training import hide_cuda

    hide_cuda(monkeypatch)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, templates and data beside the project (../shared/data); the project does without them."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data is not at {path}")
    return path
