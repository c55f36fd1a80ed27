"""nn.LSTM, GRU, RNN and their cells: one kernel runs all time steps with a list of all weights, `_flat_weights`."""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lorank
from lorank import LoRA

from .. import models
from .checking import adapt, assert_near

pytestmark = [
    pytest.mark.usefixtures("wide"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights"),  # torch.export of the base does so too
]

BUILD: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTM(5, 4),
    "lstm-deep": lambda: nn.LSTM(5, 4, num_layers=3, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(5, 6, num_layers=2, proj_size=4, bidirectional=True),
    "lstm-without-bias": lambda: nn.LSTM(5, 4, num_layers=2, bias=False),
    "lstm-dropout": lambda: nn.LSTM(5, 4, num_layers=2, dropout=0.5, batch_first=True),
    "gru": lambda: nn.GRU(5, 4, num_layers=2, batch_first=True),
    "gru-bidirectional": lambda: nn.GRU(5, 4, bidirectional=True, bias=False),
    "rnn": lambda: nn.RNN(5, 4, num_layers=2),
    "rnn-relu": lambda: nn.RNN(5, 4, nonlinearity="relu", bidirectional=True, batch_first=True),
}
CELLS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTMCell(5, 4),
    "gru": lambda: nn.GRUCell(5, 4),
    "rnn": lambda: nn.RNNCell(5, 4, bias=False),
}


@pytest.fixture(params=BUILD)
def base(request: pytest.FixtureRequest) -> Any:
    """A recurrent layer in a model of its own."""
    return nn.ModuleDict({"rnn": BUILD[request.param]()}).eval()


def sequences(layer: Any, batch: int | None = 3) -> Tensor:
    """Return sequences of 6 steps."""
    return (
        torch.randn(6, 5) if batch is None else torch.randn(batch, 6, 5) if layer.batch_first else torch.randn(6, 3, 5)
    )


def states(layer: Any, batch: int | None = 3) -> Any:
    """Return what a layer can start from."""
    places = [layer.num_layers * (2 if layer.bidirectional else 1), *([] if batch is None else [batch])]
    hidden = torch.randn(*places, layer.proj_size or layer.hidden_size)
    return (hidden, torch.randn(*places, layer.hidden_size)) if isinstance(layer, nn.LSTM) else hidden


def flat(output: Any) -> list[Tensor]:
    """Return all tensors of an output: of the steps, and the last states."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for one in output if one is not None for tensor in flat(one)]


def size(output: Any) -> Tensor:
    """Return one number of all that a layer returns."""
    return torch.stack([tensor.square().sum() for tensor in flat(output)]).sum()


def assert_same_weights(layer: Any) -> None:
    """Check that a layer's list of weights holds its parameters."""
    listed, own = layer._flat_weights, [layer._parameters[name] for name in layer._flat_weights_names]
    assert len(listed) == len(own) and all(one is other for one, other in zip(listed, own, strict=True))


def test_every_weight_is_a_part_and_no_bias_is(base: Any) -> None:
    layer = base["rnn"]
    plan = lorank.plan(base, LoRA(rank=2), "all-linear")
    weights = [name for name in layer._flat_weights_names if name.startswith("weight")]
    assert [place.part for place in plan.places] == weights
    assert [place.shape for place in plan.places] == [tuple(layer.get_parameter(name).shape) for name in weights]


def test_merged_is_adapted_for_all_kinds_of_input(base: Any) -> None:
    layer = base["rnn"]
    adapt(base, "rnn")
    x = sequences(layer)
    lengths = torch.tensor([6, 2, 4])
    packed = pack_padded_sequence(x, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    inputs: list[tuple[Any, ...]] = [
        (x,),
        (x, states(layer)),
        (sequences(layer, None),),
        (sequences(layer, None), states(layer, None)),
        (packed,),
        (packed, states(layer)),
    ]
    for given in inputs:
        found = layer(*given)
        with lorank.disabled(base):
            plain = layer(*given)
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(tensors(found), tensors(plain), strict=True))
        with torch.no_grad():
            assert_near(tensors(layer(*given)), tensors(found))
            with lorank.merged(base):
                assert_near(tensors(layer(*given)), tensors(found))
    alone = layer(x[1:2, :2] if layer.batch_first else x[:2, 1:2])[0]
    padded = pad_packed_sequence(layer(packed)[0], batch_first=layer.batch_first)[0]
    assert_near(padded[1:2, :2] if layer.batch_first else padded[:2, 1:2], alone)


def tensors(output: Any) -> list[Tensor]:
    sequence, last = output
    return [sequence.data if isinstance(sequence, PackedSequence) else sequence, *flat(last)]


