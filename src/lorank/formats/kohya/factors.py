"""The tensors that a file has of one layer, as those of our methods.

Cores of Tucker decompositions (`lora_mid`, `hada_t1`, `lokr_t2`) are multiplied into the factors beside them, which is
exactly the same update: core (r, r, *kernel) and A (r, in) make A (r, in, *kernel).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import AdapterError, dtype_name, enumerate_names
from ...variants import DoRA, LoHa, LoKr, LoRA, Spec
from .kronecker import rank_of, sides, spec_of

Found = Mapping[str, Tensor]  # by kind

_LORA = {"lora_down.weight": "A", "lora_up.weight": "B"}
_LOHA = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
_LOKR = {"lokr_w1": "C", "lokr_w1_a": "CB", "lokr_w1_b": "CA", "lokr_w2": "D", "lokr_w2_a": "DB", "lokr_w2_b": "DA"}
_CORES = {"LoRA": {"lora_mid.weight"}, "LoHa": {"hada_t1", "hada_t2"}, "LoKr": {"lokr_t2"}}
NAMES = {"LoRA": _LORA, "LoHa": _LOHA, "LoKr": _LOKR}

_DIFFERENCE = "a difference of the whole {}, and no adapter: add it to the base, and it is merged"
_REFUSED = {
    "diff": _DIFFERENCE.format("weight"),
    "diff_b": _DIFFERENCE.format("bias"),
    "w_norm": _DIFFERENCE.format("weight of a norm"),
    "b_norm": _DIFFERENCE.format("bias of a norm"),
    "oft_blocks": "an orthogonal transform of the weight (OFT, BOFT)",
    "oft_diag": "an orthogonal transform of the weight (OFT)",
    "rescale": "an orthogonal transform's (OFT, BOFT)",
    "on_input": "(IA)³'s",
    "weight": "(IA)³'s, or the layer's own weight",
    "lambda_layer": "T-LoRA's",
    "q_layer.weight": "T-LoRA's",
    "p_layer.weight": "T-LoRA's",
    "lokr_t1": "a core of lokr_w1, which LyCORIS itself never used",
    "scalar": "a factor that LyCORIS multiplies into the others when it saves them",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA's"),
}
KINDS = {"alpha", "dora_scale", *_REFUSED, *(k for kinds in (*NAMES.values(), *_CORES.values()) for k in kinds)}

_LARGEST_PAIR = 2**28  # numbers that the pair of a LoKr may have which no spec of ours describes


@dataclass
class Layer:
    """What a file says of one layer."""

    spec: Spec
    tensors: dict[str, Tensor]
    matrix: tuple[int, int]  # (out, in · kernel)
    kernel: tuple[int, ...] = ()  # of a convolution, where the file tells it
    remarks: set[str] = field(default_factory=set)  # what was done to read it


NO_ALPHA = "no alpha, which kohya takes as the rank (scale 1)"
CORES = "the cores of a Tucker decomposition, which were multiplied into the factors beside them"
AS_PAIR = "a LoKr of a division for which lorank has no setting, which was multiplied out to LoRA"


def read_layer(found: Found, weight: tuple[int, ...] | None, alpha: float | None, dropout: float) -> Layer:
    """Return what a file's tensors of one layer are.

    weight: the shape (out, in / groups, *kernel) of the layer's weight, where that is known.
    alpha: for a file that has none. Raises AdapterError for what is none of our methods.
    """
    for kind, tensor in found.items():
        if kind in _REFUSED:
            raise AdapterError(f"{kind} is {_REFUSED[kind]}")
        if kind not in KINDS:
            raise AdapterError(f"{kind} is no tensor that lorank knows of this format")
        if not tensor.is_floating_point():
            raise AdapterError(f"{kind} is {dtype_name(tensor.dtype)} in the file; it must be floating-point")
        if not tensor.numel():
            raise AdapterError(f"{kind} is empty: {tuple(tensor.shape)}")
    methods = [method for method, names in NAMES.items() if found.keys() & (names.keys() | _CORES[method])]
    if len(methods) != 1:
        raise AdapterError(f"the file has factors of {' and '.join(methods) or 'no method'} for it")
    read = _READERS[methods[0]](found, weight, _alpha(found, alpha), dropout)
    if "alpha" not in found and alpha is None:
        read.remarks.add(NO_ALPHA)
    if found.keys() & _CORES[methods[0]]:
        read.remarks.add(CORES)
    return read


def _alpha(found: Found, given: float | None) -> float | None:
    """Return the numerator of the scale; None where the file has none."""
    if "alpha" not in found:
        return given
    if found["alpha"].numel() != 1:
        raise AdapterError(f"alpha is {tuple(found['alpha'].shape)}; it must be one number")
    alpha = float(found["alpha"])
    if not math.isfinite(alpha) or not alpha:
        raise AdapterError(f"alpha is {alpha:g}; of 0 kohya makes the scale 1, and other tools no update at all")
    return alpha


def _lora(found: Found, weight: tuple[int, ...] | None, alpha: float | None, dropout: float) -> Layer:
    down, up, core = _needed(found, "lora_down.weight"), _needed(found, "lora_up.weight"), found.get("lora_mid.weight")
    B = _matrix("lora_up.weight", up)
    A = down if core is None else _with_core("lora_mid.weight", core, _matrix("lora_down.weight", down))
    if A.dim() < 2 or A.shape[0] != B.shape[1]:
        raise AdapterError(f"lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} are no pair of factors")
    rank, kernel = A.shape[0], _kernel(A, weight)
    tensors = {"A": A.flatten(1), "B": B}
    matrix = _checked(B.shape[0], tensors["A"].shape[1], weight)
    variant = LoRA
    if "dora_scale" in found:
        variant = DoRA
        tensors["magnitude"] = _magnitude(found["dora_scale"], B.shape[0])
    return Layer(variant(rank, rank if alpha is None else alpha, dropout), tensors, matrix, kernel)


def _magnitude(scale: Tensor, out: int) -> Tensor:
    """Return DoRA's magnitude (out,)."""
    if scale.dim() and scale.shape[0] == scale.numel() == out:
        return scale.flatten()
    raise AdapterError(
        f"dora_scale is {tuple(scale.shape)}, and {out} rows have as many lengths: LyCORIS can scale columns instead "
        "(wd_on_out=False), which DoRA here does not"
    )


