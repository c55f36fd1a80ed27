"""combine: the sum of the dense updates, for layers and methods of every kind; what does not go together is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank import AdapterError, arithmetic
from lorank.formats import read
from lorank.formats.content import Content, gather
from lorank.formats.fitting import fit
from lorank.variants import LoHa, LoRA, OLoRA, PiSSA, Spec, VeRA

from .. import models
from .dense import adapter, close, content, deltas, experts, nearest, random_content, weighted


def convolutions() -> Any:
    return models.sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2))


def recurrent() -> Any:
    return models.sequential(nn.LSTM(5, 7))


BUILDS = [
    (models.llama, ["q_proj", "down_proj"], ["q_proj", "v_proj"]),
    (models.llama, ["embed_tokens", "lm_head"], ["embed_tokens"]),
    (models.gpt2, ["c_attn[q,v]", "c_fc"], ["c_attn[q,k]"]),
    (models.gpt2, ["c_attn[q,v]"], ["c_attn"]),
    (convolutions, ["0", "2"], ["2"]),
    (experts, ["experts", "q_proj"], ["experts"]),
    (recurrent, ["0"], ["0"]),
]


@pytest.mark.parametrize(("build", "first", "second"), BUILDS)
def test_the_sum_is_that_of_the_models(build: Any, first: Any, second: Any) -> None:
    """On a model: the weights of it with both merged one after the other are those with the combination merged."""
    model = build()
    adapter(model, first, LoRA(rank=2, alpha=3), "a", 1)
    adapter(model, second, LoRA(rank=3, alpha=5, rank_stabilised=True), "b", 2)
    base = {name: p.detach().double() for name, p in model.named_parameters() if ".adapters." not in name}

    def changed(*names: str) -> dict[str, torch.Tensor]:
        lorank.activate(model, *names)
        with lorank.merged(model):
            now = dict(model.named_parameters())
            return {name: now[name].detach().double() - W for name, W in base.items()}

    a, b = changed("a"), changed("b")
    report = lorank.combine(model, {"a": 0.7, "b": -0.4}, into="ab")
    assert lorank.active_adapters(model) == ["ab"]
    ab = changed("ab")
    assert any(W.any() for W in ab.values())
    for name, W in ab.items():
        torch.testing.assert_close(W, 0.7 * a[name] - 0.4 * b[name], atol=2e-6, rtol=0)
    assert report.error == 0 and all(row.error == 0 for row in report.rows)


def test_ranks_add_up_and_a_layer_may_be_in_some_only() -> None:
    model = models.llama()
    a = adapter(model, ["q_proj"], LoRA(rank=2), "a", 1)
    b = adapter(model, ["q_proj", "k_proj"], LoRA(rank=3, alpha=5), "b", 2)
    made, report = arithmetic.combine({"a": (a, 2.0), "b": (b, -0.5)})
    assert close(deltas(made), weighted((a, 2.0), (b, -0.5)))
    ranks = {layer: update.spec.rank for layer, update in made.updates.items()}
    assert {rank for layer, rank in ranks.items() if "q_proj" in layer} == {5}
    assert {rank for layer, rank in ranks.items() if "k_proj" in layer} == {3}
    assert all(update.spec.scale == 1 for update in made.updates.values())
    assert all(u.fingerprints.keys() == {"weight"} for u in made.updates.values())
    assert str(report).startswith("combined 2 a - 0.5 b exactly: 4 matrices of ranks 3 to 5")
    for row in report.rows:
        assert row.norm == pytest.approx(float(deltas(made)[row.label].norm()))


@pytest.mark.parametrize("spec", [LoHa(rank=2), VeRA(rank=8), PiSSA(rank=2), OLoRA(rank=2)], ids=lambda s: s.variant)
def test_every_method_with_a_low_rank_form_takes_part(spec: Spec) -> None:
    model = models.llama()
    a = adapter(model, ["q_proj"], spec, "a", 1)
    b = adapter(model, ["q_proj"], LoRA(rank=3, alpha=5), "b", 2)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().double().clone()
    lorank.activate(model, "a")
    with lorank.merged(model):
        change = model.model.layers[0].self_attn.q_proj.weight.detach().double() - before
    made, _ = arithmetic.combine({"a": (a, 0.5), "b": (b, 0.25)})
    name = "model.layers.0.self_attn.q_proj"
    expected = 0.5 * change + 0.25 * deltas(b)[name]
    torch.testing.assert_close(deltas(made)[name], expected, atol=2e-6, rtol=0)
    assert type(made.updates[name].spec) is LoRA


def test_methods_without_a_low_rank_form_are_named() -> None:
    model = models.llama()
    a = adapter(model, ["q_proj"], lorank.DoRA(rank=2), "a", 1)
    b = adapter(model, ["q_proj"], LoRA(rank=3), "b", 2)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj.*\n.*layers\.1\.self_attn\.q_proj"):
        arithmetic.combine({"a": (a, 0.5), "b": (b, 0.25)})


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_a_rank_is_the_best_of_that_rank(method: Any) -> None:
    a = random_content({"x": (30, 20), "y": (8, 40)}, 4, 1)
    b = random_content({"x": (30, 20)}, 6, 2, scale=0.5)
    made, report = arithmetic.combine({"a": (a, 0.7), "b": (b, 0.3)}, method=method, rank=3)
    for label, W in weighted((a, 0.7), (b, 0.3)).items():
        best, error = nearest(W, 3)
        row = next(row for row in report.rows if row.label == label)
        torch.testing.assert_close(deltas(made)[label], best)
        assert row.error == pytest.approx(error, rel=1e-9) and row.rank == 3
        assert row.norm == pytest.approx(float(W.norm()))
        A, B = made.updates[label].pair()
        torch.testing.assert_close(A @ A.T, B.T @ B)  # balanced
    assert "relative error of ΔW" in str(report)


def test_svd_has_the_largest_rank_of_the_layer() -> None:
    a, b = random_content({"x": (9, 9), "y": (9, 9)}, 2, 1), random_content({"x": (9, 9)}, 5, 2)
    made, report = arithmetic.combine({"a": (a, 1), "b": (b, 1)}, method="svd")
    assert [row.rank for row in report.rows] == [5, 2]
    assert report.rows[0].error > 0 and report.rows[1].error == 0
    assert close({"y": deltas(made)["y"]}, {"y": deltas(a)["y"]}, 1e-12)


def test_a_stack_is_truncated_matrix_by_matrix() -> None:
    A, B = torch.randn(3, 4, 6).double(), torch.randn(3, 8, 4).double()
    made, report = arithmetic.combine({"a": (content({"x": (A, B)}), 1)}, rank=2)
    parts = [nearest(b @ a, 2) for a, b in zip(A, B, strict=True)]
    torch.testing.assert_close(deltas(made)["x"], torch.stack([best for best, _ in parts]))
    lost = sum((error * float((b @ a).norm())) ** 2 for (_, error), a, b in zip(parts, A, B, strict=True))
    assert report.rows[0].error == pytest.approx((lost / float((B @ A).square().sum())) ** 0.5)


def test_different_bases_are_refused() -> None:
    torch.manual_seed(5)
    first, second = models.llama(), models.llama()
    a, b = adapter(first, ["q_proj"], name="a"), adapter(second, ["q_proj"], name="b")
    with pytest.raises(AdapterError, match=r"a and b were trained on different bases, in 2 of 2 .*allow_other_base"):
        arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    made, _ = arithmetic.combine({"a": (a, 1), "b": (b, 1)}, allow_other_base=True)
    assert close(deltas(made), weighted((a, 1), (b, 1)))


def test_the_same_base_in_another_dtype_is_the_same() -> None:
    first = models.llama()
    second = models.llama()
    second.load_state_dict(first.state_dict())
    a, b = adapter(first, ["q_proj"], name="a"), adapter(second.bfloat16(), ["q_proj"], name="b")
    made, _ = arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    assert close(deltas(made), weighted((a, 1), (b, 1)))


def test_names_of_bases_count_where_there_are_no_fingerprints() -> None:
    a, b = random_content({"x": (4, 4)}, 1, 1), random_content({"x": (4, 4)}, 1, 2)
    a.base_model, b.base_model = "org/one", "org/two"
    with pytest.raises(AdapterError, match="a names org/one as its base, b names org/two"):
        arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    b.base_model = None
    assert arithmetic.combine({"a": (a, 1), "b": (b, 1)})[0].base_model == "org/one"


def test_what_was_trained_whole_is_taken_from_one() -> None:
    model = models.bert()
    options: dict[str, Any] = {"train_also": ["classifier"], "bias": "adapted"}
    a = adapter(model, ["query"], name="a", seed=1, **options)
    b = adapter(model, ["query"], name="b", seed=2, **options)
    with pytest.raises(AdapterError, match=r"classifier, .*query\.bias.* differ in a and b\. .*whole='a'"):
        arithmetic.combine({"a": (a, 0.5), "b": (b, 0.5)})
    made, report = arithmetic.combine({"a": (a, 0.5), "b": (b, 0.5)}, whole="b")
    assert torch.equal(made.copies["classifier"]["weight"], b.copies["classifier"]["weight"])
    assert made.biases.keys() == b.biases.keys() and made.bias == "adapted"
    assert all(torch.equal(bias, b.biases[name]) for name, bias in made.biases.items())
    assert "taken from b as they are, whatever its weight" in str(report)
    with pytest.raises(AdapterError, match="whole is 'c', which is none of a, b"):
        arithmetic.combine({"a": (a, 0.5), "b": (b, 0.5)}, whole="c")


def test_equal_heads_need_no_choice_and_one_alone_is_taken() -> None:
    model = models.bert()
    a = adapter(model, ["query"], name="a", seed=1, train_also=["classifier"])
    b = adapter(model, ["query"], name="b", seed=2)
    c = Content(b.spec, dict(b.updates), copies=dict(a.copies))
    for other in (b, c):
        made, report = arithmetic.combine({"a": (a, 0.5), "b": (other, 0.5)})
        assert made.copies["classifier"].keys() == {"weight", "bias"}
        assert "taken from a as they are, whatever its weight: classifier" in str(report)


def test_rows_of_tokens_are_joined() -> None:
    model = models.llama(tie_word_embeddings=True)
    a = adapter(model, ["q_proj"], name="a", seed=1, train_tokens=[3, 9])
    b = adapter(model, ["q_proj"], name="b", seed=2, train_tokens=[7])
    made, _ = arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    (layer,) = made.tokens
    ids, rows = made.tokens[layer]
    assert ids == [3, 7, 9]
    assert torch.equal(rows, torch.stack([a.tokens[layer][1][0], b.tokens[layer][1][0], a.tokens[layer][1][1]]))
    c = adapter(model, ["q_proj"], name="c", seed=3, train_tokens=[9])
    with pytest.raises(AdapterError, match=r"embed_tokens \(token 9\) differ in a and c"):
        arithmetic.combine({"a": (a, 1), "c": (c, 1)})


def test_tied_layers_stay_tied_where_all_have_them_so() -> None:
    model = models.llama(tie_word_embeddings=True)
    a = adapter(model, ["embed_tokens"], name="a", seed=1, tie=True)
    b = adapter(model, ["embed_tokens"], name="b", seed=2, tie=True)
    q = adapter(model, ["q_proj"], name="q", seed=3)
    lorank.combine(model, {"a": 0.5, "b": 2, "q": 1}, into="all")
    assert gather(model, "all").tied == a.tied
    lorank.merge(model, "all")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.warns(lorank.AdapterWarning, match="tie=True"):
        c = adapter(model, ["embed_tokens"], name="c", seed=4)
    with pytest.raises(AdapterError, match=r"lm_head has the update of model\.embed_tokens in one adapter, and c"):
        arithmetic.combine({"a": (a, 1), "c": (c, 1), "q": (q, 1)}, allow_other_base=True)
    assert b.tied == a.tied


def test_parts_and_the_whole_of_a_file_are_not_mixed_up(tmp_path: Path) -> None:
    model = models.gpt2()
    adapter(model, ["c_attn[q,v]"], name="a", seed=1)
    whole = adapter(model, ["c_attn"], name="b", seed=2)
    lorank.save(model, tmp_path, "a")
    parts = read(tmp_path)  # one update of the whole layer, as there is no model
    made, _ = arithmetic.combine({"a": (parts, 1), "b": (whole, 1)})
    assert close(deltas(made), weighted((parts, 1), (whole, 1)))
    with_model = read(tmp_path, model)
    with pytest.raises(AdapterError, match=r"c_attn: a adapts q, v of it, and another adapter all of it"):
        arithmetic.combine({"a": (with_model, 1), "b": (whole, 1)})


def test_the_result_fits_the_model_and_computes_the_sum() -> None:
    model = models.llama()
    a = adapter(model, ["q_proj", "embed_tokens"], LoRA(rank=2), "a", 1)
    b = adapter(model, ["q_proj", "up_proj"], LoRA(rank=3), "b", 2)
    lorank.activate(model, "a", "b")
    ids = models.ids()
    with torch.no_grad():
        expected = model(ids).logits
    made, _ = arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    fresh = models.llama()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    fit(fresh, made, "sum", activate=True, allow_other_base=False)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, expected, atol=1e-5, rtol=0)


def test_what_is_said_of_the_adapters_is_kept_where_they_agree() -> None:
    a, b = random_content({"x": (4, 4)}, 1, 1), random_content({"x": (4, 4)}, 1, 2)
    a.about = {"task": "classification", "labels": ["x", "y"], "prompt": "p"}
    b.about = {"task": "classification", "labels": ["u", "v"], "prompt": "p"}
    a.task = b.task = "classification"
    made, report = arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    assert made.about == {"task": "classification", "prompt": "p"} and made.task == "classification"
    assert "the adapters differ in what they say of labels: left out" in report.notes
    assert arithmetic.combine({"a": (a, 1), "b": (b, 1)}, whole="b")[0].about == b.about


def test_wrong_arguments_are_listed() -> None:
    a, b = random_content({"x": (4, 4)}, 1, 1), random_content({"x": (4, 5)}, 1, 2)
    with pytest.raises(AdapterError, match=r"weight of a is 0(.|\n)*weight of b is nan(.|\n)*rank is 0"):
        arithmetic.combine({"a": (a, 0), "b": (b, float("nan"))}, rank=0)
    with pytest.raises(AdapterError, match="method is 'sum'; it must be one of exact"):
        arithmetic.combine({"a": (a, 1)}, method="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AdapterError, match=r"x: ΔW is \(4, 4\) in a, and \(4, 5\) in b"):
        arithmetic.combine({"a": (a, 1), "b": (b, 1)})
    with pytest.raises(AdapterError, match="there is no adapter"):
        arithmetic.combine({})
    a.updates["x"].tensors["weight"]["A"][0, 0] = float("nan")
    a.problems = ["it is odd"]
    with pytest.raises(AdapterError, match="a: it is odd"):
        arithmetic.combine({"a": (a, 1)})
    a.problems = []
    with pytest.raises(AdapterError, match="a: x holds NaN or Inf"):
        arithmetic.combine({"a": (a, 1)})


def test_on_a_model_nothing_changes_when_it_is_refused() -> None:
    model = models.llama()
    adapter(model, ["q_proj"], name="a", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for arguments, reason in (
        ({"weights": {"a": 1, "z": 1}, "into": "c"}, "no adapter 'z'"),
        ({"weights": {"a": 1}, "into": "a"}, "name 'a' is taken"),
        ({"weights": {"a": 1}, "into": "c", "density": 0.2}, "density is 0.2, and exact leaves out no numbers"),
        ({"weights": {"a": 1}, "into": "c", "method": "ties"}, "density is None; ties needs the share"),
        ({"weights": ["a"], "into": "c"}, "the weights are"),
    ):
        with pytest.raises(AdapterError, match=reason):
            lorank.combine(model, **arguments)  # pyright: ignore[reportArgumentType]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert lorank.active_adapters(model) == ["a"]


def test_losing_most_of_a_layer_is_warned_of() -> None:
    model = models.llama()
    adapter(model, ["q_proj"], LoRA(rank=12), "a", 1)
    adapter(model, ["q_proj"], LoRA(rank=12), "b", 2)
    with pytest.warns(lorank.AdapterWarning, match=r"rank 1 holds \d+% of the energy of ΔW of model\.layers"):
        lorank.combine(model, {"a": 1, "b": 1}, into="ab", rank=1, activate=False)
    assert lorank.active_adapters(model) == ["b"]
    assert {u.spec.rank for u in gather(model, "ab").updates.values()} == {1}
