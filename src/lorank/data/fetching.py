"""Files at an address: fetched once, and kept in the cache of `datasets`."""

import hashlib
import shutil
import urllib.request
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import AdapterError

_SECONDS = 60  # without a byte from the other side
_NETWORK = ("huggingface_hub", "hf_xet", "httpx", "httpx2")  # whose errors have no base class in common


def fetched(datasets: Any, address: str) -> Path:
    """Return the copy of a file at https://..., or on the hub at hf://datasets/...; raises AdapterError without it."""
    try:
        if not address.startswith(("http://", "https://")):
            return Path(datasets.DownloadManager().download(address))
        folder = Path(datasets.config.DOWNLOADED_DATASETS_PATH)
        kept = folder / f"lorank-{hashlib.sha256(address.encode()).hexdigest()}"
        if not kept.is_file():
            if datasets.config.HF_HUB_OFFLINE:
                raise OSError("it is not in the cache, and HF_HUB_OFFLINE is set")
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(address, kept)
        return kept
    except Exception as error:
        known = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
        if not known and type(error).__module__.partition(".")[0] not in _NETWORK:
            raise
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise AdapterError(f"{address} could not be fetched: {reason}") from None


def _fetch(address: str, kept: Path) -> None:
    """Fetch a file; half of one never gets its name."""
    partial = kept.with_name(f"{kept.name}.{uuid4().hex}.partial")
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
            expected = answer.headers.get("Content-Length")
        if expected is not None and partial.stat().st_size != int(expected):
            raise OSError(f"{partial.stat().st_size:,} of {int(expected):,} bytes came")
        partial.replace(kept)
    finally:
        partial.unlink(missing_ok=True)