def _loha(found: Found, weight: tuple[int, ...] | None, alpha: float | None, dropout: float) -> Layer:
    _no_dora(found)
    tensors, kernel = {}, ()
    for number in "12":
        rows, columns = (_needed(found, f"hada_w{number}_{letter}") for letter in "ab")
        core = found.get(f"hada_t{number}")
        if core is not None:
            rows, columns = _core_of(found, "hada_w" + number, core, f"hada_t{number}")
            kernel = _kernel(columns, weight)
        if rows.dim() != 2 or columns.dim() < 2 or rows.shape[1] != columns.shape[0]:
            raise AdapterError(
                f"hada_w{number}_a {tuple(rows.shape)} and hada_w{number}_b {tuple(columns.shape)} are no pair"
            )
        tensors |= {f"B{number}": rows, f"A{number}": columns.flatten(1)}
    if tensors["A1"].shape != tensors["A2"].shape or tensors["B1"].shape != tensors["B2"].shape:
        raise AdapterError("its two products are of different shapes or ranks")
    rank = tensors["A1"].shape[0]
    matrix = _checked(tensors["B1"].shape[0], tensors["A1"].shape[1], weight)
    return Layer(LoHa(rank, rank if alpha is None else alpha, dropout), tensors, matrix, kernel)


def _lokr(found: Found, weight: tuple[int, ...] | None, alpha: float | None, dropout: float) -> Layer:
    _no_dora(found)
    tensors, kernel = {}, ()
    for name, key in (("C", "lokr_w1"), ("D", "lokr_w2")):
        given = {kind for kind in (key, f"{key}_a", f"{key}_b") if kind in found}
        if given not in ({key}, {f"{key}_a", f"{key}_b"}):
            raise AdapterError(f"the file has {enumerate_names(sorted(given)) or f'no {key}'} for it, no whole factor")
        if key in found:
            tensors[name] = found[key]
            continue
        core = found.get("lokr_t2") if name == "D" else None
        rows, columns = (
            (found[f"{key}_a"], found[f"{key}_b"]) if core is None else _core_of(found, key, core, "lokr_t2")
        )
        if rows.dim() != 2 or columns.dim() < 2 or rows.shape[1] != columns.shape[0]:
            raise AdapterError(f"{key}_a {tuple(rows.shape)} and {key}_b {tuple(columns.shape)} are no pair of factors")
        tensors |= {f"{name}B": rows, f"{name}A": columns}
    if "lokr_t2" in found and "D" in tensors:
        raise AdapterError("the file has lokr_t2, which belongs between lokr_w2_a and lokr_w2_b, and a whole lokr_w2")
    if any(tensor.dim() < 2 or (tensor.dim() > 2 and not name.startswith("D")) for name, tensor in tensors.items()):
        raise AdapterError("its lokr_w1 and lokr_w2 are no matrices")
    for name in tensors.keys() & {"D", "DA"}:
        kernel = _kernel(tensors[name], weight)
        tensors[name] = tensors[name].flatten(1)
    (out1, in1), (out2, in2), rank = sides(tensors, "C"), sides(tensors, "D"), rank_of(tensors)
    out, in_ = matrix = _checked(out1 * out2, in1 * in2, weight)
    places = math.prod(kernel if weight is None else weight[2:])
    spec = spec_of(tensors, places, rank if alpha is None and rank else alpha, dropout)
    if spec is not None:
        return Layer(spec, tensors, matrix, kernel)
    scale = 1.0 if rank is None or alpha is None else alpha / rank  # LyCORIS has none where both factors are whole
    height = in1 * tensors["DA"].shape[0] if "DA" in tensors else min(out, in_)
    if height * (out + in_) > _LARGEST_PAIR:
        raise AdapterError(f"its {AS_PAIR}, would be of rank {height}")
    A, B = LoKr().low_rank({name: tensor.to(_wide(tensor)) for name, tensor in tensors.items()})
    return Layer(LoRA(A.shape[0], scale * A.shape[0], dropout), {"A": A, "B": B}, matrix, kernel, {AS_PAIR})


