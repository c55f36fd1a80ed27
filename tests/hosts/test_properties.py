"""What every host promises, over shapes, strides, paddings, groups, ranks and dtypes that hypothesis chooses."""

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import AdapterWarning, LoRA
from lorank.tree import adapted_layers

# of PyTorch itself, about a base without adapters too
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

Draw = Callable[[st.SearchStrategy[Any]], Any]
# How far outputs may differ, in units of the size of what they are made of.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}

few = settings(max_examples=30, deadline=None, derandomize=True)
small = st.integers(1, 4)
dtypes = st.sampled_from(list(TOLERANCES))
leading = st.lists(st.integers(1, 3), max_size=3)


class Alone(nn.Module):
    """A model of one layer, of whose outputs it returns the first."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.layer = layer
        self.options = options

    def forward(self, *inputs: Any) -> Tensor:
        output = self.layer(*inputs, **self.options)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Sample:
    """A layer, inputs for it, and what of it to adapt."""

    layer: nn.Module
    inputs: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: ["layer"])


def converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(converted(one, dtype) for one in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, in which -0.0 is not 0.0."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def all_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def assert_near(found: Tensor, expected: Tensor, size: Tensor) -> None:
    """Check that outputs agree up to the rounding of their dtype; size is the norm of what was added up to them."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    difference = torch.linalg.vector_norm((found - expected).double())
    assert difference <= TOLERANCES[found.dtype] * size, f"{difference} for {size}"


def adapted(model: nn.Module, sample: Sample, spec: LoRA) -> lorank.Plan:
    """Adapt, and hold the warnings against the ranks that the layer's matrices can have."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", AdapterWarning)
        plan = lorank.adapt(model, spec, sample.targets)
    too_high = any(spec.rank > min(place.shape[-2:]) for place in plan.places)
    assert bool(told) == too_high
    assert all("above the layer's own" in str(warning.message) for warning in told)
    with torch.no_grad():
        for parameter in lorank.adapter_parameters(model).values():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return plan


def check_matrix(place: Any) -> None:
    """Check that `stored` and `write` are inverses of `matrix`."""
    host, layer, part = place.host, place.layer, place.part
    parameter = host.weight(layer, part)
    W, before = host.matrix(layer, part).detach().clone(), parameter.detach().clone()
    assert tuple(W.shape) == place.shape and W.dtype == parameter.dtype
    host.write(layer, part, W)
    assert torch.equal(bits(parameter), bits(before))
    parameter.data.zero_()
    host.write(layer, part, W)
    assert torch.equal(parameter, host.stored(layer, part, W))  # with zeros where other parts are
    assert torch.equal(bits(host.matrix(layer, part)), bits(W))
    parameter.data.copy_(before)


def check_file(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Check that an adapter that was saved and loaded is the same one, bit for bit."""
    before, y = {name: bits(p).clone() for name, p in lorank.adapter_parameters(model).items()}, model(*inputs)
    with tempfile.TemporaryDirectory() as folder:
        lorank.save(model, folder)
        lorank.remove(model)
        lorank.load(model, folder)
    assert same_bits({name: bits(p) for name, p in lorank.adapter_parameters(model).items()}, before)
    assert torch.equal(model(*inputs), y)


