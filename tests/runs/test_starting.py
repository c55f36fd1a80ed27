"""Starting from an adapter: its factors land whole or not at all, the head where the labels are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank import AdapterError
from lorank.formats import read
from lorank.runs.prepare import prepare

from . import cases

ENCODER: dict[str, Any] = {"targets": ["query", "value"], "dropout": 0.0}


@pytest.fixture(scope="module")
def three(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on three labels."""
    folder = tmp_path_factory.mktemp("three")
    lines = [f"a {word} film {i}\t{word}" for i, word in enumerate(["good", "bad", "lazy"] * 8)]
    (folder / "data.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    cases.finish(cases.begin(cases.recipe(bert, folder / "data.tsv", folder / "run", **ENCODER)))
    return folder / "run"


def start(bert: Path, tmp_path: Path, source: Path, **changes: Any) -> Any:
    """Return a run that starts from another, on two labels."""
    data = cases.sentiments(tmp_path / "two.tsv")
    settings = {**ENCODER, "init_adapter": str(source), **changes}
    return cases.begin(cases.recipe(bert, data, tmp_path / "run", **settings))


def test_factors_are_taken_and_a_head_of_other_labels_is_not(bert: Path, three: Path, tmp_path: Path) -> None:
    run = start(bert, tmp_path, three)
    trained = read(three / "adapter").updates
    values = cases.values(run)
    heads = {name for name in values if "classifier" in name}
    assert len(values) == 10 and len(heads) == 2
    for layer, update in trained.items():
        for factor, tensor in update.tensors["weight"].items():
            assert torch.equal(values[f"{layer}.adapters.default.{factor}"], tensor)
    fresh = prepare(cases.recipe(bert, tmp_path / "two.tsv", tmp_path / "other", **ENCODER))
    own = lorank.adapter_parameters(fresh.model, "default")
    assert all(torch.equal(values[name], own[name]) for name in heads)
    assert run.prepared.remarks[-1] == (
        f"8 tensors start from {three}; classifier starts anew, as the other is trained for bad, good, lazy"
    )
    assert "init_adapter: " + str(three) in (tmp_path / "run" / "recipe.yaml").read_text()
    cases.finish(run)


def test_a_head_of_the_same_labels_is_taken(bert: Path, tmp_path: Path) -> None:
    first = cases.begin(cases.recipe(bert, cases.sentiments(tmp_path / "a.tsv"), tmp_path / "first", **ENCODER))
    cases.finish(first)
    run = start(bert, tmp_path, tmp_path / "first" / "adapter")  # the adapter's own folder does as well
    content = read(tmp_path / "first" / "adapter")
    assert torch.equal(cases.values(run)["classifier.adapters.default.weight"], content.copies["classifier"]["weight"])
    assert run.prepared.remarks[-1].startswith("10 tensors start from ")


def test_a_language_model_starts_where_another_ended(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "data.jsonl")
    first = cases.begin(cases.recipe(llama, data, tmp_path / "first", dropout=0.0, eval_share=0.0))
    cases.finish(first)
    settings = {"dropout": 0.0, "eval_share": 0.0, "init_adapter": str(tmp_path / "first")}
    second = cases.begin(cases.recipe(llama, data, tmp_path / "second", **settings))
    assert cases.same(cases.values(first), cases.values(second))


def test_it_goes_on_after_a_stop(bert: Path, three: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    cases.finish(start(bert, whole, three))
    cases.stop_at(start(bert, parts, three), 4)
    cases.finish(cases.resume(parts / "run"))
    assert cases.metrics(whole / "run") == cases.metrics(parts / "run")
    assert cases.same(*(read(folder / "run" / "adapter").copies["classifier"] for folder in (whole, parts)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ["query"]}, r"it has .*value\.A.* and 1 more, which this recipe does not train"),
        ({"targets": ["query", "value", "key"]}, r"it has no .*key\.A.*, which this recipe trains"),
        ({"rank": 4, "alpha": 8}, r"query\.A is \(2, 32\) in it and \(4, 32\) here"),
        ({"alpha": 2}, "its scale is 2 on .*query and this recipe's 1: give the same alpha and rank"),
        ({"method": "loha"}, "it has no .*which this recipe trains\n  it has .*which this recipe does not train"),
        ({"method": "eva"}, "EVA starts from data, and cannot start from an adapter too"),
        ({"init_adapter": "nowhere"}, "nowhere: there is no such file or directory"),
    ],
)
def test_what_does_not_land_whole_is_refused(
    bert: Path, three: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AdapterError, match=reason):
        start(bert, tmp_path, three, **changes)
    assert not (tmp_path / "run").exists()


def test_another_base_is_refused(three: Path, tmp_path: Path) -> None:
    from .. import checkpoints

    other = checkpoints.encoder(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"cannot start from .*base"):
        start(other, tmp_path, three)


