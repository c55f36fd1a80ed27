"""The paper's baselines in a run: trained, kept, taken up again to the bit, scored and asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorank
from lorank import AdapterError
from lorank.baselines import BASELINES
from lorank.runs import recipe
from lorank.runs.loading import load_adapted

from ..cli.running import run_json
from . import cases

OPTIONS: dict[str, dict[str, Any]] = {
    "top-k": {"blocks": 1},
    "adapter-h": {"size": 4},
    "adapter-l": {"size": 4},
    "adapter-p": {"size": 4},
    "adapter-d": {"size": 4, "drop": 1},
    "prefix-embedding": {"prefix": 3, "infix": 2},
    "prefix-layer": {"prefix": 3, "infix": 2},
}
PLAIN = {"rank": None, "alpha": None, "dropout": 0.0}
COMBINED = {"lora+prefix-embedding": {"prefix": 2, "infix": 1}, "lora+prefix-layer": {"prefix": 2, "infix": 1}}


def settings(method: str, **changes: Any) -> dict[str, Any]:
    own = {} if method in COMBINED else PLAIN
    options = COMBINED.get(method) or OPTIONS.get(method, {})
    return {"method": method, "method_options": options, "steps": 6, **own, **changes}


def values(run: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in run.prepared.subject.tensors().items()}


def test_a_recipe_knows_every_baseline() -> None:
    assert sorted(recipe.BASELINES) == sorted(BASELINES)


@pytest.mark.parametrize("method", [*recipe.BASELINES, *COMBINED])
def test_a_classifier_trains_and_is_scored_again_as_in_training(method: str, bert: Path, tmp_path: Path) -> None:
    data, folder = cases.sentiments(tmp_path / "d.tsv"), tmp_path / "run"
    changes: dict[str, Any] = {"targets": "attention"} if method in COMBINED else {}
    held = {"eval_data": str(data), "eval_share": 0.0}
    wanted = cases.recipe(bert, data, folder, **settings(method, learning_rate=5e-3, **held, **changes))
    run = cases.begin(wanted)
    cases.finish(run)
    end = json.loads((folder / "run.json").read_text())
    trained = sum(parameter.numel() for parameter in run.prepared.subject.parameters().values())
    assert end["trainable_parameters"] == run.prepared.plan.trainable_parameters == trained
    kept = ["--model", folder] if method == "full" else ["--adapter", folder]
    (again,) = run_json("eval", *kept, "--data", data)["scores"]
    assert again["loss"] == pytest.approx(end["best"]["loss"], rel=1e-5)
    found = run_json("generate", *kept, "--prompt", "a good film")
    assert json.dumps(found).count("probability") >= 1


@pytest.mark.parametrize("method", ["full", "top-k", "prefix-layer", "lora+prefix-embedding"])
def test_an_interrupted_run_ends_with_the_same_bits(method: str, llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    whole = cases.begin(cases.recipe(llama, data, tmp_path / "whole", **settings(method)))
    cases.finish(whole)
    losses = [record["eval_loss"] for record in cases.metrics(tmp_path / "whole") if "eval_loss" in record]
    assert losses[-1] < losses[0]
    cases.stop_at(cases.begin(cases.recipe(llama, data, tmp_path / "parts", **settings(method))), 3)
    torch.manual_seed(5)
    second = cases.resume(tmp_path / "parts")
    assert second.state.step == 3
    cases.finish(second)
    assert cases.same(values(whole), values(second))
    assert cases.metrics(tmp_path / "parts") == cases.metrics(tmp_path / "whole")


def test_a_model_that_was_trained_whole_is_a_checkpoint_of_its_own(llama: Path, tmp_path: Path) -> None:
    data, folder = cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"
    run = cases.begin(cases.recipe(llama, data, folder, **settings("full", eval_share=0.0)))
    cases.finish(run)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, parameter in run.prepared.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name
    loaded = load_adapted(str(folder), [])
    assert loaded.about["prompt"] == "prompt" and loaded.about["task"] == "causal-lm"
    with pytest.raises(AdapterError, match="give it as --model"):
        load_adapted(None, [str(folder)])
    found = run_json("generate", "--model", folder, "--prompt", "3 fox?", "--max-new-tokens", 3)
    assert found


def test_what_the_loss_does_not_depend_on_stays_and_is_named(bert: Path, tmp_path: Path) -> None:
    data, folder = cases.sentiments(tmp_path / "d.tsv"), tmp_path / "run"
    run = cases.begin(cases.recipe(bert, data, folder, **settings("full", steps=2)))
    unused = torch.nn.Parameter(torch.ones(2))
    run.prepared.model.register_parameter("unused", unused)
    subject = type(run.prepared.subject)(run.prepared.model, None, lambda: run._loss(next(run._batches()))[0])  # type: ignore
    assert subject.unused == ["unused"] and not unused.requires_grad  # type: ignore[attr-defined]
    assert "unused" not in subject.parameters()
    assert "the loss does not depend on unused" in subject.watch(5)()[0]


def test_room_is_left_for_a_prefix(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", **settings("prefix-embedding", max_length=10)))
    assert run.prepared.task.max_length == 5 and run.recipe.max_length == 10
    batch = next(run._batches())
    assert batch["input_ids"].shape[1] == 10
    first = lorank.special_tokens(run.prepared.model)
    assert first is not None and batch["input_ids"][0, :3].tolist() == [first.first, first.first + 1, first.first + 2]
    assert int((batch["input_ids"] >= first.first).sum()) == 5 * len(batch["input_ids"])
    with pytest.raises(AdapterError, match="5 special tokens leave no room in a context of 6"):
        cases.begin(cases.recipe(llama, data, tmp_path / "b", **settings("prefix-embedding", max_length=6)))


@pytest.mark.parametrize(
    "method, changes, says",
    [
        ("bitfit", {"rank": 4}, "bitfit has no rank"),
        ("adapter-h", {"dropout": 0.1}, r"adapter-h has no dropout; it has size, places \(method_options\)"),
        ("adapter-h", {"method_options": {"siz": 4}}, "adapter-h has no option 'siz'; nearest: size"),
        ("top-k", {"rank": 4, "targets": ["q_proj"]}, "top-k has no rank, targets; it has blocks"),
        ("top-k", {"targets": ["!q_proj"]}, "top-k has its own places"),
        ("full", {"train_also": ["lm_head"]}, "full trains all parameters, and takes no train_also"),
        ("full+lora", {}, "takes no other methods beside it"),
        ("full", {"targets": ["q_proj"]}, "full has no targets"),
        ("prefix-layer", {"lora_plus": 4.0}, "prefix-layer has no lora_plus"),
        ("adapter-x", {}, "method is 'adapter-x'; nearest: adapter-"),
    ],
)
def test_what_has_no_meaning_is_refused(
    method: str, changes: dict[str, Any], says: str, llama: Path, tmp_path: Path
) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    with pytest.raises(AdapterError, match=says):
        cases.begin(cases.recipe(llama, data, tmp_path / "run", **settings(method, **changes)))
    assert not (tmp_path / "run").exists()


def test_an_infix_behind_several_prompts_is_refused(llama: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"the fox {i}"} for i, role in enumerate(["user", "assistant"] * 2)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    with pytest.raises(AdapterError, match="train with infix=0"):
        cases.begin(cases.recipe(llama, path, tmp_path / "run", **settings("prefix-embedding")))


@pytest.mark.parametrize("killed", ["while it was written", "between the renames"])
def test_a_whole_model_survives_a_kill_while_it_is_kept(killed: str, bert: Path, tmp_path: Path) -> None:
    data = cases.sentiments(tmp_path / "d.tsv")
    wanted = cases.recipe(bert, data, tmp_path / "run", method="full", rank=None, alpha=None, dropout=0.0)
    cases.stop_at(cases.begin(wanted), 4)
    if killed == "between the renames":
        (tmp_path / "run" / "model").rename(tmp_path / "run" / ".model.old")
    else:
        (tmp_path / "run" / ".model.partial").mkdir()
        (tmp_path / "run" / ".model.partial" / "config.json").write_text("{}")
    resumed = cases.resume(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    end = cases.finish(resumed)
    assert end.done and not list((tmp_path / "run").glob(".model*"))


def test_lora_takes_what_the_top_blocks_leave(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", method="lora+top-k", method_options={"blocks": 1}))
    assert {place.name.split(".")[2] for place in run.prepared.plan.places} == {"0"}
    assert list(run.prepared.plan.copies) == ["model.layers.1"]
