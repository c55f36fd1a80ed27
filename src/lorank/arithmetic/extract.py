"""Extraction: the adapter that is nearest to the difference of two checkpoints."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterError, AdapterWarning, enumerate_names, raise_problems
from ..fingerprint import fingerprint
from ..formats import as_path, writable, write
from ..formats.content import Content, LayerUpdate, note_layer, own_tensors
from ..models import empty_base, known_labels, task_of
from ..names import label_of
from ..planning import Bias, Place, Plan, plan
from ..targets import Targets
from ..tree import unwrapped
from ..variants import LoRA
from .factors import require_rank_or_energy, trainable, truncated_dense
from .reports import Report, Row, warn_of_losses
from .updates import most_common, plain_spec
from .weights import LoadedWeights, StoredWeights, Weights, same

Tuned = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Extraction:
    """An adapter made of the difference of two models."""

    content: Content
    report: Report
    left_out: dict[str, str]  # tensors that differ and are not in the adapter, with the reason
    model: nn.Module = field(repr=False)  # of that architecture; on the meta device when it came from folders

    def save(self, path: str | os.PathLike[str], *, format: str = "peft") -> None:
        """Write the adapter in a file format, as `lorank.save` does."""
        if format not in writable():
            raise AdapterError(f"cannot save: unknown format '{format}'; known are {', '.join(writable())}")
        for note in write(self.content, as_path(path), format, self.model):
            warnings.warn(f"{path}: {note}", AdapterWarning, stacklevel=2)

    def __str__(self) -> str:
        return str(self.report)


def extract(
    base: Tuned,
    tuned: Tuned,
    targets: Targets = "all-linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    train_also: str | Sequence[str] = (),
    bias: Bias = "none",
    task: str | None = None,
    device: str | torch.device | None = None,
) -> Extraction:
    """Return the adapter that is nearest to what fine-tuning changed, and the error of every layer.

    base, tuned: two folders of safetensors checkpoints, which are read tensor by tensor, so that no model is in
        memory; or two models in memory, for everything else.
    targets: layers, as of `adapt`; those that fine-tuning left alone get no update.
    rank, energy: of every layer: a rank, or the share of the squared singular values of the difference to keep.
    train_also: modules that are taken whole, such as a new head.
    bias: take the biases of the "adapted" layers too, or of "all".
    task: what the folders' models are for: causal-lm, classification or regression; by default as their
        configuration says.
    device: where differences are decomposed; by default where they are.

    Tensors that differ and go into none of these are listed in the result, and warned of: the base with the adapter
    is not the tuned model then. Raises AdapterError for models that do not have the same layers.
    """
    require_rank_or_energy(rank, energy)
    before, after, purpose = _weights(base, tuned, task)
    made = plan(after.model, LoRA(rank=1), targets, train_also=train_also, bias=bias, tie=True)
    _require_all(before, after, made)
    content = Content(LoRA(), bias=bias, task=purpose, about=_about(tuned, purpose))
    rows, notes = _add_updates(content, before, after, made, rank, energy, device)
    content.tied = {name: tie for name, (_, tie) in made.tied.items() if tie.source in content.updates}
    _add_whole(content, after, made)
    if not content.updates and not any(_changed_whole(before, after, made)):
        raise AdapterError("cannot extract: the two have the same weights in all that is targeted")
    left_out = dict(_left_out(before, after, made))
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    lost = [f"{len(names)} tensors {reason}: {enumerate_names(names, 4)}" for reason, names in reasons.items()]
    how = f"rank {rank}" if rank is not None else f"{energy:.6g} of the energy"
    report = Report(f"extracted with {how}", tuple(rows), (*notes, *lost))
    if lost:
        text = f"the base with this adapter is not the tuned model: {'; '.join(lost)}"
        warnings.warn(text, AdapterWarning, stacklevel=2)
    warn_of_losses(report)
    return Extraction(content, report, left_out, after.model)


def _weights(base: Tuned, tuned: Tuned, task: str | None) -> tuple[Weights, Weights, str | None]:
    """Return the two sets of weights, and what their models are for where that is known."""
    if isinstance(base, nn.Module) and isinstance(tuned, nn.Module):
        return LoadedWeights(unwrapped(base)), LoadedWeights(unwrapped(tuned)), task
    if isinstance(base, nn.Module) or isinstance(tuned, nn.Module):
        raise AdapterError("cannot extract: give two folders, or two models")
    folders = Path(base).expanduser(), Path(tuned).expanduser()
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    raise_problems("cannot extract", [f"there is no folder {folder}" for folder in missing])
    if task not in (None, "causal-lm", "classification", "regression"):
        raise AdapterError(f"cannot extract: task is {task!r}; it must be causal-lm, classification or regression")
    name = str(folders[1])
    chosen = task or task_of(name) or "causal-lm"
    skeleton = empty_base(name, chosen, labels=len(known_labels(name)))
    return StoredWeights(folders[0], skeleton), StoredWeights(folders[1], skeleton), chosen


def _about(tuned: Tuned, task: str | None) -> dict[str, object]:
    """Return what the adapter's file says of its purpose."""
    about: dict[str, object] = {"task": task} if task else {}
    if task == "classification" and not isinstance(tuned, nn.Module):
        labels = known_labels(str(Path(tuned).expanduser()))
        about |= {} if all(label.startswith("LABEL_") for label in labels) else {"labels": labels}
    return about