def test_values_of_the_configuration_can_be_changed(bert: Path, tmp_path: Path) -> None:
    data = cases.sentiments(tmp_path / "data.tsv")
    settings = {**ENCODER, "model_options": {"classifier_dropout": 0.3, "cls_dropout": 0.2}}
    model = prepare(cases.recipe(bert, data, tmp_path / "run", **settings)).model
    assert model.dropout.p == 0.3 and model.config.cls_dropout == 0.2 and model.config.num_labels == 2
    settings["model_options"] = {"clasifier_dropout": 0.3}
    with pytest.raises(AdapterError, match="there is no 'clasifier_dropout'; nearest: classifier_dropout"):
        prepare(cases.recipe(bert, data, tmp_path / "run", **settings))


def test_evaluations_can_be_counted_in_passes(bert: Path, tmp_path: Path) -> None:
    data = cases.sentiments(tmp_path / "data.tsv")  # 21 to train on: 6 batches, 3 steps a pass
    for asked, every in (({"eval_epochs": 1}, 3), ({"eval_epochs": 2.5}, 8), ({"eval_epochs": 1, "eval_every": 7}, 7)):
        settings = {**ENCODER, "eval_every": None, **asked}
        assert prepare(cases.recipe(bert, data, tmp_path / "run", **settings)).recipe.eval_every == every


@pytest.mark.parametrize("method, options", [("top-k", {"blocks": 1}), ("adapter-p", {"size": 4}), ("bitfit", {})])
def test_baselines_start_from_their_like_but_for_the_head(
    method: str, options: dict[str, Any], bert: Path, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"method": method, "method_options": options, "rank": None, "alpha": None, "dropout": 0.0}
    lines = [f"a {word} film {i}\t{word}" for i, word in enumerate(["good", "bad", "lazy"] * 8)]
    (tmp_path / "three.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    first = cases.begin(cases.recipe(bert, tmp_path / "three.tsv", tmp_path / "three", **own))
    cases.finish(first)
    data = cases.sentiments(tmp_path / "two.tsv")
    run = cases.begin(cases.recipe(bert, data, tmp_path / "run", init_adapter=str(tmp_path / "three"), **own))
    lorank.load(first.prepared.model, tmp_path / "three" / "adapter", "best", activate=False)  # the best, not the last
    there = lorank.adapter_parameters(first.prepared.model, "best")
    heads = 0
    for name, value in cases.values(run).items():
        if name.startswith("classifier"):
            heads += 1
        else:
            assert torch.equal(value, there[name.replace(".default", ".best")]), name
    assert heads == 2 and len(there) > 4


def test_full_training_starts_from_a_model(bert: Path, three: Path, tmp_path: Path) -> None:
    own = {"method": "full", "rank": None, "alpha": None, "dropout": 0.0, "init_adapter": str(three)}
    with pytest.raises(AdapterError, match="give a trained model as the model"):
        cases.begin(cases.recipe(bert, cases.sentiments(tmp_path / "two.tsv"), tmp_path / "run", **own))


@pytest.mark.parametrize("method", ["lora-fa", "pissa", "vera", "dora"])
def test_all_of_an_update_is_taken_its_frozen_part_too(method: str, bert: Path, tmp_path: Path) -> None:
    own = {**ENCODER, "method": method, "alpha": None}
    data = cases.sentiments(tmp_path / "d.tsv")
    first = cases.begin(cases.recipe(bert, data, tmp_path / "first", **own))
    cases.finish(first)
    run = cases.begin(cases.recipe(bert, data, tmp_path / "run", seed=7, init_adapter=str(tmp_path / "first"), **own))
    kept = read(tmp_path / "first" / "adapter").updates
    lorank.save(run.prepared.model, tmp_path / "again", "default")
    for layer, update in read(tmp_path / "again").updates.items():
        for name, tensor in update.tensors["weight"].items():
            torch.testing.assert_close(tensor, kept[layer].tensors["weight"][name])


def test_another_method_is_no_start(bert: Path, tmp_path: Path) -> None:
    data = cases.sentiments(tmp_path / "d.tsv")
    first = cases.begin(cases.recipe(bert, data, tmp_path / "first", **ENCODER))
    cases.finish(first)
    with pytest.raises(AdapterError, match="one of the two is lora and pissa"):
        cases.begin(
            cases.recipe(bert, data, tmp_path / "run", init_adapter=str(tmp_path / "first"), method="pissa", **ENCODER)
        )
    prefix: dict[str, Any] = {"method": "prefix-layer", "rank": None, "alpha": None, "dropout": 0.0}
    start = cases.begin(cases.recipe(bert, data, tmp_path / "p", method_options={"prefix": 3, "infix": 0}, **prefix))
    cases.finish(start)
    with pytest.raises(AdapterError, match=r"it has prefix-layer .prefix 3, infix 0., and this recipe"):
        options = {"prefix": 2, "infix": 1}
        cases.begin(
            cases.recipe(bert, data, tmp_path / "q", method_options=options, init_adapter=str(tmp_path / "p"), **prefix)
        )