@pytest.mark.parametrize("part", ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hr_l1_reverse"])
def test_a_part_by_its_name_is_the_only_one_with_a_gradient(part: str) -> None:
    model = nn.ModuleDict({"rnn": BUILD["lstm-projected"]()})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for target in (f"rnn[{part}]", f"rnn.{part}", part):
        plan = lorank.adapt(model, LoRA(rank=2), target)
        assert [place.label for place in plan.places] == [f"rnn[{part}]"]
        models.disturb(model)
        model["rnn"](sequences(model["rnn"]))[0].square().sum().backward()
        lorank.check(model, moved=True)
        gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert gradients == {f"rnn.adapters.default.{part}.{factor}" for factor in "AB"}
        lorank.remove(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_gradients_are_those_of_dense_weights(base: Any) -> None:
    adapt(base, "rnn")
    x = sequences(base["rnn"])
    size(base["rnn"](x)).backward()
    lorank.check(base, moved=True)
    dense = copy.deepcopy(base)
    lorank.merge(dense)
    dense.requires_grad_(True)
    size(dense["rnn"](x)).backward()
    for part, leaf in base["rnn"].adapters["default"].named_children():
        gradient = dense["rnn"].get_parameter(part).grad
        assert_near(leaf.B.grad, leaf.scale * gradient @ leaf.A.mT)
        assert_near(leaf.A.grad, leaf.scale * leaf.B.mT @ gradient)


def test_it_trains_and_every_factor_moves(base: Any) -> None:
    layer = base["rnn"].train()
    x = sequences(layer)
    target = torch.randn_like(layer(x)[0])
    lorank.adapt(base, LoRA(rank=2), "rnn")
    losses = []
    config = lorank.TrainConfig(steps=15, learning_rate=3e-2)
    parameters = lorank.adapter_parameters(base)
    steps = lorank.train(parameters, lambda x: (layer(x)[0] - target).square().mean(), itertools.repeat(x), config)
    for step in steps:
        lorank.check(base, moved=step.index > 1)
        losses.append(float(step.loss))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_dropout_between_layers_and_of_the_adapter_follows_the_seed() -> None:
    model = nn.ModuleDict({"rnn": BUILD["lstm-dropout"]()}).train()
    adapt(model, "rnn", dropout=0.5)
    x = sequences(model["rnn"])

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model["rnn"](x)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_of_the_adapter_is_the_same_at_every_step_of_a_sequence() -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(5, 4, nonlinearity="relu", bias=False)}).train()
    adapt(model, "rnn[weight_ih_l0]", dropout=0.5)
    with torch.no_grad():
        model["rnn"].get_parameter("weight_hh_l0").zero_()  # so that every step is a layer by itself
    x = torch.randn(1, 1, 5).expand(6, 1, 5)
    y = model["rnn"](x)[0]
    assert torch.equal(y, y[:1].expand_as(y))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loaded_while_adapted_is_what_is_merged_or_left(base: Any, assign: bool) -> None:
    other, x = copy.deepcopy(base), sequences(base["rnn"])
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    y = other["rnn"](x)
    adapt(base, "rnn")
    for merged in (False, True):
        model = copy.deepcopy(base)
        model.load_state_dict(other.state_dict(), strict=True, assign=assign)
        adapted = model["rnn"](x)
        with lorank.disabled(model):
            assert_near(flat(model["rnn"](x)), flat(y))
        if merged:
            with pytest.warns(lorank.AdapterWarning, match="merged into another base"):
                lorank.merge(model, allow_other_base=True)
        else:
            lorank.remove(model)
        assert_same_weights(model["rnn"])
        assert_near(flat(model["rnn"](x)), flat(adapted if merged else y))


def test_a_parameter_that_is_replaced_while_adapted_is_the_one_that_counts(base: Any) -> None:
    layer, x = base["rnn"], sequences(base["rnn"])
    adapt(base, "rnn")
    with torch.no_grad():
        layer.weight_hh_l0 = nn.Parameter(torch.randn_like(layer._parameters["weight_hh_l0"]))
    y = layer(x)
    twin = copy.deepcopy(base)
    assert_near(flat(twin["rnn"](x)), flat(y))
    with pytest.warns(lorank.AdapterWarning, match="merged into another base"):
        lorank.merge(base, allow_other_base=True)
    assert_near(flat(layer(x)), flat(y))
    assert_same_weights(layer)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_adapted_layer_are_their_own(base: Any, clone: Any) -> None:
    x = sequences(base["rnn"])
    before = base["rnn"](x)
    adapt(base, "rnn")
    y = base["rnn"](x)
    twin = clone(base)
    assert_near(flat(twin["rnn"](x)), flat(y))
    lorank.merge(twin)
    assert_near(flat(twin["rnn"](x)), flat(y))
    assert_same_weights(twin["rnn"])
    with torch.no_grad():
        twin["rnn"].weight_ih_l0.zero_()
    assert_near(flat(base["rnn"](x)), flat(y))
    lorank.remove(base)
    assert_near(flat(base["rnn"](x)), flat(before))