def _require_all(before: Weights, after: Weights, made: Plan) -> None:
    """Raise AdapterError where one of the two lacks what is to be compared, or has it in another shape."""
    problems = []
    keys = {_key(place): True for place in made.places}
    keys |= {f"{name}.bias".removeprefix("."): True for name in made.biases}
    keys |= {f"{name}.{key}": False for name, module in made.copies.items() for key in own_tensors(module)}
    for key, in_both in keys.items():
        first, second = before.known_as(key), after.known_as(key)
        if second is None or (in_both and first is None):
            which = "tuned model" if second is None else "base"
            problems.append(
                f"the {which} has no {key}; where a checkpoint keeps weights under other names or stacked, load the "
                "two models and give these"
            )
        elif in_both and first is not None and before.shape(first) != after.shape(second):
            problems.append(
                f"{key} is {before.shape(first)} in the base and {after.shape(second)} in the tuned model; no update "
                "changes a shape (leave it out with '!', or take it whole with train_also)"
            )
    raise_problems("cannot extract", problems)


def _add_updates(
    content: Content,
    before: Weights,
    after: Weights,
    made: Plan,
    rank: int | None,
    energy: float | None,
    device: str | torch.device | None,
) -> tuple[list[Row], list[str]]:
    """Put an update of every place that changed into the content; return their rows, and notes."""
    rows: list[Row] = []
    unchanged: list[str] = []
    dtypes: set[tuple[str, str]] = set()
    for place in made.places:
        W0, then = before.matrix(place.name, place.host, place.part)
        W1, now = after.matrix(place.name, place.host, place.part)
        if same(W0, W1):
            unchanged.append(place.label)
            continue
        dtypes |= {(then, now)} if then != now else set()
        wide = torch.promote_types(torch.promote_types(W0.dtype, W1.dtype), torch.float32)
        change = W1.to(wide) - W0.to(W1.device, wide)
        if not torch.isfinite(change).all():
            raise AdapterError(f"cannot extract: {place.label} holds NaN or Inf in one of the two")
        found = truncated_dense(change.to(device or W1.device), rank, energy)
        rows.append(Row(place.label, found.rank, found.norm, found.error))
        A, B = trainable(found.A, found.B, found.rank, place.label, place.host.lookup)
        tensors = {"A": A.to(W1.device, wide).contiguous(), "B": B.to(W1.device, wide).contiguous()}
        _add(content, place, tensors).fingerprints[place.part] = fingerprint(W0, then)
    content.spec = most_common(content)
    notes = [
        f"stored as {then} in the base and {now} in the tuned model: rounding is part of the difference"
        for then, now in sorted(dtypes)
    ]
    return rows, notes + ([f"unchanged, without an update: {enumerate_names(unchanged, 4)}"] if unchanged else [])


def _add_whole(content: Content, after: Weights, made: Plan) -> None:
    """Put what is taken whole into the content: modules, and biases."""

    def value(name: str) -> Tensor:
        known = after.known_as(name.removeprefix("."))
        assert known is not None, "checked before"
        return after.tensor(known).clone()

    content.biases = {name: value(f"{name}.bias") for name in made.biases}
    content.copies = {
        name: {key: value(f"{name}.{key}") for key in own_tensors(module)} for name, module in made.copies.items()
    }


def _add(content: Content, place: Place, tensors: dict[str, Tensor]) -> LayerUpdate:
    """Put the factors of one place into the content, as `gather` does with those of a model."""
    spec = plain_spec(tensors["A"].shape[-2])
    update = content.updates.setdefault(place.name, LayerUpdate(spec, {}))
    note_layer(update, place.layer, place.host, place.part)
    update.tensors[place.part] = tensors
    if spec != update.spec:
        update.specs[place.part] = spec
    return update


def _changed_whole(before: Weights, after: Weights, made: Plan) -> Iterator[str]:
    """Yield the tensors of modules and biases that are taken whole, and differ from the base's."""
    keys = [f"{name}.{key}" for name, module in made.copies.items() for key in own_tensors(module)]
    keys += [f"{name}.bias".removeprefix(".") for name in made.biases]
    for key in keys:
        first, second = before.known_as(key), after.known_as(key)
        if first is None or second is None or not same(before.tensor(first), after.tensor(second)):
            yield key


def _left_out(before: Weights, after: Weights, made: Plan) -> Iterator[tuple[str, str]]:
    """Yield (tensor, reason) for what differs between the two and is not in the adapter."""
    covered = {f"{name}.bias".removeprefix(".") for name in made.biases} | {f"{name}.weight" for name in made.tied}
    by_key: dict[str, list[Place]] = {}
    for place in made.places:
        by_key.setdefault(_key(place), []).append(place)
    for key, places in by_key.items():
        covered |= {key, *(name for name in (before.known_as(key), after.known_as(key)) if name is not None)}
        host, layer, name = places[0].host, places[0].layer, places[0].name
        others = [
            part for part in host.parts(layer) if f"{name}.{host.attribute(layer, part)}".removeprefix(".") == key
        ]
        for part in others:
            targeted = any(place.part == part for place in places)
            if not targeted and not same(before.matrix(name, host, part)[0], after.matrix(name, host, part)[0]):
                yield label_of(name, part), "differ, and are parts that are not targeted"
    copied = tuple(f"{name}." for name in made.copies)
    for name in sorted(before.names | after.names):
        if name in covered or name.startswith(copied):
            continue
        if name not in before.names or name not in after.names:
            yield name, f"are in the {'base' if name in before.names else 'tuned model'} alone"
        elif before.shape(name) != after.shape(name):
            yield name, "differ in their shapes"
        elif not same(before.tensor(name), after.tensor(name)):
            is_matrix = len(before.shape(name)) > 1
            yield (
                name,
                "differ, and are not targeted" if is_matrix else "differ, and are no matrices (train_also, bias)",
            )


def _key(place: Place) -> str:
    """Return the name of the tensor in which a place's matrix is."""
    return f"{place.name}.{place.host.attribute(place.layer, place.part)}".removeprefix(".")
