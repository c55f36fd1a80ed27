"""The steps that every model goes through: adapt, two training steps, merge, save, load. Nothing of it is silent."""

import copy
import dataclasses
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorank

SPEC = lorank.LoRA(rank=2, alpha=2)
TOLERANCE = 1e-4
NEEDS_INPUT_GRADIENTS = "trains after model.enable_input_require_grads()"
ROUNDING_SHOWS = "compared with a wider tolerance, because the model turns rounding into visible differences"
IN_FLOAT64 = "compared in float64, because the model amplifies rounding"
VANISHED = 1e-12  # a largest gradient below it is rounding


class DiffersError(AssertionError):
    """Outputs that should be equal differ, at most by `worst`."""

    def __init__(self, text: str, worst: float):
        super().__init__(text)
        self.worst = worst


class NotRunError(Exception):
    """The model itself cannot be run here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of a family: how to build it, always with the same weights, and the arguments of its forward."""

    family: str
    model: str  # the name of its class
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Any], Mapping[str, Any]]
    train_mode: bool = True


@dataclasses.dataclass
class Result:
    """What became of a case."""

    family: str
    model: str = ""
    kind: str = ""
    outcome: str = ""  # "works", "refused", "FAULT" or "not run"
    reason: str = ""
    layers: int = 0
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # reason -> layers
    unused: list[str] = dataclasses.field(default_factory=list)  # layers that this input does not reach
    remarks: list[str] = dataclasses.field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0


def run(case: Case) -> Result:
    """Run one case; whatever happens is in the result."""
    result = Result(case.family, case.model, case.kind)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lorank.AdapterWarning)
        try:
            _steps_in_enough_digits(case, result)
            result.outcome = "works"
        except NotRunError as error:
            result.outcome, result.reason = "not run", str(error)
        except lorank.AdapterError as error:
            refused = result.outcome == "planning"
            result.outcome, result.reason = ("refused" if refused else "FAULT"), str(error)
        except AssertionError as error:
            result.outcome, result.reason = "FAULT", str(error)
        except Exception as error:
            result.outcome, result.reason = "FAULT", _told(error)
    texts = (str(warning.message) for warning in caught if issubclass(warning.category, lorank.AdapterWarning))
    result.remarks += dict.fromkeys(texts)
    result.seconds = time.perf_counter() - started
    return result


def _steps_in_enough_digits(case: Case, result: Result) -> None:
    """Take the steps in float32, and where rounding explains what differs there, in float64."""
    try:
        _steps(case, result, torch.float32, TOLERANCE)
    except AssertionError as error:
        again = dataclasses.replace(result, left_out={}, unused=[])
        try:
            _steps(case, again, torch.float64, TOLERANCE / 10)
        except Exception:
            moved = _moved_by_rounding(case) if isinstance(error, DiffersError) else 0.0
            if not isinstance(error, DiffersError) or moved < error.worst / 2:
                raise error from None
            result.layers, result.left_out, result.unused = 0, {}, []
            _steps(case, result, torch.float32, 2 * moved)
            result.remarks.append(f"{ROUNDING_SHOWS}: a change of its weights by 1e-6 moves the outputs by {moved:.2g}")
            return
        result.remarks.append(f"{IN_FLOAT64}; in float32 {error}")


def _moved_by_rounding(case: Case) -> float:
    """Return how far the merged model's outputs move when its weights move by a millionth."""
    model, inputs, train = _prepared(case, torch.float32)
    lorank.adapt(model, SPEC, "all-linear", tie=True)
    _train(model, inputs, train)
    _disturb(model)
    lorank.merge(model)
    before = forward(model, inputs)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    return max(float((x - y).abs().max()) for x, y in zip(forward(model, inputs), before, strict=True))


