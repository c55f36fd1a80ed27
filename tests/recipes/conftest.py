"""Small bases, made once."""

from pathlib import Path

import pytest

from . import cases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return cases.bases(tmp_path_factory.mktemp("paper"))
