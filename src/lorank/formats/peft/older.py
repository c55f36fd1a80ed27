"""What versions of PEFT meant by settings and tensors that others write alike.

PEFT states its version in the configuration since 0.18. It always writes all settings that it has, so that one which
lacks a setting of a later version is older.
"""

import re
from collections.abc import Mapping
from typing import Any

from ...errors import AdapterError

_TWICE_UNTIL = (0, 21, 2)  # the last release known to add the update of an attention's out_proj twice


def in_todays_terms(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with which PEFT 0.14 and later compute what the version that wrote them did."""
    config = dict(config)
    if "inference_mode" not in config or "exclude_modules" in config:
        return config  # of 0.14 or later, or of another tool
    if config["peft_type"] == "LOKR":  # it had a scale of 1 whatever alpha was
        return config | {"alpha": config.get("r"), "alpha_pattern": config.get("rank_pattern")}
    # The first key of both patterns together was looked up in each of them.
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    default = config.get("lora_alpha") or config.get("alpha") or 8
    return config | {"alpha_pattern": {key: alphas.get(key, default) for key in ranks} | alphas}


def times_of_out_proj(config: Mapping[str, Any]) -> int:
    """Return how many times PEFT adds the update of the out_proj of nn.MultiheadAttention (huggingface/peft#3774).

    Raises AdapterError for a version of which that is not known.
    """
    numbers, _ = _version(config)
    if numbers is not None and numbers > _TWICE_UNTIL:
        raise AdapterError(
            f"PEFT up to {'.'.join(map(str, _TWICE_UNTIL))} adds the update of out_proj twice; whether "
            f"{config['peft_version']}, which wrote this file, does is not known here"
        )
    return 2


def is_swapped(config: Mapping[str, Any], shape: tuple[int, ...], transposed: bool, width: int) -> bool:
    """Tell whether A and B of a stack of matrices have taken the place of each other.

    shape: (experts, out, in) of the stack, as it is used; transposed: its parameter is (experts, in, out); width: the
    columns of A. Up to 0.18 PEFT took every parameter for (experts, in, out); 0.19.0 took each for the opposite of
    what it is; later versions are right. Raises AdapterError where neither shapes nor version tell.
    """
    experts, out, in_ = shape
    if out != in_:
        return width == out
    if experts == 1:
        return transposed  # B A was added to the parameter as it stands
    numbers, exact = _version(config)
    if numbers is None and transposed:
        return False  # right in all versions that do not state themselves, and in today's
    if numbers is None or (not exact and (0, 18, 1) <= numbers <= (0, 19, 1)):
        raise AdapterError(
            f"A and B are of the same size, and peft_version is {config.get('peft_version')!r}, which does not tell "
            "which is which: up to 0.19.0 PEFT had them the other way round. If you know the version that wrote the "
            "file, put it into adapter_config.json"
        )
    return not transposed if numbers < (0, 19, 0) else numbers == (0, 19, 0)


def _version(config: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, bool]:
    """Return the version that wrote a configuration, and whether it is that release and no state between two."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(.*)", config.get("peft_version") or "", re.DOTALL)
    if found is None:
        return None, False
    return tuple(int(number) for number in found.groups()[:3]), not found[4]
