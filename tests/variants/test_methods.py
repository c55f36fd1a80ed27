"""What holds of the methods beside LoRA, without another library to compare with."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, DoRA, LoHa, LoKr, LoRA, LoRAFA, LoRAGA, MiLoRA, PiSSA, TrainConfig, VeRA
from lorank.accounting import training_costs
from lorank.tree import adapted_layers
from lorank.variants import vera

from ..contract.cases import CASES, REFUSALS, adapt
from ..models import Plain, disturb, ids
from .cases import METHODS, Stack, leaves, stacked

SHIFTED = ["pissa", "pissa-randomised", "olora", "milora", "lora-ga"]
HOSTS = ["linear", "conv1d", "fused-contiguous", "conv-2d", "conv-grouped", "embedding", "experts", "attention"]
GRID = [(n, host) for n, spec in METHODS.items() for host in HOSTS if host not in REFUSALS.get(spec.variant, {})]


@pytest.mark.parametrize("method, host", GRID)
def test_the_low_rank_form_is_the_update(method: str, host: str) -> None:
    spec, case = METHODS[method], CASES[host]
    model = case.model()
    adapt(model, spec, case)
    disturb(model)
    for layer in adapted_layers(model).values():
        entry: Any = layer.adapters["default"]
        for leaf in entry.leaves():
            shape = leaf.host.shape(layer, leaf.part)
            if isinstance(spec, DoRA):
                with pytest.raises(AdapterError, match="DoRA has no low-rank form apart from its base"):
                    leaf.spec.low_rank(leaf.tensors(), shape)
                continue
            A, B = leaf.spec.low_rank(leaf.tensors(), shape)
            assert A.shape[-2] == B.shape[-1] and (isinstance(spec, LoKr) or A.shape[-2] == leaf.spec.factor_rank)
            delta = leaf.delta_weight(layer)
            assert delta.shape == shape and delta.any()
            torch.testing.assert_close(leaf.scale * B @ A, delta, rtol=1e-4, atol=1e-6)


def test_vera_needs_the_shape_of_its_matrix() -> None:
    tensors = {"d": torch.ones(4), "b": torch.ones(3)}
    with pytest.raises(AdapterError, match="do not tell the shape of its matrix"):
        VeRA(rank=4, projection=(8, 8)).low_rank(tensors)
    with pytest.raises(AdapterError, match="not known before it is put on a model"):
        VeRA(rank=4).low_rank(tensors, (3, 5))


def test_vera_shares_one_pair_between_layers() -> None:
    model = stacked(VeRA(rank=4, seed=5))
    disturb(model)
    found = leaves(model)
    spec = found["first"].spec
    assert spec == found["second"].spec and spec.projection == (8, 8)
    A, B = spec.pair(8, 8)
    for name, leaf in found.items():
        out, in_ = model.get_submodule(name).weight.shape
        expected = leaf.b[:, None] * B[:out] @ (leaf.d[:, None] * A[:, :in_])
        torch.testing.assert_close(leaf.delta_weight(model.get_submodule(name)), expected)
    assert vera.drawn(5, 4, 8, 8)[0] is vera.drawn(5, 4, 8, 8)[0]  # one in memory
    assert sorted(key.rpartition(".")[2] for key in model.state_dict() if "adapters" in key) == ["b", "b", "d", "d"]
    with pytest.raises(AdapterError, match=r"first: it is 8 x 6, and the random pair of this adapter is for \(7, 9\)"):
        lorank.adapt(Stack(), VeRA(rank=4, projection=(7, 9)), ["first"])


def test_vera_trains_with_a_pair_that_was_first_used_in_inference_mode() -> None:
    model = stacked(VeRA(rank=6, seed=91))  # a seed that no other test has drawn
    with torch.inference_mode():
        model(torch.randn(2, 6))
    model(torch.randn(2, 6)).sum().backward()
    assert lorank.check(model) == []


@pytest.mark.parametrize("method", METHODS)
def test_the_meta_device_counts_what_a_real_one_computes(method: str) -> None:
    with torch.device("meta"):
        empty, x = Stack(), torch.randn(9, 6)
    lorank.adapt(empty, METHODS[method], ["first", "second"])
    model = stacked(METHODS[method])
    real = torch.randn(9, 6)
    assert empty(x).shape == model(real).shape  # VeRA's frozen matrices are made when they are first used
    counted = training_costs(empty, lambda: empty(x).square().mean())
    assert counted == training_costs(model, lambda: model(real).square().mean())


@pytest.mark.parametrize("method", SHIFTED)
def test_a_start_that_is_not_zero_leaves_the_base_and_goes_into_a_file_of_twice_the_rank(
    method: str, tmp_path: Path
) -> None:
    spec, base, x = METHODS[method], Stack(), torch.randn(4, 6)
    model: Any = copy.deepcopy(base)
    lorank.adapt(model, spec, ["first", "second"])
    if isinstance(spec, LoRAGA):
        lorank.calibrate(model, lambda x: model(x).square().mean(), [x])
    assert torch.equal(model(x), base(x))
    found = leaves(model)
    assert all(leaf.A.any() and leaf.B.any() and not leaf.delta_weight(None).any() for leaf in found.values())
    for _ in lorank.train(lorank.adapter_parameters(model), lambda x: model(x).square().mean(), [x] * 3):
        pass
    assert not torch.equal(model(x), base(x))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items())
    lorank.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.first.lora_A.weight"].shape == (4, 6)
    assert tensors["base_model.model.first.lora_B.weight"].shape == (8, 4)
    again = copy.deepcopy(base)
    assert lorank.load(again, tmp_path).spec == spec
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("method", SHIFTED)
@pytest.mark.parametrize("host", HOSTS)
def test_a_start_that_is_not_zero_changes_nothing_with_dropout_either(method: str, host: str) -> None:
    spec: Any = dataclasses.replace(METHODS[method], dropout=0.5)
    case = CASES[host]
    model, x = case.model().eval(), case.inputs()
    expected = model(x)
    adapt(model, spec, case)
    for layer in adapted_layers(model).values():
        layer.adapters.train()
    assert torch.equal(model(x), expected)
    for layer in adapted_layers(model).values():
        entry: Any = layer.adapters["default"]
        for leaf in entry.leaves():
            assert leaf.training and leaf.A.any()
            assert not leaf.change(layer).any() and not leaf.delta_weight(layer).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_two_layers_have_is_trained_by_both(method: str) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.T)  # other memory order, one storage
    spec, x = METHODS[method], torch.randn(9, 6)
    if spec.variant in ("dora", "loha", "lokr"):
        with pytest.raises(AdapterError, match="has no form for that"):
            lorank.adapt(model, spec, ["0", "2"], tie=True)
        return
    lorank.adapt(model, spec, ["0", "2"], tie=True)
    if isinstance(spec, lorank.EVA | LoRAGA):
        lorank.calibrate(model, lambda x: model(x).square().mean(), [x])
    disturb(model)
    delta = model[0].adapters["default"].delta_weight(model[0])
    W = model[0].weight.detach() + delta
    assert delta.any()
    torch.testing.assert_close(model(x), torch.tanh(x @ W.T) @ W)


@pytest.mark.parametrize("method", ["pissa", "milora"])
@pytest.mark.parametrize("alpha", [3, -0.5])
def test_singular_vectors_of_the_weight_are_taken_whole(method: str, alpha: float) -> None:
    spec = PiSSA(rank=2, alpha=alpha) if method == "pissa" else MiLoRA(rank=2, alpha=alpha)
    W = torch.randn(7, 5, dtype=torch.float64)
    A, B = spec.start(W)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    part = slice(2) if method == "pissa" else slice(3, 5)
    torch.testing.assert_close(spec.scale * B @ A, U[:, part] @ S[part].diag() @ V[part])
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))  # each has the root
    if method == "pissa":
        randomised = PiSSA(rank=2, alpha=alpha, iterations=8).start(W)
        torch.testing.assert_close(randomised[1] @ randomised[0], B @ A)


def test_the_rows_of_lora_fa_are_orthogonal_and_never_move() -> None:
    model, x = stacked(LoRAFA(rank=3)), torch.randn(4, 6)
    starts = {name: leaf.A.clone() for name, leaf in leaves(model).items()}
    assert sorted(lorank.adapter_parameters(model)) == ["first.adapters.default.B", "second.adapters.default.B"]
    for _ in lorank.train(lorank.adapter_parameters(model), lambda x: model(x).square().mean(), [x] * 3):
        pass
    for name, leaf in leaves(model).items():
        torch.testing.assert_close(leaf.A @ leaf.A.T, torch.eye(3) / 3)
        assert torch.equal(leaf.A, starts[name]) and leaf.B.any()


@pytest.mark.parametrize("method", METHODS)
def test_everything_trains(method: str) -> None:
    model, x = stacked(METHODS[method]), torch.randn(9, 6)
    model(x).square().mean().backward()
    assert lorank.check(model) == []
    model.zero_grad()
    start = {name: parameter.detach().clone() for name, parameter in lorank.adapter_parameters(model).items()}
    config = TrainConfig(steps=3, learning_rate=1e-2)
    for _ in lorank.train(lorank.adapter_parameters(model), lambda x: model(x).square().mean(), [x], config):
        pass
    assert lorank.check(model, moved=True) == []
    assert not any(torch.equal(parameter, start[name]) for name, parameter in lorank.adapter_parameters(model).items())


FAST = {
    "dora": {"B"},
    "pissa": {"B"},
    "vera": {"b"},
    "adalora": {"B"},
    "loha": {"B1", "B2"},
    "lokr": {"DB"},
    "lokr-both": {"CB", "DB"},
}


@pytest.mark.parametrize("method", FAST)
def test_lora_plus_gives_the_side_of_the_output_its_own_rate(method: str) -> None:
    spec = METHODS[method]
    if isinstance(spec, LoKr):
        spec = LoKr(rank=1, alpha=2, decompose_both=spec.decompose_both, factor=4)
    model, x = stacked(spec), torch.randn(9, 6)
    twin = copy.deepcopy(model)
    config = TrainConfig(steps=3, learning_rate=1e-3, lora_plus=16, clip=None)
    for _ in lorank.train(lorank.adapter_parameters(model), lambda x: model(x).square().mean(), [x], config):
        pass
    groups = lorank.parameter_groups(twin, 1e-3, ratio=16)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in lorank.adapter_parameters(twin).items()}
    assert {names[id(p)] for group in groups if group["lr"] == 16e-3 for p in group["params"]} <= FAST[method]
    assert {names[id(p)] for group in groups if group["lr"] == 1e-3 for p in group["params"]}.isdisjoint(FAST[method])
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(3):
        optimiser.zero_grad()
        twin(x).square().mean().backward()
        optimiser.step()
    for one, other in zip(lorank.adapter_parameters(model).values(), lorank.adapter_parameters(twin).values()):  # noqa: B905
        torch.testing.assert_close(one, other)


def test_lora_plus_needs_something_to_hasten() -> None:
    model = stacked(LoKr(rank=64))
    with pytest.raises(AdapterError, match="LoRA\\+ has nothing to do"):
        lorank.parameter_groups(model, 1e-3)
    with pytest.raises(AdapterError, match="LoRA\\+ has nothing to do"):
        next(lorank.train(lorank.adapter_parameters(model), model, [1], TrainConfig(lora_plus=2)))
    found = lorank.adapter_parameters(stacked(LoRA(rank=2)))
    for parameters in (found.values(), dict(found)):  # which of them is a B, nothing says
        with pytest.raises(AdapterError, match="lora_plus needs what lorank"):
            next(lorank.train(parameters, model, [1], TrainConfig(lora_plus=2)))
    with pytest.raises(AdapterError, match="ratio is 0"):
        lorank.parameter_groups(stacked(LoRA(rank=2)), 1e-3, ratio=0)


def test_methods_stand_beside_each_other_in_one_model(tmp_path: Path) -> None:
    model, x = Plain(), ids()
    lorank.adapt(model, DoRA(rank=2), ["up"], name="dora")
    lorank.adapt(model, VeRA(rank=4), ["up", "down"], name="vera")
    lorank.adapt(model, PiSSA(rank=2), ["embed", "down"], name="pissa")
    lorank.adapt(model, LoHa(rank=2), ["head", "up"], name="loha")
    names = ["dora", "vera", "pissa", "loha"]
    for name in names:
        disturb(model, name)
        lorank.save(model, tmp_path / name, name)
    lorank.activate(model, *names)
    y = model(x)
    fresh = copy.deepcopy(model)
    for name in names:
        lorank.remove(fresh, name)
    for name in names:
        lorank.load(fresh, tmp_path / name, name)
    lorank.activate(fresh, *names)
    assert torch.equal(fresh(x), y)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


class Head(nn.Module):
    """A head whose parameters are called as those of updates are."""

    def __init__(self) -> None:
        super().__init__()
        self.B, self.b = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.B + self.b


def test_lora_plus_does_not_hasten_what_is_only_called_like_a_b() -> None:
    model: Any = nn.Sequential(Stack(), Head())
    lorank.adapt(model, LoRA(rank=2), ["first"], train_also=["1"])
    twin = copy.deepcopy(model)
    lorank.reset(twin)
    for one in (model, twin):
        slow, fast = lorank.parameter_groups(one, 1e-3, 16)
        named = lorank.adapter_parameters(one)
        assert fast["lr"] == 16 * slow["lr"] and len(slow["params"]) == 3
        assert [p is named["0.first.adapters.default.B"] for p in fast["params"]] == [True]
    head = {key: p.detach().clone() for key, p in model[1].adapters["default"].named_parameters()}
    config = TrainConfig(steps=1, learning_rate=1e-3, lora_plus=16, clip=None)
    x = torch.ones(3, 6)
    for _ in lorank.train(lorank.adapter_parameters(model), lambda x: model(x).square().mean(), [x], config):
        pass
    for key, parameter in model[1].adapters["default"].named_parameters():
        assert 0 < float((parameter.detach() - head[key]).abs().max()) < 1.1e-3


WRONG = [
    (lorank.AdaLoRA, {"orthogonality": "x"}, "orthogonality is 'x'; it must be a finite number of at least 0"),
    (lorank.AdaLoRA, {"orthogonality": -1}, "orthogonality is -1; it must be a finite number of at least 0"),
    (lorank.AdaLoRA, {"beta1": 0}, "beta1 is 0; it must be a number in (0, 1)"),
    (lorank.AdaLoRA, {"beta2": 1.0}, "beta2 is 1.0; it must be a number in (0, 1)"),
    (lorank.EVA, {"rho": "2"}, "rho is '2'; it must be a finite number of at least 1"),
    (lorank.EVA, {"rho": 0.5}, "rho is 0.5; it must be a finite number of at least 1"),
    (PiSSA, {"iterations": True}, "iterations is True; it must be a whole number of at least 1"),
    (PiSSA, {"iterations": 0}, "iterations is 0; it must be a whole number of at least 1"),
    (LoKr, {"decompose_both": "no"}, "decompose_both is 'no'; it must be True or False"),
    (LoRA, {"rank_stabilised": 1}, "rank_stabilised is 1; it must be True or False"),
    (LoRAGA, {"gamma": -16}, "gamma is -16; it must be a finite number above 0"),
    (LoRAGA, {"gamma": float("nan")}, "gamma is nan; it must be a finite number above 0"),
    (VeRA, {"projection": 5}, "projection is 5; it must be two sizes"),
]


@pytest.mark.parametrize("spec, fields, says", WRONG, ids=lambda value: str(value)[:30])
def test_a_field_of_the_wrong_kind_is_named(spec: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(says)):
        spec(**fields)
