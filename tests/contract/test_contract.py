"""The promises, for every host with every variant. Read from top to bottom it is the specification."""

import copy
import pickle
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank.adapted import Adapted
from lorank.tree import adapted_layers
from lorank.variants import Adapter, LoRAAdapter, Spec, Update

from ..models import disturb
from .cases import CASES, REFUSALS, SPECS, UNSEEN, Case, adapt, show_data

# of PyTorch itself, about a base without adapters too
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights"),
]


_GRID = [(case, spec) for spec in SPECS for case in CASES if case not in REFUSALS.get(spec, {})]
_GRID.remove((UNSEEN, "eva"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "spec"} <= set(metafunc.fixturenames):
        pairs = [pair for pair in _GRID if "compiled" not in metafunc.function.__name__ or _is_compiled(*pair)]
        found = [pytest.param(CASES[case], SPECS[spec], id=f"{case}-{spec}") for case, spec in pairs]
        metafunc.parametrize("case, spec", found)


def _is_compiled(case: str, spec: str) -> bool:
    """Tell whether to compile a pair: of methods beside LoRA a host of each way to compute, as it takes its time."""
    return spec == "lora" or case in ("linear", "fused-interleaved", "conv-2d", "parameter")


@pytest.mark.parametrize("on, method", [(case, spec) for spec, cases in REFUSALS.items() for case in cases])
def test_a_method_that_makes_no_sense_says_so(on: str, method: str) -> None:
    model = CASES[on].model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(lorank.AdapterError, match=REFUSALS[method][on]):
        lorank.adapt(model, SPECS[method], CASES[on].targets)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inputs_that_cannot_be_seen_are_refused_when_they_are_asked_for() -> None:
    with pytest.raises(lorank.AdapterError, match="EVA sees no inputs of a layer that only reads its weight"):
        adapt(CASES[UNSEEN].model(), SPECS["eva"], CASES[UNSEEN])


def adapted(case: Case, spec: Spec, **options: object) -> tuple[nn.Module, Tensor]:
    """Return an adapted model whose adapter has an effect, and an input."""
    model = case.model()
    adapt(model, spec, case, **options)
    disturb(model)
    return model, case.inputs()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_an_adapted_model_starts_as_the_base(case: Case, spec: Spec) -> None:
    model, x = case.model(), case.inputs()
    before = model(x)
    adapt(model, spec, case)
    assert torch.equal(model(x), before)


def test_an_adapter_with_values_has_an_effect(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    y = model(x)
    with lorank.disabled(model):
        assert not torch.allclose(y, model(x), atol=1e-4)


def test_base_names_and_bits_are_untouched(case: Case, spec: Spec) -> None:
    model, x = case.model(), case.inputs()
    before, identities = bits(model), {name: id(p) for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    adapt(model, spec, case)
    for step in lorank.train(lorank.adapter_parameters(model).values(), lambda x: model(x).square().mean(), [x] * 3):
        assert torch.isfinite(step.loss)
    base = {name: tensor for name, tensor in model.state_dict().items() if "adapters." not in name}
    assert same_bits(base, before)
    parameters = dict(model.named_parameters())
    assert all(id(parameters[name]) == identity for name, identity in identities.items())
    assert all(isinstance(model.get_submodule(name), cls) for name, cls in classes.items())


def test_only_the_adapter_gets_gradients(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    model(x).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(lorank.adapter_parameters(model))
    lorank.check(model)


def test_merged_equals_unmerged(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    y = model(x)
    report = lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert report.worst is not None
    assert report.worst.relative_error < 1e-5
    assert not adapted_layers(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_merge_is_the_rounded_float32_merge(case: Case, spec: Spec, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    adapt(model, spec, case)
    disturb(model)
    assert {p.dtype for p in lorank.adapter_parameters(model).values()} == {torch.float32}
    expected: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        for leaf in cast(Adapter, layer.adapters["default"]).leaves():
            assert isinstance(leaf, Update)
            key = f"{name}.{leaf.attribute(layer)}".removeprefix(".")
            W = expected.setdefault(key, leaf.host.weight(layer, leaf.part).detach().float())
            delta = leaf.delta_weight(layer).detach()
            if type(leaf) is LoRAAdapter:
                assert torch.equal(delta, leaf.scale * leaf.B.detach() @ leaf.A.detach())
            expected[key] = W + leaf.host.stored(layer, leaf.part, delta)
    lorank.merge(model)
    for name, wide in expected.items():
        W, merged = wide.to(dtype), model.get_parameter(name)
        ulp = W.abs().float() * torch.finfo(dtype).eps
        assert ((merged.float() - W.float()).abs() <= ulp).all()
        assert (merged != W).float().mean() < 1e-2  # a half may fall the other way in another order of products


def test_a_merged_block_computes_the_same_and_restores_the_bits(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    model.to(torch.bfloat16).float()  # weights for which adding and subtracting again would not be the identity
    before, y = bits(model), model(x)
    with lorank.merged(model) as report:
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        assert lorank.active_adapters(model) == []
        assert len(report.rows) > 0
    assert same_bits(bits(model), before)
    assert torch.equal(model(x), y)


def test_a_merged_block_restores_the_bits_after_an_exception(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    before, y = bits(model), model(x)
    with pytest.raises(RuntimeError, match="inside"), lorank.merged(model):
        raise RuntimeError("inside")
    assert same_bits(bits(model), before)
    assert torch.equal(model(x), y)


def test_remove_leaves_no_trace(case: Case, spec: Spec) -> None:
    model, x = case.model(), case.inputs()
    next(model.parameters()).requires_grad_(False)  # a choice of the user, to be found again
    before, y = bits(model), model(x)
    attributes = {name: (type(m), list(m.__dict__), list(m._modules)) for name, m in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapt(model, spec, case, bias="adapted" if case.has_bias else "none")
    adapt(model, spec, case, name="second")
    disturb(model)
    lorank.remove(model, "default")
    lorank.remove(model)
    assert {name: (type(m), list(m.__dict__), list(m._modules)) for name, m in model.named_modules()} == attributes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert same_bits(bits(model), before)
    assert torch.equal(model(x), y)


def test_merge_leaves_an_ordinary_model(case: Case, spec: Spec) -> None:
    model = case.model()
    attributes = {name: (type(m), list(m.__dict__), list(m._modules)) for name, m in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapt(model, spec, case)
    disturb(model)
    lorank.merge(model)
    assert {name: (type(m), list(m.__dict__), list(m._modules)) for name, m in model.named_modules()} == attributes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(case: Case, spec: Spec, clone: object) -> None:
    model, x = adapted(case, spec)
    twin = clone(model)  # pyright: ignore[reportCallIssue]
    y = model(x)
    assert torch.equal(twin(x), y)
    disturb(twin)
    assert torch.equal(model(x), y)
    assert not torch.equal(twin(x), y)
    lorank.merge(twin)
    assert lorank.active_adapters(model) == ["default"]


def test_a_file_brings_the_same_adapter_back(case: Case, spec: Spec, tmp_path: Path) -> None:
    model, x = adapted(case, spec)
    y = model(x)
    parameters = {name: p.clone() for name, p in lorank.adapter_parameters(model).items()}
    lorank.save(model, tmp_path / "adapter")
    lorank.remove(model)
    plan = lorank.load(model, tmp_path / "adapter")
    assert torch.equal(model(x), y)
    assert plan.spec == (spec if not isinstance(spec, lorank.VeRA) else plan.places[0].spec)
    loaded = lorank.adapter_parameters(model)
    assert list(loaded) == list(parameters)
    assert all(torch.equal(loaded[name], parameters[name]) for name in parameters)


def test_a_compiled_model_has_no_graph_break(case: Case, spec: Spec) -> None:
    if not case.compiles:
        pytest.skip("torch.compile breaks the graph of the base itself")
    model, x = adapted(case, spec)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)
    model(x).square().sum().backward()
    gradients = [parameter.grad for parameter in lorank.adapter_parameters(model).values()]
    model.zero_grad()
    compiled(x).square().sum().backward()
    compiled_gradients = [parameter.grad for parameter in lorank.adapter_parameters(model).values()]
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-4, atol=1e-4)
    lorank.activate(model)
    base = compiled(x)
    assert not torch.allclose(base, y, atol=1e-4)
    with lorank.disabled(model):
        torch.testing.assert_close(base, model(x), rtol=1e-5, atol=1e-5)


def test_an_exported_compiled_model_computes_the_same(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_it_works_under_autocast(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    disturb(model, size=0.7)  # for an effect above the rounding of large outputs
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        z.float().square().sum().backward()
        with lorank.merged(model):  # the fold itself stays in float32
            merged = model(x)
    with lorank.disabled(model):
        effect = (y - model(x)).norm()
    assert (z.float() - y).norm() < 0.25 * effect
    assert (merged.float() - y).norm() < 0.25 * effect
    lorank.check(model)


def test_a_base_checkpoint_loads_after_adapt(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    other = case.model().requires_grad_(False)  # frozen as this one is: PyTorch has other kernels for that
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    with lorank.disabled(model):
        assert torch.equal(model(x), other(x))


def test_an_adapted_checkpoint_must_be_whole(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    y, checkpoint = model(x), bits(model)
    lorank.reset(model)
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(model(x), y)
    checkpoint.pop(next(name for name in checkpoint if "adapters." in name))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(checkpoint, strict=True)


def test_a_model_can_be_adapted_on_the_meta_device(case: Case, spec: Spec) -> None:
    reference = case.model()
    model = copy.deepcopy(reference).to("meta")
    plan = adapt(model, spec, case)
    assert plan.trainable_parameters == sum(p.numel() for p in lorank.adapter_parameters(model).values())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    for name, buffer in reference.named_buffers():  # what no state dict holds
        model.get_buffer(name).copy_(buffer)
    lorank.reset(model)
    show_data(model, spec, case)
    x = case.inputs()
    assert torch.equal(model(x), reference(x))
    disturb(model)
    assert not torch.equal(model(x), reference(x))


def test_two_adapters_add_up_and_switch(case: Case, spec: Spec) -> None:
    model, x = adapted(case, spec)
    a = model(x)
    lorank.adapt(model, lorank.LoRA(rank=2), case.targets, name="other")
    assert lorank.active_adapters(model) == ["other"]
    disturb(model)
    b = model(x)
    lorank.activate(model, "default")
    assert torch.equal(model(x), a)
    lorank.activate(model, "other")
    assert torch.equal(model(x), b)
    lorank.activate(model, "default", "other")
    lorank.adapt(model, lorank.LoRA(rank=1), case.targets, name="third")
    disturb(model)
    lorank.activate(model, "default", "other", "third")
    together = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), together, rtol=1e-5, atol=3e-5)
    assert lorank.adapter_names(model) == []


def test_a_trained_bias_belongs_to_the_adapter(case: Case, spec: Spec, tmp_path: Path) -> None:
    if not case.has_bias:
        with pytest.raises(lorank.AdapterError, match=r"finds no bias|cannot train"):
            lorank.adapt(case.model(), spec, case.targets, bias="adapted")
        return
    model, x = case.model(), case.inputs()
    before = model(x)
    adapt(model, spec, case, bias="adapted")
    assert torch.equal(model(x), before)
    disturb(model)
    y = model(x)
    with lorank.disabled(model):
        assert torch.equal(model(x), before)
    lorank.save(model, tmp_path)
    fresh = copy.deepcopy(model)
    lorank.remove(fresh)
    lorank.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), y, rtol=1e-6, atol=1e-6)  # the file holds bias + offset, rounded
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_adapted_layers_print_what_they_carry(case: Case, spec: Spec) -> None:
    model, _ = adapted(case, spec)
    layer = next(iter(adapted_layers(model).values()))
    assert isinstance(layer, Adapted)
    assert f"rank={spec.rank}" in repr(layer)
    assert "active=['default']" in repr(layer)
