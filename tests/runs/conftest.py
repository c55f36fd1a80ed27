"""Bases that all tests of a module's folder share, and a cache of their own for what `datasets` keeps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .. import checkpoints


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.causal(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.encoder(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from datasets import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