def test_changing_the_dtype_of_an_adapted_layer_changes_its_list_of_weights(base: Any) -> None:
    x = sequences(base["rnn"])
    adapt(base, "rnn")
    y = base["rnn"](x)
    base.float()
    narrow = base["rnn"](x.float())
    assert narrow[0].dtype == torch.float32
    torch.testing.assert_close([tensor.double() for tensor in flat(narrow)], flat(y), rtol=1e-4, atol=1e-4)
    lorank.merge(base)
    assert_same_weights(base["rnn"])
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    torch.testing.assert_close(flat(base["rnn"](x.float())), flat(narrow), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="dtype"):
        base["rnn"](x)


def test_two_adapters_add_up_switch_and_go_one_after_the_other(base: Any) -> None:
    layer, x = base["rnn"], sequences(base["rnn"])
    plain = layer(x)
    outputs = {}
    for name, target in (("all", "rnn"), ("one", "rnn[weight_hh_l0]")):
        lorank.adapt(base, LoRA(rank=2, alpha=2), target, name=name)
        models.disturb(base, name, size=0.5)
        outputs[name] = layer(x)
    lorank.activate(base, "all", "one")
    both = layer(x)
    lorank.activate(base, "all")
    assert_near(flat(layer(x)), flat(outputs["all"]))
    lorank.activate(base, "all", "one")
    lorank.merge(twin := copy.deepcopy(base))
    assert_near(flat(twin["rnn"](x)), flat(both))
    lorank.remove(base, "all")
    lorank.activate(base, "one")
    assert_near(flat(layer(x)), flat(outputs["one"]))
    lorank.remove(base)
    assert_near(flat(layer(x)), flat(plain))
    assert_same_weights(layer)


# The compiler hides this warning by a filter that does not hold where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_a_compiled_model_computes_the_same(kind: str) -> None:
    model = nn.ModuleDict({"rnn": BUILD[kind]()}).eval()
    adapt(model, "rnn")
    x = sequences(model["rnn"])
    y = model["rnn"](x)
    compiled: Any = torch.compile(model["rnn"], backend="aot_eager")
    found = compiled(x)
    assert_near(flat(found), flat(y))
    found[0].square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in lorank.adapter_parameters(model).values()]  # pyright: ignore
    model.zero_grad()
    y[0].square().sum().backward()
    assert_near(gradients, [parameter.grad for parameter in lorank.adapter_parameters(model).values()])
    lorank.activate(model)
    assert not torch.allclose(compiled(x)[0], y[0], atol=1e-3)


def test_a_file_goes_round(base: Any, tmp_path: Path) -> None:
    x = sequences(base["rnn"])
    adapt(base, "rnn")
    y = base["rnn"](x)
    lorank.save(base, tmp_path)
    lorank.remove(base)
    lorank.load(base, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(flat(base["rnn"](x)), flat(y), strict=True))


def test_functional_call_reaches_an_adapted_layer(base: Any) -> None:
    x = sequences(base["rnn"])
    adapt(base, "rnn")
    own = {name: torch.randn_like(p) for name, p in base.named_parameters() if "adapters." not in name}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = base["rnn"]

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    found = torch.func.functional_call(Whole(), own, (x,))
    base.load_state_dict(own, strict=True)
    assert_near(found, base["rnn"](x)[0])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_cells_are_adapted(kind: str, batch: tuple[int, ...]) -> None:
    model: Any = nn.ModuleDict({"cell": CELLS[kind]()})
    x, hidden = torch.randn(*batch, 5), torch.randn(*batch, 4)
    state = (hidden, torch.randn(*batch, 4)) if kind == "lstm" else hidden
    adapt(model, "all-linear")
    for given in ((x,), (x, state)):
        y = flat(model["cell"](*given))
        with torch.no_grad(), lorank.merged(model):
            assert_near(flat(model["cell"](*given)), y)
        with lorank.disabled(model):
            assert not torch.allclose(flat(model["cell"](*given))[0], y[0], atol=1e-3)
    flat(model["cell"](x, state))[0].square().sum().backward()
    lorank.check(model, moved=True)
    lorank.merge(model)
    assert_near(flat(model["cell"](*given)), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cudnn_is_given_the_adapted_weights(base: Any) -> None:
    layer, x = base.float().cuda()["rnn"], sequences(base["rnn"]).float().cuda()
    adapt(base, "rnn")
    for train in (True, False):
        y = base.train(train)["rnn"](x)[0]
        if train:
            y.square().sum().backward()
            lorank.check(base, moved=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], y, rtol=1e-3, atol=1e-3)
    lorank.merge(base)
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(base.cpu()["rnn"](x.cpu())[0], y.cpu(), rtol=1e-3, atol=1e-3)
