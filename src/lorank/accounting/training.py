"""What a step of training takes: bytes and operations, found by following one without computing it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..surgery import adapter_parameters
from ..tree import active_adapters, base_modules
from .kernels import kernels_of
from .simulation import Simulation

Loss = Callable[[], Tensor | tuple[Tensor, object]]


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step at the moment when it takes most, by what they hold."""

    base: int  # the base's weights and buffers
    adapter: int  # the adapters'; 0 where the base itself is trained
    gradients: int
    optimiser: int  # its moments
    activations: int  # what the peak has beyond: activations, and temporaries of the backward pass

    @property
    def total(self) -> int:
        """The peak."""
        return self.base + self.adapter + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True)
class StepCosts:
    """What one training step takes. Operations are those of `Simulation`."""

    memory: Memory
    kept: int  # bytes that the forward pass keeps for the backward pass, the batch among them
    forward_flops: int
    step_flops: int  # forward and backward


def training_costs(
    model: nn.Module, loss: Loss, *, accumulate: bool = False, device: str = "cpu", moments: int = 2
) -> StepCosts:
    """Return what a step takes of training the active adapters; of training the model itself where it has none.

    model: in train mode; on the meta device nothing is computed.
    loss: runs it on a batch and returns the loss, or a pair of the loss and something else.
    accumulate: the step has several batches, so that gradients are there when a forward pass begins.
    device: the kind of device that the step is to run on, such as "cpu" or "cuda"; see `kernels_of`.
    moments: numbers that the optimiser keeps for each trained one, in its dtype; AdamW has two.

    The order is that of `lorank.train`: gradients of the step before are gone when a step begins, the moments are there
    (from the second step on), and AdamW's fused kernel takes no memory of its own. Gradients of the model are lost.
    """
    trained = _trained(model)
    simulation = Simulation()
    for tensor in _tensors(base_modules(model)):
        simulation.add(tensor)
    base = simulation.live
    for tensor in _tensors(model.named_modules()):
        simulation.add(tensor)
    adapter = simulation.live - base
    for parameter in trained:
        parameter.grad = None
        if accumulate:
            parameter.grad = parameter.detach().clone()
            simulation.add(parameter.grad)
    before = simulation.live
    with kernels_of(device), simulation:
        value = loss()
        value = value[0] if isinstance(value, tuple) else value
        kept, forward = simulation.live - before, simulation.flops
        value.backward()
    gradients = sum(_bytes(parameter.grad) for parameter in trained if parameter.grad is not None)
    for parameter in trained:
        parameter.grad = None
    # The optimiser has moments of what got a gradient, from the first moment of the step to its last.
    memory = Memory(base, adapter, gradients, moments * gradients, simulation.peak - base - adapter - gradients)
    return StepCosts(memory, kept, forward, simulation.flops)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    if active_adapters(model):
        return list(adapter_parameters(model).values())
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _tensors(modules: Iterable[tuple[str, nn.Module]]) -> Iterable[Tensor]:
    for _, module in modules:
        yield from (t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
