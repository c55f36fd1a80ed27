"""Which layers a file's names mean: `<prefix>_<name with _ in the place of dots>`, there and back."""

import re
from collections.abc import Sequence

from torch import nn

from ...errors import AdapterError, did_you_mean
from ...hosts import ConvHost, FusedHost, Host, LinearHost
from ...names import Names

UNET, TEXT, ANY = "lora_unet", "lora_te", "lycoris"
KEY = re.compile(rf"({UNET}|{TEXT}\d*|lora_transformer|{ANY})_(.+)", re.DOTALL)
# Names of blocks that the Stable Diffusion models had before diffusers renamed them.
_OTHER_UNET = ("input_blocks_", "middle_block_", "output_blocks_")
_CLIP = "text_model"  # a module around CLIP's encoder, which transformers' CLIPTextModel has no more since version 5


def prefix_of(model: nn.Module | None) -> str:
    """Return the prefix of a model's layers: kohya's, where it has one for models of this class."""
    classes = [] if model is None else [cls.__name__ for cls in type(model).__mro__]
    if any(name.startswith("UNet") and name.endswith("Model") for name in classes):
        return UNET
    return TEXT if any(name.startswith("CLIPTextModel") for name in classes) else ANY


def name_in_file(layer: str, model: nn.Module | None) -> str:
    """Return what a layer is called in a file, without its prefix."""
    return _lengthened(layer, model).replace(".", "_")


def _lengthened(layer: str, model: nn.Module | None) -> str:
    """Return a layer's name as kohya knows it, which has CLIP's encoder in a module of its own."""
    if prefix_of(model) != TEXT or hasattr(model, _CLIP) or not layer:
        return layer
    return f"{_CLIP}.{layer}"


class Layers:
    """The layers of a model, by their names in a file."""

    def __init__(self, names: Names):
        self.names = names
        self.found: dict[str, list[str]] = {}  # first names, by the name with _
        model = names.modules[""]
        for name, canonical in names.canonical.items():
            # LyCORIS has the names of the model as it is, kohya those of transformers before 5.
            for known in {name, _lengthened(name, model)} if name else ():
                same = self.found.setdefault(known.replace(".", "_"), [])
                if canonical not in same:
                    same.append(canonical)

    def layer(self, name: str) -> str | None:
        """Return the first name of the layer that is called so, None without one; raises AdapterError for several."""
        found = self.found.get(name, [])
        if len(found) > 1:  # of which containers of layers can be none
            found = [layer for layer in found if self.names.why_not(layer) is None] or found
        if len(found) > 1:
            raise AdapterError(f"it may be {' or '.join(found)}, which have one name where dots are _")
        return found[0] if found else None

    def unknown(self, names: Sequence[str]) -> list[str]:
        """Return what to say of names that no layer has; what is like them is looked for a few times, it takes long."""
        problems = [f"{name}: this model has no such layer; {did_you_mean(name, self.found)}" for name in names[:3]]
        problems += [f"{name}: this model has no such layer" for name in names[3:]]
        if any(name.startswith(_OTHER_UNET) for name in names):
            problems.append("its names are those of the models before diffusers, which has others")
        return problems

    def clashes(self, layer: str) -> list[str]:
        """Return other modules that have the same name in a file."""
        key = name_in_file(layer, self.names.modules[""])
        return [other for other in self.found.get(key, []) if other != self.names.canonical.get(layer, layer)]


def why_not_held(host: Host | None, lookup: bool) -> str | None:
    """Return why the format has no update of such a layer; None when it has, or when nothing is known of it."""
    if lookup or (host is not None and host.lookup):
        return "kohya's format has no update of an embedding"
    base = host.base if isinstance(host, FusedHost) else host
    if base is None or (isinstance(base, LinearHost | ConvHost) and not base.transposed):
        return None
    if base.transposed:
        return "its weight lies transposed, which LyCORIS does not adapt, and other tools would not see"
    return "LyCORIS adapts linear layers and convolutions alone"
