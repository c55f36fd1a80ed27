"""The table of docs/formats.md holds: every cell is done again."""

from pathlib import Path

import pytest

from . import table

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"

# of PEFT and of transformers, about models that these tests make
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def test_the_table_is_whole() -> None:
    expected = {(host, method, name) for host in table.HOSTS for method in table.METHODS for name in table.WRITTEN}
    assert table.published(PAGE).keys() == expected


@pytest.mark.parametrize("method", table.METHODS)
@pytest.mark.parametrize("host", table.HOSTS)
def test_a_cell_is_what_the_page_says(host: str, method: str) -> None:
    published = table.published(PAGE)
    expected = {name: published[host, method, name] for name in table.WRITTEN}
    assert table.outcome(host, method) == expected
