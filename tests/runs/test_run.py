"""A run from the recipe to its folder: what is written, what is kept, and what stops it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import typer.testing
import yaml

import lorank
from lorank import AdapterError, LoRA, TrainConfig
from lorank.cli import app
from lorank.formats import read, safetensors_file
from lorank.health import Watch
from lorank.runs import checkpoint
from lorank.runs.loading import load_adapted
from lorank.runs.prepare import ADAPTER
from lorank.runs.run import Evaluated, Stopped, Trained

from .. import models
from . import cases

FILES = {"adapter", "checkpoint.safetensors", "loss.png", "metrics.jsonl", "recipe.yaml", "run.json"}


def test_a_language_model_end_to_end(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "run"
    wanted = cases.recipe(llama, cases.completions(tmp_path / "d.jsonl"), folder, steps=8)
    events = list(cases.begin(wanted).events())

    assert {path.name for path in folder.iterdir()} == FILES
    trained = [event for event in events if isinstance(event, Trained)]
    scored = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in trained] == list(range(1, 9))
    assert [(event.step, event.kept) for event in scored] == [(0, False), (3, True), (6, True), (8, True)]
    assert trained[-1].loss < trained[0].loss and scored[-1].scores["loss"] < scored[0].scores["loss"]
    assert isinstance(events[-1], Stopped) and events[-1].done
    assert events[-1].best == {"step": 8, **scored[-1].scores}

    records = cases.metrics(folder)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["loss"] for record in steps] == [event.loss for event in trained]
    assert all(record.keys() == {"step", "loss", "learning_rate", "grad_norm", "trained"} for record in steps)
    held_out = [record for record in records if "loss" not in record]
    assert held_out == [{"step": e.step, **{f"eval_{k}": v for k, v in e.scores.items()}} for e in scored]
    assert held_out[0].keys() == {"step", "eval_loss", "eval_perplexity", "eval_token_accuracy"}

    about = read(folder / "adapter").about
    assert about["task"] == "causal-lm" and about["train_on"] == "completion" and about["max_length"] == 256
    assert about["prompt"] == "prompt" and about["completion"] == "completion"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["steps_done"] == 8 and facts["best"] == events[-1].best
    assert facts["examples"] == 21 and facts["held_out"] == 5 and facts["versions"]["torch"] == torch.__version__
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert resolved["task"] == "causal-lm" and resolved["alpha"] == 4 and resolved["best"] == "loss"
    assert matplotlib.image.imread(folder / "loss.png", format="png").shape == (600, 1050, 4)


def test_a_classifier_end_to_end(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"steps": 60, "accumulate": 1, "eval_every": 20, "dropout": 0}
    end = cases.finish(cases.begin(cases.recipe(bert, cases.sentiments(tmp_path / "d.tsv"), folder, **settings)))
    assert end.best["accuracy"] == 1

    about = read(folder / "adapter").about
    assert about["task"] == "classification" and about["labels"] == ["bad", "good"]
    assert (about["text"], about["label"]) == ("text", "label")
    loaded = load_adapted(None, [str(folder)])
    assert loaded.model.config.id2label == {0: "bad", 1: "good"}
    lorank.activate(loaded.model, "run")
    for word, label in (("good", 1), ("bad", 0)):
        tokens = loaded.base.tokenizer(f"a {word} film", return_tensors="pt")
        assert int(loaded.model(**tokens).logits.argmax()) == label
    records = cases.metrics(folder)
    assert {"eval_loss", "eval_accuracy", "eval_f1", "eval_matthews"} < records[0].keys()


def test_the_best_adapter_is_kept_and_not_the_last(llama: Path, tmp_path: Path) -> None:
    """The held-out completions differ from the trained ones, so that learning those by heart does harm."""
    data, held_out = cases.completions(tmp_path / "d.jsonl"), cases.completions(tmp_path / "e.jsonl", 5, offset=7)
    text = held_out.read_text().replace('completion": " ', 'completion": " 0123456789')
    held_out.write_text(text)
    folder = tmp_path / "run"
    settings = {"eval_data": str(held_out), "steps": 45, "learning_rate": 1e-1, "checkpoint_every": 4}
    run = cases.begin(cases.recipe(llama, data, folder, **settings))
    kept: dict[str, Any] = {}
    scores: list[tuple[int, float]] = []
    for event in run.events():
        if isinstance(event, Evaluated) and event.step:
            scores.append((event.step, event.scores["loss"]))
            if event.kept:
                kept = {"step": event.step, "scores": event.scores, "values": cases.values(run)}
    best = min(scores, key=lambda pair: pair[1])
    assert best[0] < 45 and kept["step"] == best[0] and kept["scores"]["loss"] == best[1]
    assert not cases.same(kept["values"], cases.values(run))

    loaded = load_adapted(None, [f"default={folder}"])
    lorank.activate(loaded.model, "default")
    found = {key: p.detach() for key, p in lorank.adapter_parameters(loaded.model, "default").items()}
    assert cases.same(found, kept["values"])
    assert json.loads((folder / "run.json").read_text())["best"] == {"step": best[0], **kept["scores"]}


def test_without_held_out_data_the_last_adapter_is_kept(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", eval_share=0))
    events = list(run.events())
    assert not any(isinstance(event, Evaluated) for event in events)
    loaded = load_adapted(None, [f"default={tmp_path / 'run'}"])
    found = {key: p.detach() for key, p in lorank.adapter_parameters(loaded.model, "default").items()}
    assert cases.same(found, cases.values(run))


def test_scores_that_are_no_numbers_still_leave_an_adapter(bert: Path, tmp_path: Path) -> None:
    """A correlation does not exist where all values are equal."""
    data = tmp_path / "d.tsv"
    data.write_text("text\tlabel\n" + "".join(f"a film{' the fox' * (i % 4)}\t{i / 2}\n" for i in range(12)))
    held_out = tmp_path / "e.tsv"
    held_out.write_text("text\tlabel\na good film\t0.5\na bad film\t0.5\n")
    settings = {"eval_data": str(held_out), "best": "pearson", "steps": 6}
    run = cases.begin(cases.recipe(bert, data, tmp_path / "run", **settings))
    events = list(run.events())
    assert not any(event.kept for event in events if isinstance(event, Evaluated))
    assert any("pearson" in remark and "last adapter" in remark for remark in run.remarks)
    loaded = load_adapted(None, [f"default={tmp_path / 'run'}"])
    found = {key: p.detach() for key, p in lorank.adapter_parameters(loaded.model, "default").items()}
    assert cases.same(found, cases.values(run))
    assert json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)["steps_done"] == 6


def test_a_folder_that_holds_something_is_refused(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    for name, reason in [("other", "not empty; output= names another"), ("file", "file is no folder")]:
        place = tmp_path / name
        if name == "other":
            place.mkdir()
            (place / "notes.txt").write_text("mine")
        else:
            place.write_text("mine")
        with pytest.raises(AdapterError, match=reason):
            cases.begin(cases.recipe(llama, data, place))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    with pytest.raises(AdapterError, match=r"cannot make the folder .*file/run"):
        cases.begin(cases.recipe(llama, data, tmp_path / "file" / "run"))
    (tmp_path / "run").mkdir()  # an empty one will do
    cases.begin(cases.recipe(llama, data, tmp_path / "run"))
    with pytest.raises(AdapterError, match=r"not empty; lorank train --resume \S+run goes on with it"):
        cases.begin(cases.recipe(llama, data, tmp_path / "run"))


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    words = ["train", "--model", str(llama), "--data", str(data), "--output", str(tmp_path / "run")]
    before = sorted(tmp_path.rglob("*"))
    answer = typer.testing.CliRunner().invoke(app, [*words, "--dry-run", "--json"], catch_exceptions=False)
    assert answer.exit_code == 0
    facts = json.loads(answer.stdout)
    assert facts["first_batch"][0] == 8 and facts["memory"]["total"] > 0 and facts["held_out"] == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_recomputed_activations_change_nothing(kind: str, llama: Path, bert: Path, tmp_path: Path) -> None:
    """With dropout too: it is drawn again as it was."""
    make: Callable[[Path], Path] = cases.completions if kind == "llama" else cases.sentiments
    data = make(tmp_path / ("d.jsonl" if kind == "llama" else "d.tsv"))
    found = []
    for on in (False, True):
        wanted = cases.recipe(
            llama if kind == "llama" else bert, data, tmp_path / f"run{on}", steps=4, gradient_checkpointing=on
        )
        run = cases.begin(wanted)
        assert any(getattr(m, "gradient_checkpointing", False) for m in run.prepared.model.modules()) == on
        cases.finish(run)
        found.append((cases.values(run), [r["loss"] for r in cases.metrics(run.folder) if "loss" in r]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-6)


def test_a_base_in_bfloat16_trains(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", dtype="bfloat16", learning_rate=2e-2))
    assert run.prepared.model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in cases.values(run).values()} == {torch.float32}
    end = cases.finish(run)
    records = cases.metrics(tmp_path / "run")
    assert end.best["loss"] < records[0]["eval_loss"] - 0.05
    assert read(tmp_path / "run" / "adapter").updates


def test_a_base_with_an_infinite_weight_stops_the_run_before_anything_moves(llama: Path, tmp_path: Path) -> None:
    tensors = safetensors_file.read(llama / "model.safetensors")[1]
    tensors["model.layers.0.input_layernorm.weight"][3] = float("inf")
    spoilt = tmp_path / "base"
    spoilt.mkdir()
    for path in llama.iterdir():
        (spoilt / path.name).write_bytes(path.read_bytes())
    (spoilt / "model.safetensors").write_bytes(safetensors_file.pack(tensors, {"format": "pt"}))
    run = cases.begin(cases.recipe(spoilt, cases.completions(tmp_path / "d.jsonl"), tmp_path / "run"))
    before = cases.values(run)
    with pytest.raises(AdapterError, match="the loss of step 1 is nan; this step has changed nothing"):
        cases.finish(run)
    assert cases.same(cases.values(run), before)
    assert not (tmp_path / "run" / "adapter").exists()
    assert cases.metrics(tmp_path / "run")[0]["eval_loss"] is None  # JSON has no NaN


def test_a_loss_that_explodes_leaves_the_last_checkpoint_and_adapter(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = cases.begin(cases.recipe(llama, cases.completions(tmp_path / "d.jsonl"), folder))
    before: dict[str, Any] = {}
    with pytest.raises(AdapterError, match="the loss of step 6 is nan"):
        for event in run.events():
            if isinstance(event, Trained) and event.step == 5:
                before = cases.values(run)
                run.prepared.model.model.norm.weight.fill_(float("nan"))
    assert cases.same(cases.values(run), before)
    assert [record["step"] for record in cases.metrics(folder)] == [0, 1, 2, 3, 3, 4, 5]
    stored, state, progress, _ = checkpoint.read(folder)
    assert state.step == 4 and progress.best["step"] == 3
    assert stored.keys() == before.keys()
    load_adapted(None, [str(folder)])
    assert cases.finish(cases.resume(folder)).step == 9


def test_a_rate_that_is_far_too_high_stops_the_run(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", learning_rate=1e30, schedule="constant", warmup=0))
    with pytest.raises(AdapterError, match=r"the (loss|gradient) of step \d is (nan|inf)"):
        cases.finish(run)


def adapted() -> Any:
    model = models.llama()
    lorank.adapt(model, LoRA(rank=2), ["q_proj", "down_proj"])
    return model.train()


def watched(model: Any, parameters: dict[str, Any], loss: Callable[[Any], Any], **config: Any) -> list[int]:
    """Train with a watch, and return the steps that it saw."""
    watch, seen = Watch(model, ADAPTER), []
    batch = models.ids()
    for step in lorank.train(parameters, loss, [batch], TrainConfig(steps=7, **config)):
        watch()
        seen.append(step.index)
    return seen


def test_the_watch_is_silent_over_a_training_that_works() -> None:
    model = adapted()
    assert len(watched(model, lorank.adapter_parameters(model), lambda x: model(x, labels=x).loss)) == 7


def test_moved_by_decay_alone_is_not_trained() -> None:
    model = adapted()
    parameters = lorank.adapter_parameters(model)
    name = next(key for key in parameters if key.endswith("layers.0.self_attn.q_proj.adapters.default.A"))
    parameters[name].register_hook(torch.zeros_like)  # its gradient is zero in every step, and no error in the first
    with pytest.raises(
        AdapterError, match=r"layers\.0\.self_attn\.q_proj\.\S+\.A never had a gradient other than zero"
    ):
        watched(model, parameters, lambda x: model(x, labels=x).loss, weight_decay=0.1, learning_rate=1e-2)


def test_a_short_run_is_watched_to_its_end(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    run = cases.begin(cases.recipe(llama, data, tmp_path / "run", steps=3))
    name = next(key for key in lorank.adapter_parameters(run.prepared.model) if key.endswith(".A"))
    lorank.adapter_parameters(run.prepared.model)[name].register_hook(torch.zeros_like)
    with pytest.raises(AdapterError, match="have not moved in 3 steps"):
        cases.finish(run)


def test_the_watch_names_a_parameter_outside_the_optimiser() -> None:
    model = adapted()
    parameters = lorank.adapter_parameters(model)
    left_out = next(key for key in parameters if key.endswith("layers.1.mlp.down_proj.adapters.default.B"))
    given = {key: parameter for key, parameter in parameters.items() if key != left_out}
    with pytest.raises(AdapterError) as error:
        watched(model, given, lambda x: model(x, labels=x).loss)
    text = str(error.value)
    assert f"{left_out}: is it in the optimiser" in text and "have not moved in 5 steps" in text
    assert next(iter(given)) not in text


def test_the_watch_names_a_parameter_that_the_loss_does_not_reach() -> None:
    model = adapted()
    parameters = lorank.adapter_parameters(model)
    given = {key: parameter for key, parameter in parameters.items() if "layers.0" in key}
    with pytest.raises(AdapterError) as error:
        watched(
            model,
            given,
            lambda x: (
                model.model.layers[0].mlp(model.model.embed_tokens(x)).sum() + 0 * sum(p.sum() for p in given.values())
            ),
        )
    text = str(error.value)
    assert "model.layers.1.mlp.down_proj.adapters.default.A has no gradient" in text
    assert "layers.0.mlp" not in text


def test_the_watch_sees_a_rate_too_small_to_move_anything() -> None:
    model = adapted()
    with pytest.raises(AdapterError, match="have not moved in 5 steps"):
        watched(model, lorank.adapter_parameters(model), lambda x: model(x, labels=x).loss, learning_rate=1e-30)
