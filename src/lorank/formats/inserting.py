"""Put on a model what baselines run beside its layers, from a file; and know again the base that it was trained on."""

import torch
from torch import nn

from ..companions import INSERTED
from ..errors import AdapterError
from ..fingerprint import Comparison, compare, other_base
from ..hosts import NoHost
from ..names import Names
from ..planned import Build
from ..variants import Adapter
from .checking import tensors_problems
from .content import Content


def fit_inserted(
    model: nn.Module, content: Content, names: Names, parts: dict[str, dict[str, Adapter]], problems: list[str]
) -> dict[str, tuple[nn.Module, Build]]:
    """Build what baselines insert into `parts`; return it as a plan has it."""
    found: dict[str, tuple[nn.Module, Build]] = {}
    for baseline in content.baselines:
        try:
            arranged = baseline.arrange(model, names).inserted
        except AdapterError as error:
            problems.append(str(error))
            continue
        stored = {name: own for name, (method, own) in content.inserted.items() if method == baseline.variant}
        problems += [f"the file lacks what {baseline} runs with {name}" for name in arranged.keys() - stored]
        problems += [f"{name}: {baseline} has no place there in this model" for name in stored.keys() - arranged]
        for name in arranged.keys() & stored.keys():
            made = arranged[name](None)
            wrong = tensors_problems(name, str(baseline), made.tensors(), stored[name])
            problems += wrong
            if not wrong:
                made.fill(stored[name], next((p.device for p in made.parameters()), torch.device("cpu")))
                parts.setdefault(name, {})[INSERTED] = made
                found[name] = names.modules[name], arranged[name]
    known = {baseline.variant for baseline in content.baselines}
    problems += [
        f"{name}: the file does not say what its {m} is" for name, (m, _) in content.inserted.items() if m not in known
    ]
    return found


def landmark_problems(content: Content, names: Names, allow_other_base: bool) -> list[str]:
    """Return a problem for another base than the one whose landmarks the file has; notes go into its remarks."""
    compared: dict[str, Comparison] = {}
    for name, then in content.landmarks.items():
        try:
            host, layer = names.host(name), names.modules[name]
            if host.matrix(layer, "weight").is_meta:
                return ["the model is on the meta device; load its weights first"]
            compared[name] = compare(then, host.matrix(layer, "weight"), host.dtype_name(layer, "weight"))
        except (KeyError, NoHost):
            return [f"the adapter was trained on a base with a layer {name}, which this model has not"]
    return other_base(compared, allow_other_base, content.remarks)
