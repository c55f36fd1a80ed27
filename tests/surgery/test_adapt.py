"""What adapt does beside the low-rank updates, and what it says when it cannot."""

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models


def state(model: nn.Module) -> tuple:
    return (
        [(name, type(module), list(module.__dict__)) for name, module in model.named_modules()],
        [(name, parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()],
    )


def assert_same_state(a: tuple, b: tuple) -> None:
    assert a[0] == b[0]
    assert [row[:2] for row in a[1]] == [row[:2] for row in b[1]]
    assert all(torch.equal(x[2], y[2]) for x, y in zip(a[1], b[1], strict=True))


def test_all_problems_come_in_one_error_and_nothing_has_changed() -> None:
    model = models.roberta()
    lorank.adapt(model, LoRA(), "query", name="taken")
    before = state(model)
    with pytest.raises(AdapterError) as error:
        lorank.adapt(
            model,
            LoRA(),
            ["quary", "value", "!kee"],
            name="taken",
            ranks={"value": 0, "keys": 4},
            alphas={"dense": 3},
            train_also=["clasifier", "roberta.encoder"],
            bias="some",  # pyright: ignore[reportArgumentType]
        )
    text = str(error.value)
    for expected in (
        "adapter name 'taken' is taken",
        "exclusion 'kee' names no module; nearest: key",
        "target 'quary' selects no layer; nearest: query",
        "rank is 0",
        "ranks 'keys' names no module; nearest: key",
        "alphas 'dense' matches no layer that is adapted",
        "train_also 'clasifier' names no module; nearest: classifier",
        "roberta.encoder contains",
        "bias is 'some'",
    ):
        assert expected in text, text
    assert_same_state(state(model), before)


def test_a_spec_names_everything_that_is_wrong_with_it() -> None:
    with pytest.raises(AdapterError) as error:
        LoRA(rank=0, alpha=float("nan"), dropout=1.0, init="zeros", dtype=torch.int8)  # pyright: ignore
    assert all(
        field in str(error.value) for field in ("rank is 0", "alpha is nan", "dropout is", "init is", "dtype is")
    )


def test_a_rank_above_the_layers_own_is_a_warning() -> None:
    model = models.llama()
    with pytest.warns(lorank.AdapterWarning, match=r"k_proj: rank 20 is above the layer's own, 16") as record:
        lorank.adapt(model, LoRA(rank=20), ["layers.0.self_attn.k_proj"])
    assert record[0].filename == __file__


def test_ranks_and_alphas_override_per_layer() -> None:
    model = models.llama()
    plan = lorank.adapt(
        model, LoRA(rank=4, alpha=8), ["q_proj", "v_proj"], ranks={"layers.1.*": 2}, alphas={"v_proj": 3}
    )
    found = {place.name: (place.spec.rank, getattr(place.spec, "alpha", 0)) for place in plan.places}
    assert list(found.values()) == [(4, 8), (4, 3), (2, 8), (2, 3)]
    adapter = model.model.layers[1].self_attn.v_proj.adapters["default"]
    assert adapter.A.shape == (2, 32) and adapter.scale == 1.5
    with pytest.raises(AdapterError, match=r"ranks give model\.layers\.0\.self_attn\.q_proj two values, 2 and 3"):
        lorank.plan(model, LoRA(), "q_proj", name="b", ranks={"q_proj": 2, "layers.0.*": 3})


def test_initialisation_and_dtype_are_as_asked() -> None:
    model = models.llama().to(torch.bfloat16)
    lorank.adapt(model, LoRA(rank=16), "up_proj", name="kaiming")
    lorank.adapt(model, LoRA(rank=16, init="gaussian", dtype=torch.bfloat16), "up_proj", name="gaussian")
    lorank.adapt(model, LoRA(rank=8), "embed_tokens", name="embedding")
    model.requires_grad_(False)
    kaiming, gaussian = (model.model.layers[0].mlp.up_proj.adapters[name] for name in ("kaiming", "gaussian"))
    embedding = model.model.embed_tokens.adapters["embedding"]
    assert kaiming.A.dtype == torch.float32 and gaussian.A.dtype == torch.bfloat16
    assert kaiming.A.abs().max() <= 32**-0.5 and kaiming.A.std() == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert gaussian.A.float().std() == pytest.approx(1 / 16, rel=0.15)
    assert not kaiming.B.any() and not gaussian.B.any()
    assert not embedding.A.any() and embedding.B.std() == pytest.approx(1, rel=0.2)
    wide = models.llama().double()
    lorank.adapt(wide, LoRA(), "q_proj")
    assert {p.dtype for p in lorank.adapter_parameters(wide).values()} == {torch.float64}


def test_products_run_in_the_layers_dtype_without_a_wide_copy_of_the_input() -> None:
    layer = models.sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    lorank.adapt(layer, LoRA(rank=2), "0")
    x = torch.randn(1000, 64, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert not [t for t in saved if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert len({t.data_ptr() for t in saved if t.numel() == x.numel()}) <= 1


def test_dropout_acts_in_training_only_and_on_embeddings_too() -> None:
    linear = (models.sequential(nn.Linear(8, 8)), torch.randn(4, 8), "0")
    embedding = (models.Plain(), models.ids(), "embed")
    for model, x, target in (linear, embedding):
        lorank.adapt(model, LoRA(rank=4, dropout=0.5), target)
        models.disturb(model, size=1.0)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_a_new_adapter_is_in_the_models_mode() -> None:
    model = models.sequential(nn.Linear(8, 8)).eval()
    lorank.adapt(model, LoRA(dropout=0.5), "0")
    assert not any(module.training for module in model.modules())


def test_train_also_trains_a_copy_and_leaves_the_base() -> None:
    model, x = models.roberta(), models.ids()
    base = model(x).logits
    weight = model.classifier.dense.weight.clone()
    plan = lorank.adapt(model, LoRA(), ["query"], train_also=["classifier"], name="a")
    assert list(plan.copies) == ["classifier"]
    assert torch.equal(model(x).logits, base)
    names = lorank.adapter_parameters(model)
    assert "classifier.adapters.a.dense.weight" in names
    models.disturb(model)
    a = model(x).logits
    assert torch.equal(model.classifier.dense.weight, weight)
    with lorank.disabled(model):
        assert torch.equal(model(x).logits, base)

    lorank.adapt(model, LoRA(), ["value"], train_also="classifier", name="b")
    assert torch.equal(model(x).logits, base)  # the copy is of the base's module, not of a's
    models.disturb(model)
    b = model(x).logits
    lorank.activate(model, "a")
    assert torch.equal(model(x).logits, a)
    with pytest.raises(AdapterError, match="'a' and 'b' both put a copy in the place of classifier"):
        lorank.activate(model, "a", "b")
    assert torch.equal(model(x).logits, a)
    lorank.activate(model, "b")
    lorank.merge(model)
    torch.testing.assert_close(model(x).logits, b, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.classifier.dense.weight, weight)
    assert lorank.adapter_names(model) == ["a"]


def test_train_also_refuses_what_is_adapted_and_the_whole_model() -> None:
    model = models.roberta()
    with pytest.raises(AdapterError, match=r"classifier contains classifier\.dense.*exclude with '!classifier'"):
        lorank.adapt(model, LoRA(), ["dense"], train_also=["classifier"])
    lorank.adapt(model, LoRA(), ["dense", "!classifier"], train_also=["classifier"], name="a")
    lorank.adapt(model, LoRA(), ["classifier.dense"], name="b")
    with pytest.raises(AdapterError, match=r"'b' adapts classifier\.dense, in classifier, of which 'a' runs a copy"):
        lorank.activate(model, "a", "b")
    with pytest.raises(AdapterError, match="which another adapter changes"):
        lorank.adapt(model, LoRA(), ["query"], train_also=["classifier"], name="c")
    with pytest.raises(AdapterError, match="has no parameters"):
        lorank.adapt(model, LoRA(), ["query"], train_also=["classifier.dropout"], name="c")
    with pytest.raises(AdapterError, match="which lies in it"):
        lorank.adapt(model, LoRA(), ["query"], train_also=["roberta.embeddings", "word_embeddings"], name="c")


def test_an_adapter_and_anothers_copy_of_the_same_layer_run_together() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(rank=2), ["lm_head"], name="a")
    models.disturb(model)
    lorank.adapt(model, LoRA(rank=2), ["q_proj"], train_also=["lm_head"], name="b")
    models.disturb(model)
    lorank.activate(model, "a", "b")
    y = model(x).logits
    with lorank.merged(model):
        torch.testing.assert_close(model(x).logits, y, rtol=1e-5, atol=1e-5)
    lorank.merge(model)
    torch.testing.assert_close(model(x).logits, y, rtol=1e-5, atol=1e-5)


def test_a_copy_with_buffers_is_merged_and_restored_with_them() -> None:
    model = models.sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    base = copy.deepcopy(model)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    x = torch.randn(16, 6)
    for _ in range(3):
        model(x)  # in training the copy's running statistics move
    model.eval()
    y = model(x)
    with lorank.merged(model):
        assert torch.equal(model(x), y)
    assert torch.equal(model[1].running_mean, base[1].running_mean)
    lorank.merge(model)
    assert torch.equal(model(x), y)
    assert not torch.equal(model[1].running_mean, base[1].running_mean)


@pytest.mark.parametrize("bias", ["adapted", "all"])
def test_biases_are_the_adapters_own(bias: str) -> None:
    model, x = models.roberta(), models.ids()
    base = model(x).logits
    plan = lorank.adapt(model, LoRA(rank=2), ["query", "value"], bias=bias)  # pyright: ignore[reportArgumentType]
    own = {name for name, _ in model.named_parameters() if name.endswith("bias") and ".adapters." not in name}
    if bias == "all":
        assert {f"{name}.bias" for name in plan.biases} == own
    else:
        assert set(plan.biases) == set(plan.layers)
    models.disturb(model)
    y = model(x).logits
    (y.sum()).backward()
    assert lorank.check(model) == []
    with lorank.disabled(model):
        assert torch.equal(model(x).logits, base)
    report = lorank.merge(model)
    torch.testing.assert_close(model(x).logits, y, rtol=1e-5, atol=1e-5)
    assert sum(row.label.endswith(".bias") for row in report.rows) == len(plan.biases)


def test_biases_of_convolutions_and_norms_are_added_along_channels() -> None:
    model = models.sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 2)
    ).eval()
    x = torch.randn(2, 3, 5, 5)
    plan = lorank.adapt(model, LoRA(rank=1), "4", bias="all")
    assert list(plan.biases) == ["0", "1", "2", "4"]
    models.disturb(model)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_bias_that_is_applied_in_an_unknown_way_is_named_with_the_way_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.bias

    model = models.sequential(Odd())
    with pytest.raises(AdapterError, match=r"0: lorank does not know how Odd applies its bias; exclude it with '!0'"):
        lorank.adapt(model, LoRA(rank=1), "linear", bias="all")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "forward", "train", "active", 3])