def _steps(case: Case, result: Result, dtype: torch.dtype, tolerance: float) -> None:
    model, inputs, train = _prepared(case, dtype)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    base = forward(model, inputs)
    idle, called = _reached(model, inputs, train)

    result.outcome = "planning"
    plan = lorank.plan(model, SPEC, "all-linear")
    shared = {id(p) for module in model.modules() if id(module) in called for p in module._parameters.values()}
    result.unused = [place.name for place in plan.places if _is_idle(place.layer, idle, called, shared)]
    kinds = Counter(type(place.layer).__name__ for place in plan.places if place.name not in result.unused)
    if len(result.unused) == len(plan.places):
        raise NotRunError("this input reaches none of the layers")
    plan = lorank.adapt(model, SPEC, ["all-linear", *(f"!{name}" for name in result.unused)], tie=True)
    result.outcome = ""
    result.layers = len(plan.layers)
    result.by_kind = {kind: number for kind, number in kinds.items() if number}
    for name, reason in plan.left_out.items():
        result.left_out.setdefault(reason, []).append(name)
    _assert_equal(forward(model, inputs), base, "a fresh adapter changes the outputs")

    try:
        _train(model, inputs, train)
    except lorank.AdapterError:
        if any(p.grad is not None for p in lorank.adapter_parameters(model).values()):
            raise
        if not hasattr(model, "enable_input_require_grads"):
            raise
        model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
        result.remarks.append(f"{NEEDS_INPUT_GRADIENTS}, as check says")
        _train(model, inputs, train)
    _disturb(model)
    adapted = forward(model, inputs)
    _assert_different(adapted, base)
    with lorank.merged(model):
        _assert_equal(forward(model, inputs), adapted, "in the merged block", tolerance)
    _assert_equal(forward(model, inputs), adapted, "after the merged block", 1e-6)
    with tempfile.TemporaryDirectory() as folder:
        lorank.save(model, Path(folder) / "adapter")
        fresh = built(case, dtype)
        lorank.load(fresh, Path(folder) / "adapter")
    _assert_equal(forward(fresh, inputs), adapted, "after save and load", 1e-5)
    lorank.merge(fresh)
    if lorank.adapter_names(fresh):
        raise AssertionError("adapters are left after the merge")
    _assert_equal(forward(fresh, inputs), adapted, "after the merge", tolerance)
    twin = _copied(model)
    if twin is None:
        result.remarks.append("the model cannot be copied by copy.deepcopy")
    else:
        lorank.merge(twin)
        _assert_equal(forward(twin, inputs), adapted, "in a merged copy", tolerance)
    lorank.remove(model)
    _assert_equal(forward(model, inputs), base, "after remove", 1e-6)


def _prepared(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Mapping[str, Any], bool]:
    """Return the model, its inputs, and whether it trains in train mode; raises NotRunError if it does not run."""
    try:
        model = built(case, dtype)
        inputs = {name: _cast(value, dtype) for name, value in case.inputs(model).items()}
        first = forward(model, inputs)
        again = forward(model, inputs)
    except Exception as error:
        raise NotRunError(_told(error)) from error
    if not any(usable(x).numel() for x in first):
        raise NotRunError("its outputs hold no finite number")
    if any(not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(first, again, strict=True)):
        raise NotRunError("two forward passes differ")
    train = case.train_mode and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return model, inputs, train


def built(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the case's model in eval mode, with weights of visible size that depend on their names alone."""
    torch.manual_seed(0)
    model = case.build().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            size = 0.05 if parameter.dim() < 2 else 1 / max(1, parameter[0].numel()) ** 0.5
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model = model.to(dtype).eval()
    _calibrate(model, case)
    return model


def _calibrate(model: nn.Module, case: Case) -> None:
    """Give every BatchNorm the statistics of the case's own input; with the initial ones activations can vanish."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    torch.manual_seed(2)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model(**{name: _cast(value, dtype) for name, value in case.inputs(model).items()})
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the floating-point outputs of a model in eval mode."""
    model.eval()
    torch.manual_seed(2)
    with torch.no_grad():
        return [x.detach().clone() for x in floats(model(**inputs))]


def floats(output: Any) -> list[Tensor]:
    """Return every floating-point tensor in an output."""
    if isinstance(output, Tensor):
        output = torch.view_as_real(output) if output.is_complex() else output
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [x for item in output for x in floats(item)]
    return []


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the model's own loss, where it has one, and the distance of all outputs from fixed random values."""
    torch.manual_seed(2)
    output = model(**inputs)
    own = getattr(output, "loss", None)
    total = (
        own if isinstance(own, Tensor) and own.requires_grad and own.dim() == 0 and own.isfinite() else torch.zeros(())
    )
    for i, x in enumerate(floats(output)):
        if x.requires_grad and x.dim():
            target = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x.dtype)
            distance = usable(x - target)
            total = total + distance.square().mean() if distance.numel() else total
    return total


