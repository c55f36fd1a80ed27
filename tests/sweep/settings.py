"""What the names of a configuration's fields do not tell: the settings of single families."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one family differs from the rules.

    model: the class to run, where the rule would choose another.
    config: fields of the configuration, nested where it is; they go before the rules.
    inputs: arguments of the forward, or a function of the model that returns them; None drops an argument.
    train_mode: False where the family's forward in train mode needs what it does not in eval mode.
    not_run: why the family is not run at all.
    """

    model: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    train_mode: bool = True
    not_run: str | None = None