def test_names_that_cannot_be_module_names_are_refused(name: object) -> None:
    with pytest.raises(AdapterError, match="adapter name"):
        lorank.adapt(models.llama(), LoRA(), "q_proj", name=name)  # pyright: ignore[reportArgumentType]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    model = models.llama()
    with pytest.raises(AdapterError, match="the model has no"):
        lorank.merge(model)
    lorank.adapt(model, LoRA(), "q_proj", name="sst2")
    for action in (lorank.activate, lorank.merge, lorank.remove, lorank.adapter_parameters, lorank.check, lorank.reset):
        with pytest.raises(AdapterError, match="no adapter 'sst'; nearest: sst2"):
            action(model, "sst")
    with pytest.raises(AdapterError, match="named twice"):
        lorank.activate(model, "sst2", "sst2")
    lorank.activate(model)
    with pytest.raises(AdapterError, match="no adapter is active; name one of sst2"):
        lorank.merge(model)


def test_adapt_without_activation_leaves_the_active_ones() -> None:
    model, x = models.llama(), models.ids()
    lorank.adapt(model, LoRA(), "q_proj", name="a")
    models.disturb(model)
    y = model(x).logits
    lorank.adapt(model, LoRA(), "q_proj", name="b", activate=False)
    assert lorank.active_adapters(model) == ["a"]
    assert torch.equal(model(x).logits, y)
    assert set(lorank.adapter_parameters(model)) == set(lorank.adapter_parameters(model, "a"))
    with pytest.raises(AdapterError, match="name one of a, b"):
        lorank.activate(model)
        lorank.remove(model)


