"""`tune download` from a hub that a few lines replace: what is fetched, where to, every way to fail (S5, S6)."""

import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from torchft import cli
from torchft.download import check_no_escape, download, target_directory, wanted_files
from torchft.errors import UserError

FILES = [
    *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"),
    *("model.safetensors.index.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "README.md"),
]
NOT_FETCHED = [
    *("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "model.gguf", "tf_model.h5"),
    *("consolidated.safetensors", "modeling_custom.py", "flax_model.msgpack", "onnx/model.onnx", ".gitattributes"),
]


@pytest.fixture
def hub(monkeypatch):
    """A hub with one model; `calls` holds what was asked of it, `error` is raised instead of an answer."""
    hub = SimpleNamespace(files=[*FILES, *NOT_FETCHED], calls=[], error=None)

    def model_info(self, repo_id, *, revision, token):
        hub.calls.append(("info", repo_id, revision, token))
        if hub.error:
            raise hub.error
        return SimpleNamespace(sha="abc123", siblings=[SimpleNamespace(rfilename=name) for name in hub.files])

    def snapshot_download(repo_id, *, revision, local_dir, allow_patterns, token):
        hub.calls.append(("fetch", repo_id, revision, token))
        for name in allow_patterns:
            (Path(local_dir) / name).parent.mkdir(exist_ok=True)
            (Path(local_dir) / name).write_text(name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def test_it_fetches_what_training_needs_into_org_and_name(hub, tmp_path):
    target = download("Qwen/Qwen3-0.6B", str(tmp_path))
    assert target == tmp_path / "Qwen" / "Qwen3-0.6B"
    assert {str(path.relative_to(target)) for path in target.rglob("*")} == set(FILES)
    for folder in (target, target.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # what is fetched is the commit that was listed and checked
    assert [call[:3] for call in hub.calls] == [
        ("info", "Qwen/Qwen3-0.6B", "main"),
        ("fetch", "Qwen/Qwen3-0.6B", "abc123"),
    ]


def test_the_token_comes_from_the_environment_alone(hub, tmp_path, monkeypatch, capsys):
    download("a/b", str(tmp_path))
    assert [call[3] for call in hub.calls] == [False, False]
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    hub.calls.clear()
    cli.main(["download", "a/b", "--output-dir", str(tmp_path)])
    assert [call[3] for call in hub.calls] == ["hf_canary", "hf_canary"]
    with pytest.raises(SystemExit):
        cli.main(["download", "a/b", "--hf-token", "hf_canary"])
    printed = capsys.readouterr()
    assert "set HF_TOKEN in the environment" in printed.err
    assert "hf_canary" not in printed.out + printed.err


def test_more_can_be_left_out_and_names_are_not_patterns(hub, tmp_path):
    hub.files = ["model.safetensors", "a[1].json", "a1.json", "notes.md"]
    names = wanted_files(hub.files, tmp_path, ignore=("*.md",))
    assert names == ["model.safetensors", "a[1].json", "a1.json"]


HOSTILE = [
    *(
        "../evil",
        "a/../../evil",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\\..\\..\\evil",
        "C:evil",
        "c:\\evil",
        "\\\\host\\share",
    ),
    *(
        "a/\x00b",
        "a\nb",
        "\x1b[31m",
        "~/../../x/../..",
        "link/evil",
        "link",
        "deep/link2/evil",
        "\u202egnp.exe",
        "a/..",
    ),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_before_anything_is_written(name, hub, tmp_path):
    target = tmp_path / "models" / "a" / "b"
    (target / "deep").mkdir(parents=True)
    (target / "link").symlink_to(tmp_path)
    (target / "deep" / "link2").symlink_to("../../../..")
    before = sorted(tmp_path.rglob("*"))
    hub.files = [*FILES, name]
    with pytest.raises(UserError, match="would be written outside"):
        download("a/b", str(tmp_path / "models"))
    assert sorted(tmp_path.rglob("*")) == before
    assert [call[0] for call in hub.calls] == ["info"]


def test_a_link_that_leaves_the_directory_is_found(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "inside").symlink_to("config.json")
    check_no_escape(tmp_path / "m")
    (tmp_path / "m" / "outside").symlink_to("../secret")
    with pytest.raises(UserError, match="is a link that leaves"):
        check_no_escape(tmp_path / "m")


@pytest.mark.parametrize(
    "repo_id", ["gpt2", "a/b/c", "../b", "a/..", "a/.b", "/a", "a/", "-a/b", "a b/c", "a/b\n", "ä/b", ""]
)
def test_ids_that_are_not_org_and_name(repo_id):
    with pytest.raises(UserError, match="is not a model's id"):
        target_directory(repo_id, ".")


def test_a_repository_without_safetensors_is_refused_with_the_reason(hub, tmp_path):
    hub.files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(UserError, match=r"has no safetensors \(its weights: pytorch_model.bin\).*could run code"):
        download("a/b", str(tmp_path))
    assert not list(tmp_path.iterdir())


def response(status: int) -> errors.Response:
    library = sys.modules[errors.Response.__module__.split(".")[0]]  # httpx, or what huggingface_hub has instead
    return errors.Response(status, request=library.Request("GET", "https://huggingface.co/a/b"))


@pytest.mark.parametrize(
    "error, words",
    [
        (
            lambda: errors.GatedRepoError("403", response=response(403)),
            "is gated: accept its licence on https://hugging",
        ),
        (
            lambda: errors.RepositoryNotFoundError("404", response=response(404)),
            "does not exist on the hub, or is private",
        ),
        (lambda: errors.RevisionNotFoundError("404", response=response(404)), "has no revision 'main'"),
        (
            lambda: errors.HfHubHTTPError("500 Server Error\nmore", response=response(500)),
            "the hub refused a/b: 500 Server",
        ),
        (lambda: errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (lambda: errors.HFValidationError("bad id"), "is not a model's id: bad id"),
        (lambda: errors.HTTPError("[Errno -2] Name or service not known"), "check the network"),
        (lambda: errors.LocalEntryNotFoundError("not cached"), "was not fetched: not cached"),
        (
            lambda: OSError(28, "No space left on device", "model.safetensors"),
            "model.safetensors: No space left on device",
        ),
    ],
)
def test_every_failure_says_what_to_do(error, words, hub, tmp_path):
    hub.error = error()
    with pytest.raises(UserError, match="a/b") as caught:
        download("a/b", str(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_command_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:  # conftest.py sets HF_HUB_OFFLINE
        cli.main(["download", "a/b", "--output-dir", str(tmp_path)])
    assert left.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