def usable(x: Tensor) -> Tensor:
    """Return the entries that are numbers, and no mask."""
    return x[x.isfinite() & (x.abs() < 1e6)]


def _reached(model: nn.Module, inputs: Mapping[str, Any], train: bool) -> tuple[set[int], set[int]]:
    """Return the ids of parameters that this input's loss does not depend on, and of the modules that are called."""
    called: set[int] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in model.modules()]
    model.requires_grad_(True)
    model.train(train)
    try:
        loss = loss_of(model, inputs)
        loss.backward()
    except Exception as error:
        raise NotRunError(f"in training: {_told(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not loss.isfinite():
        raise NotRunError("its loss is not finite")
    idle = {id(p) for p in model.parameters() if p.grad is None or not p.numel() or p.grad.abs().max() < VANISHED}
    model.zero_grad(set_to_none=True)
    model.eval()
    return idle, called


def _is_idle(layer: nn.Module, idle: set[int], called: set[int], shared: set[int]) -> bool:
    """Tell whether a layer's weights do not matter, or matter only through another layer that shares them."""
    weights = [id(p) for name, p in layer._parameters.items() if p is not None and "bias" not in name]
    return all(key in idle or (id(layer) not in called and key in shared) for key in weights)


def _train(model: nn.Module, inputs: Mapping[str, Any], train: bool) -> None:
    model.train(train)
    config = lorank.TrainConfig(steps=2, learning_rate=1e-3)
    parameters = lorank.adapter_parameters(model)
    try:
        for step in lorank.train(parameters, lambda batch: loss_of(model, batch), [inputs] * 2, config):
            lorank.check(model, moved=step.index > 1)
    except lorank.AdapterError as error:
        without = [name.partition(".adapters.")[0] for name, p in parameters.items() if p.grad is None]
        layers = ", ".join(dict.fromkeys(without))
        raise lorank.AdapterError(f"{layers}: {error}" if layers else str(error)) from error
    model.eval()


def _disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in lorank.adapter_parameters(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _assert_equal(found: list[Tensor], wanted: list[Tensor], when: str, tolerance: float = TOLERANCE) -> None:
    if len(found) != len(wanted):
        raise AssertionError(f"{when}: {len(found)} outputs instead of {len(wanted)}")
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        scale = max(1.0, float(usable(y).abs().max())) if usable(y).numel() else 1.0
        if x.shape != y.shape:
            raise AssertionError(f"{when}: output {i} has the shape {tuple(x.shape)} instead of {tuple(y.shape)}")
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            worst = float((torch.nan_to_num(x) - torch.nan_to_num(y)).abs().max())
            raise DiffersError(f"{when}: output {i} differs by {worst:.3g}, on a scale of {scale:.3g}", worst)


def _assert_different(adapted: list[Tensor], base: list[Tensor]) -> None:
    if len(adapted) != len(base):  # of boxes, for example
        return
    for x, y in zip(adapted, base, strict=True):
        if x.shape != y.shape or not torch.allclose(x, y, rtol=2 * TOLERANCE, atol=2 * TOLERANCE, equal_nan=True):
            return
    raise AssertionError("the adapter has no effect")


def _copied(model: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(model)
    except Exception:
        return None


def failed(family: str, error: BaseException) -> Result:
    """Return the result of a case that could not even be made."""
    return Result(family, outcome="not run", reason=str(error) if isinstance(error, NotRunError) else _told(error))


def _told(error: BaseException) -> str:
    """Return an exception as one line, with the place where it was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})" if frame is not None else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"