def test_inside_a_merged_block_the_model_is_closed(tmp_path: object) -> None:
    model = models.llama()
    lorank.adapt(model, LoRA(), "q_proj")
    models.disturb(model)
    closed = {
        "adapt": lambda: lorank.adapt(model, LoRA(), "v_proj", name="b"),
        "activate": lambda: lorank.activate(model, "default"),
        "remove": lambda: lorank.remove(model),
        "merge": lambda: lorank.merge(model),
        "save": lambda: lorank.save(model, str(tmp_path)),
        "load": lambda: lorank.load(model, str(tmp_path), name="b"),
    }
    with lorank.merged(model):
        for action, attempt in closed.items():
            with pytest.raises(AdapterError, match=f"cannot {action} inside"):
                attempt()
    assert lorank.active_adapters(model) == ["default"]


def test_an_adapter_on_a_submodule_is_found_from_the_whole() -> None:
    model = models.llama()
    before = state(model)
    lorank.adapt(model.model.layers[0], LoRA(), "q_proj")
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert list(lorank.adapter_parameters(model)) == [
        f"model.layers.0.self_attn.q_proj.adapters.default.{f}" for f in "AB"
    ]
    lorank.remove(model)
    assert_same_state(state(model), before)


def test_a_plan_changes_nothing_counts_everything_and_prints() -> None:
    with torch.device("meta"):
        model = models.gpt2()
    before = [type(module) for module in model.modules()]
    plan = lorank.plan(model, LoRA(rank=2), ["c_attn[q,v]"], train_also="lm_head", bias="adapted")
    assert [type(module) for module in model.modules()] == before
    assert plan.trainable_parameters == 2 * 2 * 2 * (32 + 32) + 97 * 32 + 2 * 96
    text = str(plan)
    assert re.search(r"transformer\.h\.\{0-1\}\.attn\.c_attn\[q\] +x 2 +Conv1D +32 x 32 +rank 2, alpha 16 +256\n", text)
    assert f"{plan.trainable_parameters:,} parameters to train" in text
    lorank.adapt(model, LoRA(rank=2), ["c_attn[q,v]"], train_also="lm_head", bias="adapted")
    assert plan.trainable_parameters == sum(p.numel() for p in lorank.adapter_parameters(model).values())


def test_an_attribute_that_lorank_needs_is_not_overwritten() -> None:
    class Own(nn.Linear):
        adapters = "mine"

    with pytest.raises(AdapterError, match="attribute `adapters` of its own"):
        lorank.adapt(models.sequential(Own(4, 4)), LoRA(rank=1), "0")


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # pyright: ignore[reportIncompatibleMethodOverride, reportAttributeAccessIssue]
    with pytest.raises(AdapterError, match="was replaced on the instance"):
        lorank.adapt(models.sequential(layer), LoRA(rank=1), "0")


def test_loading_and_adapting_a_good_model_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorank.adapt(models.llama(), LoRA(), "all-linear")