_READERS: dict[str, Callable[[Found, tuple[int, ...] | None, float | None, float], Layer]] = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
}


def _needed(found: Found, kind: str) -> Tensor:
    if kind not in found:
        raise AdapterError(f"the file lacks {kind}")
    return found[kind]


def _no_dora(found: Found) -> None:
    if "dora_scale" in found:
        raise AdapterError("it has a dora_scale, and lorank has DoRA of LoRA alone")


def _matrix(kind: str, tensor: Tensor) -> Tensor:
    """Return a matrix that may be written as the kernel of a convolution with one place."""
    if tensor.dim() < 2 or math.prod(tensor.shape[2:]) != 1:
        raise AdapterError(f"{kind} is {tuple(tensor.shape)}; it must be a matrix")
    return tensor.flatten(1)


def _core_of(found: Found, name: str, core: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return rows (out, r) and columns (r, in, *kernel) of a product with a core, whose rows lie as columns."""
    rows, columns = _needed(found, f"{name}_a"), _needed(found, f"{name}_b")
    if rows.dim() != 2 or columns.dim() != 2 or core.dim() < 2 or core.shape[0] != rows.shape[0]:
        raise AdapterError(f"{name}_a {tuple(rows.shape)} and {kind} {tuple(core.shape)} do not belong together")
    return rows.T, _with_core(kind, core, columns)


def _with_core(kind: str, core: Tensor, A: Tensor) -> Tensor:
    """Return A (r, in, *kernel) of a core (r, r, *kernel) and A (r, in)."""
    if core.dim() < 2 or core.shape[0] != core.shape[1] or core.shape[1] != A.shape[0]:
        raise AdapterError(f"{kind} {tuple(core.shape)} and the factor of {A.shape[0]} rows do not belong together")
    return torch.einsum("ij...,jr->ir...", core.double(), A.double()).to(_wide(A))


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which to compute with a file's tensor."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.element_size() > 1 else torch.float32


def _kernel(A: Tensor, weight: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the kernel that a factor (rank, in, *kernel) is of. Raises AdapterError where its layer has another."""
    kernel = tuple(A.shape[2:])
    if weight is not None and kernel != weight[2:] and kernel and math.prod(kernel) * math.prod(weight[2:]) != 1:
        raise AdapterError(f"its update has the kernel {kernel}, the layer {weight[2:] or 'has none'}")
    return kernel


def _checked(out: int, in_: int, weight: tuple[int, ...] | None) -> tuple[int, int]:
    """Return (out, in) of an update; raises AdapterError unless it is one of this weight."""
    if weight is not None and (out, in_) != (weight[0], math.prod(weight[1:])):
        raise AdapterError(f"its update is ({out}, {in_}), the layer's weight {tuple(weight)}")
    return out, in_
