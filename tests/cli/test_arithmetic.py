"""lorank combine, resize, scale, extract and diff: files in, files out, with the numbers of the library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lorank
from lorank import LoRA, arithmetic
from lorank.cli import app
from lorank.formats import read

from .. import checkpoints, models
from ..arithmetic.dense import adapter, close, deltas, weighted
from .running import refused, run, run_json


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of two adapters of one base."""
    model = models.llama()
    adapter(model, ["q_proj", "embed_tokens"], LoRA(rank=2, alpha=6), "a", 1)
    adapter(model, ["q_proj", "down_proj"], LoRA(rank=3), "b", 2)
    for name in "ab":
        lorank.save(model, tmp_path / name, name)
    return tmp_path / "a", tmp_path / "b"


def misused(*words: object) -> str:
    """Run a command that is used in a wrong way, and return why; it must exit with 2 when run as a process."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        from lorank.cli.console import UsageError

        assert isinstance(found.exception, UsageError), found.exception
        return str(found.exception)
    assert found.exit_code == 2
    return found.output


def test_combine_writes_the_weighted_sum(saved: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (read(path) for path in saved)
    found = run_json("combine", *saved, "--weights", "0.7,-0.3", "--output", tmp_path / "both")
    made = read(tmp_path / "both")
    assert close(deltas(made), weighted((a, 0.7), (b, -0.3)), 1e-6)
    assert not made.problems and all(update.fingerprints for update in made.updates.values())
    assert found["adapters"] == {"a": 0.7, "b": -0.3} and found["error"] == 0
    assert {layer["label"] for layer in found["layers"]} == deltas(made).keys()
    plain = run("combine", *saved, "--rank", "4", "--output", tmp_path / "four").stdout
    assert "combined 1 a + 1 b by SVD: 5 matrices" in plain and "relative error of ΔW" in plain
    assert max(update.spec.rank for update in read(tmp_path / "four").updates.values()) == 4


def test_combine_by_ties_and_dare(saved: tuple[Path, Path], tmp_path: Path) -> None:
    contents = {name: (read(path), 1.0) for name, path in zip("ab", saved, strict=True)}
    for method, seed in (("ties", 0), ("dare", 3)):
        words = ["--method", method, "--density", "0.4", "--seed", seed, "--rank", "9"]
        run("combine", *saved, *words, "--output", tmp_path / method)
        options: Any = {"method": method, "density": 0.4, "seed": seed, "rank": 9}
        expected, _ = arithmetic.combine(contents, **options)
        assert close(deltas(read(tmp_path / method)), deltas(expected), 1e-6)


def test_what_differs_needs_a_choice(tmp_path: Path) -> None:
    model = models.bert()
    for seed, name in enumerate("ab"):
        adapter(model, ["query"], name=name, seed=seed, train_also=["classifier"])
        lorank.save(model, tmp_path / name, name, about={"task": "classification"})
    words = ["combine", f"one={tmp_path / 'a'}", f"two={tmp_path / 'b'}", "--output", tmp_path / "both"]
    refused("classifier differ in one and two", *words)
    assert not (tmp_path / "both").exists()
    assert "taken from two as they are" in run(*words, "--whole", "two").stdout
    made = read(tmp_path / "both")
    assert torch.equal(made.copies["classifier"]["weight"], read(tmp_path / "b").copies["classifier"]["weight"])
    assert made.task == "classification"


def test_resize(saved: tuple[Path, Path], tmp_path: Path) -> None:
    found = run_json("resize", saved[1], "--rank", "1", "--output", tmp_path / "small")
    expected, report = arithmetic.resize(read(saved[1]), 1)
    assert close(deltas(read(tmp_path / "small")), deltas(expected), 1e-6)
    assert found["error"] == pytest.approx(report.error) and found["error"] > 0.1
    run("resize", saved[1], "--energy", "0.9", "--output", tmp_path / "kept")
    kept = read(tmp_path / "kept")
    for label, W in deltas(read(saved[1])).items():
        assert float((deltas(kept)[label] - W).norm() / W.norm()) <= 0.1**0.5 + 1e-6


def test_scale_and_negate(saved: tuple[Path, Path], tmp_path: Path) -> None:
    before = deltas(read(saved[0]))
    for factor in ("-1", "0.25", "-2e-1"):
        run("scale", saved[0], factor, "--output", tmp_path / "made", "--force")
        after = deltas(read(tmp_path / "made"))
        assert close(after, {label: float(factor) * W for label, W in before.items()}, 1e-6)
    both = ["combine", saved[0], tmp_path / "made", "--weights", "1,5", "--output", tmp_path / "nothing"]
    run(*both)
    assert close(deltas(read(tmp_path / "nothing")), {label: 0 * W for label, W in before.items()}, 1e-6)
    assert "must be a finite number other than 0" in misused("scale", saved[0], "0", "--output", tmp_path / "x")


def test_extract(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = checkpoints.causal(tmp_path / "base")
    tuned: Any = AutoModelForCausalLM.from_pretrained(base)
    content = adapter(tuned, ["q_proj", "up_proj"], LoRA(rank=3))
    lorank.merge(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    found = run_json("extract", base, tmp_path / "tuned", "--rank", "3", "--output", tmp_path / "adapter")
    assert close(deltas(read(tmp_path / "adapter")), deltas(content), 1e-5)
    assert found["error"] < 1e-5 and found["left_out"] == {}
    words = ["--targets", "q_proj,k_proj", "--energy", "0.9", "--output", tmp_path / "part"]
    with pytest.warns(lorank.AdapterWarning, match="2 tensors differ, and are not targeted"):
        plain = run("extract", base, tmp_path / "tuned", *words).stdout
    assert "not targeted: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in plain
    loaded: Any = AutoModelForCausalLM.from_pretrained(base)
    lorank.load(loaded, tmp_path / "adapter")
    refused("is no model: it has no config.json", "extract", tmp_path, base, "--rank", "3", "--output", tmp_path / "x")


def test_diff(saved: tuple[Path, Path]) -> None:
    expected = arithmetic.diff(*(read(path) for path in saved))
    found = run_json("diff", *saved)
    assert found["distance"] == pytest.approx(expected.distance) and found["cosine"] == pytest.approx(expected.cosine)
    assert [layer["label"] for layer in found["layers"]] == [row.label for row in expected.rows]
    lines = run("diff", *saved).stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "layers", "ranks"]
    (line,) = [line for line in lines if "q_proj" in line]
    assert line.startswith("model.layers.{0-1}.self_attn.q_proj") and "2 and 3" in line
    mean = sum(row.norms[0] for row in expected.rows if "q_proj" in row.label) / 2
    assert f"{mean:.4f}" in line
    assert any(line.startswith("all layers: norms") and "cosine" in line for line in lines)
    every = run("diff", *saved, "--all").stdout
    assert all(f"model.layers.{i}.self_attn.q_proj" in every for i in range(2))
    alone = next(line for line in lines if "down_proj" in line)
    assert "- and 3" in alone


def test_nothing_is_overwritten_unless_that_is_wanted(saved: tuple[Path, Path], tmp_path: Path) -> None:
    before = (saved[1] / "adapter_model.safetensors").read_bytes()
    for words in (["combine", *saved], ["resize", saved[0], "--rank", 1], ["scale", saved[0], "2"]):
        refused("exists and is not empty; choose another folder, or --force", *words, "--output", saved[1])
        assert (saved[1] / "adapter_model.safetensors").read_bytes() == before
    run("resize", saved[1], "--rank", 1, "--output", saved[1], "--force")  # onto itself
    assert {update.spec.rank for update in read(saved[1]).updates.values()} == {1}
    (tmp_path / "file").write_text("")
    refused("is a file; an adapter is a folder", "scale", saved[0], "2", "--output", tmp_path / "file")


def test_equal_commands_write_equal_bytes(saved: tuple[Path, Path], tmp_path: Path) -> None:
    for words in (
        ["combine", *saved, "--method", "dare", "--density", "0.5"],
        ["resize", saved[0], "--rank", "5"],
        ["scale", saved[0], "-0.5"],
    ):
        files = []
        for name in ("one", "two"):
            run(*words, "--output", tmp_path / name, "--force")
            files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        assert files[0] == files[1] and len(files[0]) == 2


def test_wrong_usage(saved: tuple[Path, Path], tmp_path: Path) -> None:
    target = ["--output", tmp_path / "x"]
    assert "3 weights for 2 adapters" in misused("combine", *saved, "--weights", "1,2,3", *target)
    assert "weights are '1;2'" in misused("combine", *saved, "--weights", "1;2", *target)
    assert "it must be one of exact, svd" in misused("combine", *saved, "--method", "sum", *target)
    assert "ties needs the share" in misused("combine", *saved, "--method", "ties", *target)
    assert "whole is 'z'" in misused("combine", *saved, "--whole", "z", *target)
    assert "two adapters are called 'a'" in misused("combine", saved[0], saved[0], *target)
    assert "give either a rank, or the share" in misused("resize", saved[0], *target)
    assert "give either a rank, or the share" in misused("extract", "base", "tuned", *target)
    assert "energy is 2.0" in misused("resize", saved[0], "--energy", "2", *target)
    assert "--output" in misused("resize", saved[0], "--rank", "2")
    assert "whole is 'all'" in misused("scale", saved[0], "2", "--whole", "all", *target)
    assert "bias is 'some'" in misused("extract", "a", "b", "--rank", "2", "--bias", "some", *target)
    assert not (tmp_path / "x").exists()


def test_layers_that_need_their_model_are_refused(tmp_path: Path) -> None:
    model = models.sequential(torch.nn.LSTM(4, 3))
    adapter(model, ["0"], LoRA(rank=2))
    lorank.save(model, tmp_path / "a")
    refused(
        r"0: how weight_(ih|hh)_l0, weight_(ih|hh)_l0 lie in a file is known with their model alone",
        *("resize", tmp_path / "a", "--rank", "1", "--output", tmp_path / "b"),
    )
    assert not (tmp_path / "b").exists()