def check(sample: Sample, rank: int, dtype: torch.dtype, rank_stabilised: bool = False) -> None:
    """Check all that is promised of a host, on one layer with one input."""
    torch.manual_seed(1)
    model = Alone(sample.layer, sample.options).to(dtype).eval()
    inputs = converted(tuple(sample.inputs), dtype)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = all_bits(model)
    with torch.no_grad():
        own = model(*inputs)
        base = copy.deepcopy(model).requires_grad_(False)(*inputs)  # PyTorch has other kernels for frozen weights
    plan = adapted(model, sample, LoRA(rank, 3.0, rank_stabilised=rank_stabilised))
    for place in plan.places:
        check_matrix(place)
    y = model(*inputs)
    y.double().square().sum().backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == set(lorank.adapter_parameters(model))
    size = torch.linalg.vector_norm(torch.stack([y, base]).double()) + torch.linalg.vector_norm((y - base).double())
    with torch.no_grad():
        assert_near(model(*inputs), y.detach(), size)
        with lorank.disabled(model):
            assert torch.equal(model(*inputs), base)
        check_file(model, inputs)
        with lorank.merged(model):
            assert_near(model(*inputs), y.detach(), size)
    lorank.remove(model)
    assert not adapted_layers(model)
    assert same_bits(all_bits(model), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    with torch.no_grad():
        assert torch.equal(model(*inputs), own)


def samples(build: Callable[..., Sample]) -> Callable[[], st.SearchStrategy[Sample]]:
    """Make a strategy of a function that draws a sample; its weights are the same whenever it is drawn again."""

    @functools.wraps(build)
    def seeded(draw: Draw) -> Sample:
        torch.manual_seed(0)
        return build(draw)

    return st.composite(seeded)


def per_dimension(draw: Draw, count: int, numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
    return tuple(draw(numbers) for _ in range(count))


@samples
def linears(draw: Draw) -> Sample:
    in_, out = draw(small), draw(small)
    return Sample(nn.Linear(in_, out, bias=draw(st.booleans())), [torch.randn(*draw(leading), in_)])


@samples
def transposed_linears(draw: Draw) -> Sample:
    in_, out = draw(small), draw(small)
    return Sample(Conv1D(out, in_), [torch.randn(*draw(leading), in_)])


@samples
def embeddings(draw: Draw) -> Sample:
    number = draw(small)
    padding = draw(st.one_of(st.none(), st.integers(-number, number - 1)))
    by_frequency, sparse = draw(st.booleans()), draw(st.booleans())
    layer = nn.Embedding(number, draw(small), padding, scale_grad_by_freq=by_frequency, sparse=sparse)
    return Sample(layer, [torch.randint(number, draw(leading))])


@samples
def convolutions(draw: Draw) -> Sample:
    dimensions, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, dilation = (per_dimension(draw, dimensions, st.integers(1, 3)) for _ in range(2))
    stride = per_dimension(draw, dimensions, st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        stride = (1,) * dimensions
    elif padding == "numbers":
        padding = per_dimension(draw, dimensions, st.integers(0, 2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    # Large enough for the kernel, and to take a padding of as much from.
    sizes = [max(d * (k - 1) + 1, 3) + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return Sample(layer, [torch.randn(*batch, layer.in_channels, *sizes)])


@samples
def transposed_convolutions(draw: Draw) -> Sample:
    dimensions, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = (per_dimension(draw, dimensions, st.integers(1, 3)) for _ in range(3))
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    layer: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        more,
        groups,
        draw(st.booleans()),
        dilation,
    )
    # With so many places, more than the padding takes away is left of the output.
    sizes = [-(-p // s) * 2 + draw(st.integers(1, 2)) for p, s in zip(padding, stride, strict=True)]
    options = {}
    if draw(st.booleans()):
        geometry = zip(sizes, kernel, stride, dilation, padding, strict=True)
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, d, p in geometry]
        options["output_size"] = [n + draw(st.integers(0, s - 1)) for n, s in zip(least, stride, strict=True)]
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return Sample(layer, [torch.randn(*batch, layer.in_channels, *sizes)], options)


@samples
def attentions(draw: Draw) -> Sample:
    heads, lengths = draw(st.integers(1, 3)), per_dimension(draw, 2, small)
    dimension = heads * draw(st.integers(1, 3))
    keys, values = (draw(st.one_of(st.none(), small)) for _ in range(2))
    layer = nn.MultiheadAttention(
        dimension,
        heads,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=keys,
        vdim=values,
        batch_first=draw(st.booleans()),
    )
    shapes = [[lengths[0], dimension], [lengths[1], layer.kdim], [lengths[1], layer.vdim]]
    if draw(st.booleans()):  # a batch
        shapes = [[2, *shape] if layer.batch_first else [shape[0], 2, shape[1]] for shape in shapes]
    parts = draw(st.lists(st.sampled_from(["q", "k", "v", "out"]), unique=True))
    targets = [f"layer[{','.join(parts)}]" if parts else "layer"]
    return Sample(layer, [torch.randn(shape) for shape in shapes], {"need_weights": draw(st.booleans())}, targets)


@samples
def recurrent_layers(draw: Draw) -> Sample:
    kind: Any = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    in_, hidden, layers, both = draw(small), draw(st.integers(2, 4)), draw(st.integers(1, 2)), draw(st.booleans())
    options: dict[str, Any] = {"bias": draw(st.booleans()), "batch_first": draw(st.booleans())}
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    layer = kind(in_, hidden, layers, bidirectional=both, **options)
    steps, batch = draw(small), draw(st.sampled_from([None, 1, 2]))
    shape = [steps, in_] if batch is None else [batch, steps, in_] if layer.batch_first else [steps, batch, in_]
    inputs: list[Any] = [torch.randn(shape)]
    if draw(st.booleans()):  # states to start from
        places = [layers * (1 + both)] if batch is None else [layers * (1 + both), batch]
        state = torch.randn(*places, layer.proj_size or hidden)
        inputs.append((state, torch.randn(*places, hidden)) if kind is nn.LSTM else state)
    chosen = draw(st.sampled_from(["layer", "layer.weight_ih_l0", "layer.weight_hh_l0", "layer[weight_hh_l0]"]))
    return Sample(layer, inputs, targets=[chosen])


@samples
def cells(draw: Draw) -> Sample:
    kind: Any = draw(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]))
    in_, hidden = draw(small), draw(small)
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    inputs: list[Any] = [torch.randn(*batch, in_)]
    if draw(st.booleans()):
        state = torch.randn(*batch, hidden)
        inputs.append((state, torch.randn(*batch, hidden)) if kind is nn.LSTMCell else state)
    return Sample(kind(in_, hidden, bias=draw(st.booleans())), inputs)


@samples
def bilinears(draw: Draw) -> Sample:
    first, second, places = draw(small), draw(small), draw(leading)
    layer = nn.Bilinear(first, second, draw(small), bias=draw(st.booleans()))
    return Sample(layer, [torch.randn(*places, first), torch.randn(*places, second)])


class Mixture(nn.Module):
    """Stacks of matrices and a matrix, as parameters of its own."""

    def __init__(self, number: int, in_: int, out: int, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        self.before = nn.Parameter(torch.randn(in_, in_))
        self.stack = nn.Parameter(torch.randn(number, *((in_, out) if is_transposed else (out, in_))))

    def forward(self, x: Tensor) -> Tensor:
        stack = self.stack if self.is_transposed else self.stack.mT
        return torch.einsum("bi,eio->beo", x @ self.before, stack)


@samples
def parameters(draw: Draw) -> Sample:
    layer = Mixture(draw(small), draw(small), draw(small), draw(st.booleans()))
    targets = draw(st.sampled_from([["stack"], ["layer.before"], ["layer.stack", "before"], ["re:layer\\..*"]]))
    return Sample(layer, [torch.randn(2, layer.before.shape[0])], targets=targets)


KINDS: dict[str, st.SearchStrategy[Sample]] = {
    "linear": linears(),
    "transposed-linear": transposed_linears(),
    "embedding": embeddings(),
    "convolution": convolutions(),
    "transposed-convolution": transposed_convolutions(),
    "attention": attentions(),
    "recurrent": recurrent_layers(),
    "cell": cells(),
    "bilinear": bilinears(),
    "parameter": parameters(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_host_keeps_its_promises(kind: str) -> None:
    @few
    @given(KINDS[kind], st.integers(1, 6), dtypes, st.booleans())
    def holds(sample: Sample, rank: int, dtype: torch.dtype, rank_stabilised: bool) -> None:
        check(sample, rank, dtype, rank_stabilised)

    holds()
