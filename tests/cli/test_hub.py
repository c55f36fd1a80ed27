"""lorank push and pull, through huggingface_hub itself, against a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from typer.testing import CliRunner

import lorank
from lorank import AdapterError, AdapterWarning
from lorank.adapter_files import choose
from lorank.card import is_untouched, model_card
from lorank.cli import app
from lorank.examining import examine

from .. import models
from ..formats.test_torchtune import as_torchtune
from ..hub_server import READER, STRANGER, WRITER, Hub, connected, environment
from .running import refused, run, run_json
from .test_inspect import adapter_in, broken

# huggingface_hub uploads large files in a way that its own HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PEFT = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="session")
def model() -> Any:
    torch.manual_seed(0)
    return models.llama()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    adapter_in(tmp_path / "adapter", models.llama(), ["q_proj", "v_proj"])
    return tmp_path / "adapter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a hub that the library talks to, as the user `me`; the working directory is an empty one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Hub().running() as found, connected(found, tmp_path / "home"):
        yield found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_the_hub(adapter: Path) -> dict[str, bytes]:
    """Return the files of an adapter as a repository has them."""
    return {name: (adapter / name).read_bytes() for name in PEFT}


def pickled(adapter: Path) -> dict[str, bytes]:
    """Return the files of an adapter as PEFT wrote them before it wrote safetensors."""
    torch.save(load_file(adapter / PEFT[1]), adapter.parent / "adapter_model.bin")
    return {
        PEFT[0]: (adapter / PEFT[0]).read_bytes(),
        "adapter_model.bin": (adapter.parent / "adapter_model.bin").read_bytes(),
    }


def nothing_left(*folders: Path) -> None:
    """No partial download lies around, neither where the adapter was to go nor in the cache."""
    for folder in folders:
        assert not [path for path in folder.rglob("*") if "incomplete" in path.name or "partial" in path.name]
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("big", [100, 10**9])
def test_what_was_pushed_comes_back_to_the_byte(big: int, hub: Hub, adapter: Path) -> None:
    hub.big = big
    words = ["push", adapter, "me/first", "--yes", "--message", "A first adapter"]
    found = run(*words)
    assert found.stdout == f"{hub.url}/me/first\n"
    there = hub.repositories["me/first"]
    card = model_card(adapter, "me/first").encode()
    assert there.files() == {
        ".gitattributes": there.files()[".gitattributes"],
        **on_the_hub(adapter),
        "README.md": card,
    }
    assert there.messages == ["made by a test", "A first adapter"] and not there.private
    assert (len(hub.large) == 1) == (big == 100)

    found = run("pull", "me/first")
    assert found.stdout == "first: lora, 896 parameters in 4 layers, 7.8 kB\n"
    assert contents(Path("first")) == {**on_the_hub(adapter), "README.md": card}
    run(*words)  # nothing has changed
    assert len(there.messages) == 2


def test_functions_do_what_the_commands_do(hub: Hub, adapter: Path, model: Any, tmp_path: Path) -> None:
    ids = models.ids(2, 6)
    assert lorank.push(adapter, "me/first", private=True) == f"{hub.url}/me/first"
    place = lorank.pull("me/first", tmp_path / "there" / "below")
    assert place == tmp_path / "there" / "below" and hub.repositories["me/first"].private
    lorank.load(model, adapter, "local")
    wanted = model(ids).logits
    lorank.load(model, place, "pulled")
    assert torch.equal(model(ids).logits, wanted)
    lorank.remove(model, "local")
    lorank.remove(model, "pulled")
    assert lorank.push(adapter, "own-name") == f"{hub.url}/me/own-name"


def test_json_and_dry_run(hub: Hub, adapter: Path) -> None:
    found = run("push", adapter, "me/first", "--dry-run", "--license", "mit")
    assert found.stdout.splitlines()[:2] == ["adapter_config.json  731 bytes", "adapter_model.safetensors  7.1 kB"]
    assert model_card(adapter, "me/first", license="mit") in found.stdout and "license: mit" in found.stdout
    dry = run_json("push", adapter, "me/first", "--dry-run")
    assert dry["url"] is None and dry["card"] == model_card(adapter, "me/first")
    assert not hub.requests and not hub.repositories and contents(adapter) == on_the_hub(adapter)
    pushed = run_json("push", adapter, "me/first", "--yes", "--private")
    assert (
        pushed["url"] == f"{hub.url}/me/first" and pushed["private"] and list(pushed["files"]) == [*PEFT, "README.md"]
    )
    pulled = run_json("pull", "me/first")
    assert pulled["output"] == "first" and pulled["parameters"] == 896 and pulled["methods"] == ["lora"]
    assert pulled["commit"] == hub.repositories["me/first"].branches["main"]


def test_a_question_is_asked_before_anything_is_sent(hub: Hub, adapter: Path) -> None:
    for typed in ("n\n", ""):
        found = CliRunner().invoke(app, ["push", str(adapter), "me/first"], input=typed)
        assert "nothing was uploaded" in str(found.exception) and found.stdout == ""
        assert "adapter_model.safetensors  7.1 kB" in found.stderr and not hub.requests
    found = run("push", adapter, "me/first", typed="y\n")
    assert found.stdout == f"{hub.url}/me/first\n" and "me/first" in hub.repositories


def test_a_run_brings_its_plot_and_nothing_that_is_private(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder / "adapter")
    (folder / "recipe.yaml").write_text("model: m\ndata: d.jsonl\n")
    (folder / "loss.png").write_bytes(b"\x89PNG")
    for name in ("run.json", "metrics.jsonl", "checkpoint.safetensors"):
        (folder / name).write_text("{}")
    (folder / "adapter" / "notes.txt").write_text("mine")
    run("push", folder, "me/run", "--yes")
    assert set(hub.repositories["me/run"].files()) == {".gitattributes", *PEFT, "README.md", "loss.png"}
    run("pull", "me/run")
    assert set(contents(Path("run"))) == {*PEFT, "README.md"}


def test_private_is_private(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("push", adapter, "me/secret", "--yes", "--private")
    assert hub.repositories["me/secret"].private
    for token in (STRANGER, None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        refused("no such repository|does not know who asks", "pull", "me/secret")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    public = hub.holding("me/public", {})
    refused("is there already, and public", "push", adapter, "me/public", "--yes", "--private")
    assert len(public.commits) == 1


def test_a_branch_is_made_and_the_main_one_left(hub: Hub, adapter: Path) -> None:
    there = hub.holding("me/first", {"other.txt": b"stays"})
    found = run("push", adapter, "me/first", "--yes", "--revision", "v2")
    assert found.stdout == f"{hub.url}/me/first/tree/v2\n"
    assert there.files() == {"other.txt": b"stays"} and set(there.files("v2")) == {"other.txt", *PEFT, "README.md"}
    refused("it holds no adapter, only other.txt", "pull", "me/first")
    refused("it has no such revision", "pull", "me/first", "--revision", "v3")
    run("pull", "me/first", "--revision", "v2", "--output", "by-branch")
    run("pull", "me/first", "--revision", there.branches["v2"], "--output", "by-commit")
    assert contents(Path("by-branch")) == contents(Path("by-commit")) != {}
    run("push", adapter, "me/first", "--yes", "--revision", "v2", "--card", "new", "--license", "mit")
    assert lorank.push(adapter, "me/first", revision="a/b") == f"{hub.url}/me/first/tree/a%2Fb"
    assert b"license: mit" in there.files("v2")["README.md"]


@pytest.mark.parametrize(
    ("token", "repo", "reason"),
    [
        (None, "me/first", "does not know who asks, and no token is set"),
        ("hf_wrong", "me/first", "does not accept the token: Invalid credentials"),
        (READER, "me/first", "the token does not permit this: You don't have the rights"),
        (WRITER, "other/first", "the token does not permit this: You don't have the rights"),
        (READER, "me/there", "the token does not permit this: You don't have the required permissions"),
        (None, "me/there", "does not know who asks, and no token is set"),
    ],
)
def test_who_may_not_is_told_why(
    token: str | None, repo: str, reason: str, hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = hub.holding("me/there", {})
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    refused(f"cannot push to {repo}: .*{reason}", "push", adapter, repo, "--yes")
    assert len(there.commits) == 1 and list(hub.repositories) == ["me/there"]


def test_what_is_not_there_or_not_for_everyone(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("cannot pull me/nothing: .* has no such repository", "pull", "me/nothing")
    monkeypatch.delenv("HF_TOKEN")
    refused("does not know who asks, and no token is set", "pull", "me/nothing")
    hub.holding("other/gated", on_the_hub(adapter), gated=True)
    refused(f"its owner decides who may download it: ask at {hub.url}; no token is set", "pull", "other/gated")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    refused(f"its owner decides who may download it: ask at {hub.url}$", "pull", "other/gated")
    for name in ("a/b/c", "../evil", "me/..", ""):
        refused(f"cannot pull {name}: ", "pull", name)
        refused(f"cannot push {adapter}: ", "push", adapter, name, "--dry-run")


def test_a_hub_that_cannot_be_reached(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.holding("me/first", on_the_hub(adapter))
    hub.disturb = lambda request: "503"
    refused("answers 503: the hub is being repaired", "pull", "me/first")
    hub.disturb = lambda request: "cut"
    refused(f"no connection to {hub.url}", "pull", "me/first")
    refused(f"no connection to {hub.url}", "push", adapter, "me/first", "--yes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    refused("no connection to http://127.0.0.1:9", "pull", "me/first")
    refused("no connection to http://127.0.0.1:9", "push", adapter, "me/first", "--yes")
    nothing_left(tmp_path / "home")


def test_offline_what_is_in_the_cache_is_found(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.holding("me/first", on_the_hub(adapter) | {"below/x.txt": b""})
    hub.holding("me/second", {f"below/{name}": content for name, content in on_the_hub(adapter).items()})
    run("pull", "me/first", "--output", "online")
    run("pull", "me/second", "--path", "below", "--output", "online-2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    run("pull", "me/first", "--output", "offline")
    run("pull", "me/second", "--path", "below", "--output", "offline-2")
    assert contents(Path("offline")) == contents(Path("offline-2")) == on_the_hub(adapter)
    refused("offline .HF_HUB_OFFLINE is set., and this is not in its cache", "pull", "me/third")
    refused("offline", "pull", "me/first", "--revision", "v2")
    refused("offline", "push", adapter, "me/first", "--yes")
    assert not hub.requests


def test_an_upload_that_breaks_off_changes_nothing(hub: Hub, adapter: Path) -> None:
    there = hub.holding("me/first", {})
    hub.disturb = lambda request: "cut" if "/commit/" in request else None
    refused("no connection to", "push", adapter, "me/first", "--yes")
    assert there.files() == {} and any("/commit/" in request for request in hub.requests)
    hub.disturb = lambda request: None
    run("push", adapter, "me/first", "--yes")
    assert set(there.files()) == {*PEFT, "README.md"}


def test_an_upload_is_tried_again_by_the_library(hub: Hub, adapter: Path) -> None:
    hub.disturb = lambda request: "cut" if hub.requests.count(request) == 1 and request.startswith("PUT") else None
    run("push", adapter, "me/first", "--yes")
    assert hub.repositories["me/first"].files()[PEFT[1]] == (adapter / PEFT[1]).read_bytes()
    assert sum(request.startswith("PUT") for request in hub.requests) == 2


def test_a_download_that_breaks_off_is_taken_up_again(hub: Hub, adapter: Path) -> None:
    hub.holding("me/first", on_the_hub(adapter))
    hub.disturb = lambda request: (
        "break" if request.startswith("GET /large") and hub.requests.count(request) == 1 else None
    )
    run("pull", "me/first")
    assert sum(request.startswith("GET /large") for request in hub.requests) == 2
    assert contents(Path("first")) == on_the_hub(adapter)


@pytest.mark.parametrize("how", ["shorten", "cut"])
def test_a_download_that_fails_leaves_nothing(how: str, hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.holding("me/first", on_the_hub(adapter))
    hub.disturb = lambda request: how if request.startswith("GET /large") else None
    refused("Consistency check failed|no connection to", "pull", "me/first")
    nothing_left(tmp_path / "home")
    hub.disturb = lambda request: None
    run("pull", "me/first")
    assert contents(Path("first")) == on_the_hub(adapter)


def test_a_commit_in_the_middle_of_a_download_is_noticed(hub: Hub, adapter: Path) -> None:
    there = hub.holding("me/first", on_the_hub(adapter))

    def commit(request: str) -> None:
        if request.startswith("GET /me/first/resolve"):
            there.commit("main", on_the_hub(adapter) | {"new.txt": b""}, "meanwhile")

    hub.disturb = commit
    refused("somebody changed it in the meantime", "pull", "me/first")
    assert not list(Path.cwd().iterdir())
    hub.disturb = lambda request: None
    run("pull", "me/first")


def test_a_pickle_comes_only_when_that_is_allowed(hub: Hub, adapter: Path) -> None:
    files = pickled(adapter)
    hub.holding("me/old", files)
    refused(r"as a pickle \(adapter_model.bin\).*--allow-pickle", "pull", "me/old")
    assert not any("resolve" in request for request in hub.requests)
    run("pull", "me/old", "--allow-pickle")
    assert contents(Path("old")) == files
    hub.holding("me/both", files | on_the_hub(adapter))
    run("pull", "me/both", "--allow-pickle")
    assert contents(Path("both")) == on_the_hub(adapter)
    (adapter / PEFT[1]).unlink()
    (adapter / "adapter_model.bin").write_bytes(files["adapter_model.bin"])
    refused("is a pickle, which may run anything", "push", adapter, "me/new", "--yes")
    assert "me/new" not in hub.repositories


def test_names_that_lead_out_of_the_folder_are_passed_over(hub: Hub, adapter: Path) -> None:
    evil = {
        "../evil": b"x",
        "/tmp/evil": b"x",
        "a/../../evil": b"x",
        "..\\evil": b"x",
        "C:evil": b"x",
        "adapter\0": b"x",
    }
    hub.holding("me/first", on_the_hub(adapter) | evil)
    run("pull", "me/first")
    assert contents(Path("first")) == on_the_hub(adapter) and [path.name for path in Path.cwd().iterdir()] == ["first"]
    for name in ("../evil", "..", "/tmp/evil"):
        refused("it has no file or folder", "pull", "me/first", "--path", name, "--output", "other")
    assert not any("evil" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "it is empty"),
        ({"README.md": b""}, "it holds no adapter, only README.md"),
        ({"config.json": b"{}", "model.safetensors": b""}, "it is a whole model and no adapter: give it as a base"),
        ({PEFT[0]: b"{}"}, "it has adapter_config.json, but no tensors"),
        ({PEFT[1]: b""}, "it has adapter_model.safetensors, but no adapter_config.json that says what it is"),
        (
            {f"step-{i}/{name}": b"" for i in (1, 2) for name in PEFT},
            "it has adapters in step-1, step-2: .*--path step-2",
        ),
        ({"a.safetensors": b"", "b.safetensors": b""}, "say which is the adapter, with --path a.safetensors"),
        ({PEFT[0]: b"[]", PEFT[1]: b"no"}, "cannot read me/x"),
    ],
)
def test_what_is_no_adapter_is_told_as_what_it_is(files: dict[str, bytes], reason: str, hub: Hub) -> None:
    hub.holding("me/x", files)
    refused(f"cannot pull me/x: {reason}|{reason}", "pull", "me/x")
    assert not list(Path.cwd().iterdir())
    assert not any("/resolve/" in request for request in hub.requests) or files.get(PEFT[1]) == b"no"


def test_a_path_names_a_folder_or_a_file(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    whole = {f"checkpoint-5/{name}": content for name, content in on_the_hub(adapter).items()}
    hub.holding("me/many", whole | {"checkpoint-5/optimizer.pt": b"", "config.json": b"{}"})
    run("pull", "me/many", "--path", "checkpoint-5", "--output", "five")
    run("pull", "me/many", "--path", "checkpoint-5/adapter_model.safetensors", "--output", "by-file")
    assert contents(Path("five")) == contents(Path("by-file")) == on_the_hub(adapter)
    refused("nearest: checkpoint-5", "pull", "me/many", "--path", "checkpoint-6")
    refused("config.json is no adapter", "pull", "me/many", "--path", "config.json")
    refused(
        r"a pickle \(checkpoint-5/optimizer.pt|a pickle \(optimizer.pt",
        "pull",
        "me/many",
        "--path",
        "checkpoint-5/optimizer.pt",
    )


def test_other_formats_go_there_and_come_back(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.llama()
    lorank.adapt(model, lorank.LoRA(rank=4, alpha=6), ["q_proj"])
    models.disturb(model)
    lorank.save(model, tmp_path / "mlx", format="mlx")
    lorank.save(model, tmp_path / "my-lora.gguf", format="gguf")
    run("push", tmp_path / "mlx", "me/mlx", "--yes")
    run("push", tmp_path / "my-lora.gguf", "me/gguf", "--yes")
    run("pull", "me/mlx")
    assert {name: content for name, content in contents(Path("mlx")).items() if name != "README.md"} == contents(
        tmp_path / "mlx"
    )
    assert b"library_name: lorank" in Path("mlx/README.md").read_bytes()
    place = lorank.pull("me/gguf")
    assert place == Path("gguf/my-lora.gguf") and place.read_bytes() == (tmp_path / "my-lora.gguf").read_bytes()
    ids = models.ids(2, 6)
    wanted = model(ids).logits
    lorank.load(model, Path("mlx"), "pulled")
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


def test_a_file_that_only_its_model_explains_goes_there_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, lorank.LoRA(rank=4, alpha=6), ["q_proj"])
    models.disturb(model)
    lorank.save(model, tmp_path / "my-lora.safetensors", format="kohya")
    run("push", tmp_path / "my-lora.safetensors", "me/kohya", "--yes")
    found = run("pull", "me/kohya")
    assert "PROBLEM" not in found.stdout and "known with their model alone" in found.stderr
    ids = models.ids(2, 6)
    wanted = model(ids).logits
    lorank.load(model, Path("kohya/my-lora.safetensors"), "pulled")
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


def test_a_file_that_is_nothing_without_another_is_not_pushed(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, lorank.LoRA(rank=2), ["q_proj"])
    lorank.save(model, tmp_path / "mlx", format="mlx")
    (tmp_path / "mlx" / "adapters.safetensors").rename(tmp_path / "mlx" / "mine.safetensors")
    (adapter / PEFT[1]).rename(adapter / "mine.safetensors")
    for folder, name in ((tmp_path / "mlx", "adapters.safetensors"), (adapter, PEFT[1])):
        refused(f"rename it to {name}", "push", folder / "mine.safetensors", "me/new", "--yes")
        (folder / "mine.safetensors").rename(folder / name)
        (folder / PEFT[0]).unlink()
        refused(f"has {name}, but no adapter_config.json", "push", folder / name, "me/new", "--yes")
    assert not hub.repositories


@pytest.mark.parametrize(
    ("listed", "place", "reason"),
    [
        (["adapter_model.bin"], None, "has adapter_model.bin, but no adapter_config.json"),
        (["adapter_model.pt", "README.md"], None, "has adapter_model.pt, but no adapter_config.json"),
        (["mnli-lora.bin"], None, "has mnli-lora.bin, but no adapter_config.json: a pickle alone"),
        (["mnli.bin", "adapter_config.json"], "mnli.bin", "but no adapter_model.bin or adapter_model.pt"),
        (["a/adapter_0.pt"], "a", "its folder a has adapter_0.pt, but no adapter_config.json"),
    ],
)
def test_a_pickle_that_does_not_say_what_it_is(listed: list[str], place: str | None, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        choose(listed, place, True)
    with pytest.raises(AdapterError, match="give --allow-pickle"):
        choose(listed, place, False)


def test_torchtunes_files_come_with_their_configuration(hub: Hub, tmp_path: Path) -> None:
    model = models.llama()
    lorank.adapt(model, lorank.LoRA(rank=4, alpha=6), ["q_proj"])
    torch.save(as_torchtune(model), tmp_path / "adapter_model.pt")
    hub.holding(
        "me/tune", {"adapter_model.pt": (tmp_path / "adapter_model.pt").read_bytes(), PEFT[0]: b'{"lora_alpha": 6}'}
    )
    found = run("pull", "me/tune", "--allow-pickle")
    assert "lora, 512 parameters in 2 layers" in found.stdout and "torchtune has other names" in found.stderr
    lorank.remove(model)
    lorank.load(model, Path("tune"), allow_pickle=True)


def test_an_adapter_is_examined_once(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module in ("lorank.hub", "lorank.card"):
        monkeypatch.setattr(f"{module}.examine", lambda place: seen.append(place) or examine(place))
    run("push", adapter, "me/first", "--dry-run")
    assert seen == [adapter]


def test_what_is_in_the_folder_is_not_lost(hub: Hub, adapter: Path) -> None:
    there = hub.holding("me/first", on_the_hub(adapter))
    run("pull", "me/first")
    run("pull", "me/first")  # it is there already
    Path("first/mine.txt").write_text("mine")
    run("pull", "me/first")
    Path("first/adapter_config.json").write_text("{}")
    refused("exists and is not empty", "pull", "me/first")
    assert Path("first/adapter_config.json").read_text() == "{}"
    there.commit("main", pickled(adapter), "the old format")
    refused("exists and is not empty", "pull", "me/first", "--allow-pickle")
    run("pull", "me/first", "--allow-pickle", "--force")
    assert contents(Path("first")) == pickled(adapter) | {"mine.txt": b"mine"}
    Path("file").write_text("")
    refused("file is a file", "pull", "me/first", "--allow-pickle", "--output", "file", "--force")


def test_what_looks_wrong_is_not_pushed_and_told_when_pulled(hub: Hub, adapter: Path) -> None:
    broken(adapter, "q_proj.lora_B.weight", float("nan"))
    refused("cannot push .*: NaN or Inf in model.layers", "push", adapter, "me/first", "--yes")
    hub.holding("me/first", on_the_hub(adapter))
    found = CliRunner().invoke(app, ["pull", "me/first"])
    assert found.exit_code == 1 and "PROBLEM: NaN or Inf in" in found.stdout
    with pytest.warns(AdapterWarning, match="NaN or Inf"):
        lorank.pull("me/first")
    (adapter / PEFT[1]).write_bytes((adapter / PEFT[1]).read_bytes()[:-8])
    hub.holding("me/short", on_the_hub(adapter))
    refused("cannot pull me/short: cannot read me/short.* is not a whole safetensors file", "pull", "me/short")
    refused("is not a whole safetensors file", "push", adapter, "me/second", "--yes")
    refused("there is no such file or folder", "push", adapter.parent / "nothing", "me/second", "--yes")
    refused("has no adapter_config.json with adapter_model", "push", adapter.parent, "me/second", "--yes")
    (adapter / PEFT[1]).unlink()
    refused("has no adapter_config.json with adapter_model", "push", adapter, "me/second", "--yes")
    refused("license is 'My License'", "push", adapter, "me/second", "--license", "My License")
    assert list(hub.repositories) == ["me/first", "me/short"] and not Path("short").exists()


def test_cards_that_somebody_wrote_are_kept(hub: Hub, adapter: Path) -> None:
    generated = model_card(adapter, "me/first").encode()
    run("push", adapter, "me/first", "--yes")
    there = hub.repositories["me/first"]
    there.commit("main", there.files() | {"README.md": generated + b"\nMore.\n"}, "on the web site")
    with pytest.warns(AdapterWarning, match=r"has a README.md that somebody wrote or changed, which is kept"):
        lorank.push(adapter, "me/first")
    assert there.files()["README.md"] == generated + b"\nMore.\n"
    lorank.push(adapter, "me/first", card="new")
    assert there.files()["README.md"] == generated

    (adapter / "README.md").write_bytes(b"# Mine\r\n")
    lorank.push(adapter, "me/first")
    assert there.files()["README.md"] == b"# Mine\r\n"
    (adapter / "README.md").write_bytes(b"\xff")
    refused("cannot push to me/first: .*decode", "push", adapter, "me/first", "--yes")
    (adapter / "README.md").write_text("# Mine\n")
    dry = run_json("push", adapter, "me/first", "--dry-run", "--license", "mit")
    assert dry["card"] == "# Mine\n" and "says by itself what its license is" in dry["notes"][-1]
    lorank.push(adapter, "me/first", card="new")
    assert there.files()["README.md"] == generated and (adapter / "README.md").read_text() == "# Mine\n"

    run("pull", "me/first", "--output", "back")  # a card that came from here may be written anew
    assert is_untouched(Path("back/README.md").read_text())
    lorank.push("back", "me/second", license="mit")
    assert b"license: mit" in hub.repositories["me/second"].files()["README.md"]
    with pytest.raises(AdapterError, match="card is 'old'; it must be keep or new"):
        lorank.push(adapter, "me/first", card="old")  # type: ignore[arg-type]
    found = CliRunner().invoke(app, ["push", str(adapter), "me/first", "--card", "old"])
    assert "card is 'old'" in str(found.exception)


def test_a_base_that_is_not_on_the_hub_is_noted(hub: Hub, adapter: Path) -> None:
    config = json.loads((adapter / PEFT[0]).read_text()) | {"base_model_name_or_path": str(adapter)}
    (adapter / PEFT[0]).write_text(json.dumps(config))
    dry = run_json("push", adapter, "me/first", "--dry-run")
    assert "names a base that is not on the hub" in dry["notes"][0] and str(adapter) not in dry["card"]
    with pytest.warns(AdapterWarning, match="names a base that is not on the hub"):
        lorank.push(adapter, "me/first")


def test_trouble_with_xet_is_told_as_any_other(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    there, hub.xet = hub.holding("me/first", {}), True
    refused("cannot push to me/first: .*404", "push", adapter, "me/first", "--yes")
    assert there.files() == {}
    there.commit("main", on_the_hub(adapter), "by other means")
    refused("cannot pull me/first: ", "pull", "me/first")
    nothing_left(tmp_path / "home")


def test_errors_of_programs_are_not_taken_for_the_hubs(hub: Hub, adapter: Path) -> None:
    with pytest.raises(TypeError):
        lorank.push(adapter, "me/first", message=5)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"no connection to http://127\.0\.0\.1:9"):
        lorank.pull("me/first", endpoint="http://127.0.0.1:9")


@pytest.mark.slow
def test_the_command_line_as_a_process_of_its_own(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    """The variables of the hub's library are honoured: endpoint, home, token, and being offline."""
    bare = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}

    def lorank_(*words: object, **options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorank", *map(str, words)]
        settings = {**bare, **environment(hub, tmp_path / "other-home"), **options}
        return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120, check=False)

    refused = lorank_("push", adapter, "me/first", "--yes", HF_TOKEN="")
    assert refused.returncode == 1 and "no token is set (hf auth login, or HF_TOKEN)" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: cannot push to me/first")
    pushed = lorank_("push", adapter, "me/first", "--yes")
    assert pushed.returncode == 0 and pushed.stdout == f"{hub.url}/me/first\n", pushed.stderr
    pulled = lorank_("pull", "me/first", "--json")
    assert pulled.returncode == 0 and json.loads(pulled.stdout)["parameters"] == 896
    assert (tmp_path / "other-home" / "hub").is_dir()
    offline = lorank_("pull", "me/first", "--output", "offline", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0, offline.stderr
    assert contents(Path("offline")) == contents(Path("first"))
