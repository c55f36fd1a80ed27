"""lorank convert: from file to file, with what became of the adapter said, and the outputs compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lorank
from lorank import AdapterError, LoRA
from lorank.cli import app
from lorank.converting import verify
from lorank.formats import pickles

from .. import checkpoints, models
from ..formats.test_torchtune import as_torchtune

RESULTS = {"peft": "back", "vllm": "served", "gguf": "adapter.gguf", "mlx": "mlx", "kohya": "k.safetensors"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoints.causal(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lorank.adapt(model, LoRA(rank=3, alpha=6), ["q_proj", "down_proj"], ranks={"down_proj": 2})
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


@pytest.mark.parametrize("to", RESULTS)
@pytest.mark.filterwarnings("ignore::lorank.AdapterWarning")
def test_every_format_computes_the_same(to: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    target = tmp_path / RESULTS[to]
    done = run(adapter, "--to", to, "--output", target, "--verify", base, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["source_format"] == "peft" and facts["target_format"] == to and facts["methods"] == {"lora": 4}
    assert facts["verified"]["largest_difference"] < 1e-4 < facts["verified"]["effect"]
    assert bool(facts["folded"]) == (to in ("vllm", "mlx"))


@pytest.mark.filterwarnings("ignore::lorank.AdapterWarning")
def test_loralib_needs_to_be_told_what_its_files_do_not_say(adapter: Path, base: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.pt"
    done = run(adapter, "--to", "loralib", "--output", target, "--model", base, "--verify", base)
    assert done.exit_code == 0, done.stderr
    assert "the outputs agree" in done.stdout
    back = run(target, "--to", "peft", "--output", tmp_path / "back")
    assert back.exit_code == 1 and "alpha is not stored" in str(back.exception) and "is a pickle" in str(back.exception)
    assert not (tmp_path / "back").exists()


def test_a_matrix_needs_no_model(adapter: Path, tmp_path: Path) -> None:
    done = run(adapter, "--to", "mlx", "--output", tmp_path / "mlx")
    assert done.exit_code == 0, done.stderr
    assert "peft to mlx: 4 layers (4 of lora)" in done.stdout
    assert "written in another way: padded with zeros to rank 3" in done.stdout


def test_nothing_is_replaced_unless_it_is_asked_for(adapter: Path, tmp_path: Path) -> None:
    assert run(adapter, "--to", "mlx", "--output", tmp_path / "mlx").exit_code == 0
    (tmp_path / "mlx" / "note.txt").write_text("mine")
    done = run(adapter, "--to", "mlx", "--output", tmp_path / "mlx")
    assert done.exit_code == 1 and "--force replaces it" in str(done.exception)
    assert run(adapter, "--to", "mlx", "--output", tmp_path / "mlx", "--force").exit_code == 0
    assert (tmp_path / "mlx" / "note.txt").read_text() == "mine"


def test_what_is_no_adapter_is_never_written_into(adapter: Path, base: Path) -> None:
    before = sorted(base.iterdir())
    done = run(adapter, "--output", base, "--force")
    assert done.exit_code == 1 and "is no adapter; choose another name" in str(done.exception)
    assert sorted(base.iterdir()) == before


def test_what_a_file_says_itself_cannot_be_given(adapter: Path, tmp_path: Path) -> None:
    done = run(adapter, "--output", tmp_path / "result", "--alpha", 3)
    assert done.exit_code == 1 and "alpha is for files that do not say it, and this one does" in str(done.exception)


@pytest.mark.filterwarnings("ignore::lorank.AdapterWarning")
def test_a_method_that_the_format_has_not_is_said(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lorank.adapt(model, lorank.VeRA(rank=8), ["q_proj"])
    models.disturb(model)
    lorank.save(model, tmp_path / "adapter")
    done = run(tmp_path / "adapter", "--to", "gguf", "--model", base, "--output", tmp_path / "a.gguf")
    assert "written in another way: vera written as LoRA, which computes the same" in done.stdout


@pytest.mark.parametrize(
    "words, says",
    [
        (["--to", "gguf"], "the model has to be given"),
        (["--to", "torchtune"], "torchtune"),
        (["--to", "onnx"], "unknown format 'onnx'; formats that can be written are"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    words: list[str], says: str, adapter: Path, tmp_path: Path
) -> None:
    done = run(adapter, "--output", tmp_path / "result", *words)
    assert done.exit_code == 1 and says in str(done.exception)
    assert not (tmp_path / "result").exists()


def test_an_adapter_for_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = checkpoints.causal(tmp_path / "other", hidden_size=48)
    done = run(adapter, "--to", "mlx", "--output", tmp_path / "mlx", "--model", other)
    assert done.exit_code == 1 and "the model needs" in str(done.exception)
    assert not (tmp_path / "mlx").exists()


def test_outputs_that_differ_are_said(adapter: Path, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lorank.load(model, adapter)
    models.disturb(model)
    lorank.save(model, tmp_path / "other")
    lorank.remove(model)
    found = verify(model, adapter, tmp_path / "other", {"input_ids": models.ids()})
    assert not found.equal and "THE OUTPUTS DIFFER" in str(found)
    assert lorank.adapter_names(model) == []


@pytest.fixture
def torchtunes(adapter: Path, base: Path, tmp_path: Path) -> Path:
    """Return a folder with the adapter as torchtune writes it for itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lorank.load(model, adapter)
    (tmp_path / "tune").mkdir()
    torch.save(as_torchtune(model), tmp_path / "tune" / "adapter_model.pt")
    (tmp_path / "tune" / "adapter_config.json").write_text('{"lora_alpha": 6}')
    return tmp_path / "tune"


def test_torchtunes_files_are_read_with_their_model(
    torchtunes: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    run_it = pickles._run
    monkeypatch.setattr(pickles, "_run", lambda path, *rest: opened.append(path) or run_it(path, *rest))
    target = tmp_path / "peft"
    alone = run(torchtunes, "--output", target, "--allow-pickle")
    assert alone.exit_code == 1 and "torchtune has other names" in str(alone.exception) and not target.exists()
    opened.clear()
    done = run(torchtunes, "--output", target, "--allow-pickle", "--model", base, "--verify", base)
    assert done.exit_code == 0, done.exception
    assert "torchtune to peft: 4 layers (4 of lora)" in done.stdout and "the outputs agree" in done.stdout
    assert len(opened) == 3  # to see what model it is for, to convert it, and to compare


def test_a_missing_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such file"):
        lorank.convert(tmp_path / "nothing", tmp_path / "result")
    assert torch.is_grad_enabled()
