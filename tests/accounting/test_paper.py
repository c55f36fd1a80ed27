"""The paper's parameter columns: what the modules have, against numbers computed by hand from the architectures."""

from typing import Any

import pytest
import torch

import lorank
from lorank.accounting.claims import claims, holdings
from lorank.accounting.paper import compare, trained_parameters, verdicts
from lorank.accounting.paper_rows import ERRATA, ROWS, Row
from lorank.models import empty_base
from lorank.shapes import configuration_of

E, R, D = "exact", "rounded", "differs"
# The numbers of each table in the paper's order: what is printed, what it has, and how the two agree.
EXPECTED = {
    "1": [("0.5M", 565_488, R), ("11M", 11_089_152, E), ("11M", 11_089_152, E)],
    "2": [
        ("125.0M", 124_645_632, D),
        ("0.1M", 102_144, E),
        ("0.3M", 304_320, E),
        ("0.9M", 894_528, E),
        ("0.3M", 294_912, E),
        ("355.0M", 355_359_744, D),
        ("0.8M", 786_432, E),
        ("3.0M", 3_171_840, R),
        ("0.8M", 811_392, E),
        ("6.0M", 6_343_680, R),
        ("0.8M", 835_968, E),
        ("0.8M", 786_432, E),
        ("1500.0M", 1_564_549_632, D),
        ("4.7M", 4_718_592, E),
    ],
    "3": [
        ("354.92M", 354_823_168, D),
        ("0.37M", 368_784, E),
        ("11.09M", 11_089_152, E),
        ("11.09M", 11_064_576, D),
        ("25.19M", 25_192_448, E),
        ("0.35M", 368_640, R),
        ("0.35M", 393_216, D),
        ("774.03M", 774_030_080, E),
        ("0.88M", 875_808, E),
        ("23.00M", 23_002_848, E),
        ("0.77M", 783_360, D),
        ("0.77M", 737_280, D),
    ],
    "4": [
        ("175,255.8M", 174_604_259_328, D),
        ("14.2M", 12_988_416, D),
        ("3.2M", 3_244_032, E),
        ("20.2M", 18_874_368, D),
        ("7.1M", 7_078_080, E),
        ("40.1M", 40_109_568, E),
        ("4.7M", 4_718_592, E),
        ("37.7M", 37_748_736, E),
    ],
    "5": [("18M", 18_874_368, R)] * 7,
    "15": [
        ("175B", 174_604_259_328, E),
        ("0.4M", 491_520, R),
        ("0.9M", 884_736, E),
        ("1.7M", 1_671_168, E),
        ("3.2M", 3_244_032, E),
        ("6.4M", 6_389_760, E),
        ("5.1M", 4_718_592, D),
        ("10.1M", 9_437_184, D),
        ("20.2M", 18_874_368, D),
        ("44.1M", 42_467_328, D),
        ("76.1M", 75_497_472, D),
        ("7.1M", 7_078_080, E),
        ("21.2M", 21_234_432, E),
        ("40.1M", 40_109_568, E),
        ("77.9M", 77_859_840, E),
        ("304.4M", 304_361_472, E),
        ("4.7M", 4_718_592, E),
        ("4.7M", 4_718_592, E),
        ("9.4M", 9_437_184, E),
        ("9.4M", 9_437_184, E),
        ("18.8M", 18_874_368, R),
        ("18.8M", 18_874_368, R),
        ("37.7M", 37_748_736, E),
        ("37.7M", 37_748_736, E),
        ("301.9M", 301_989_888, R),
        ("603.8M", 603_979_776, D),
        ("37.8M", 37_896_192, R),
        ("151.1M", 151_142_400, E),
        ("302.1M", 302_137_344, E),
        ("52.8M", 51_904_512, D),
    ],
}


def test_every_row_has_the_number_that_its_architecture_gives() -> None:
    found: dict[str, list[tuple[str, int, str]]] = {}
    for one in verdicts():
        found.setdefault(one.row.table, []).append((one.row.printed, one.counted, one.verdict))
        assert bool(one.reason) == (one.verdict != E), one  # a reason wherever the print is not what is counted
    assert found == EXPECTED


def test_what_the_paper_says_twice_and_not_alike_is_stated() -> None:
    found = {one.row.table: (one.counted, one.verdict) for one in verdicts(ERRATA)}
    assert found == {"10": (2_359_296, D), "D.4": (18_874_368, D), "13": (25_192_448, R)}


@pytest.mark.parametrize("row", [row for row in ROWS if row.table == "2" and "FT" not in row.label])
def test_the_count_is_what_adapting_the_model_trains(row: Row) -> None:
    from transformers import AutoModel

    with torch.device("meta"):
        options = {"add_pooling_layer": False} if "roberta" in row.model else {}
        model: Any = AutoModel.from_config(configuration_of(row.model), **options)
    lorank.adapt(model, list(row.method), list(row.targets) or None)
    counted = sum(parameter.numel() for parameter in lorank.adapter_parameters(model).values())
    assert counted == trained_parameters(row)
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "printed, counted, verdict, said",
    [
        ("0.35M", 354_999, E, ""),
        ("0.35M", 345_000, E, ""),
        ("0.35M", 355_000, R, "cut, not rounded: 0.35M"),
        ("0.35M", 344_999, D, ""),
        ("18M", 18 * 2**20, R, "in units of 2^20; in millions it is 18.87"),
        ("1,234.5M", 1_234_500_000, E, ""),
        ("175B", 174_500_000_000, E, ""),
        ("175B", 174_499_999_999, D, ""),
    ],
)
def test_a_print_is_compared_in_its_own_digits(printed: str, counted: int, verdict: str, said: str) -> None:
    assert compare(printed, counted) == (verdict, said)


def test_the_reasons_say_what_is_so() -> None:
    """The numbers in the reasons are those of other counts."""
    config = configuration_of("gpt3-175b")
    config.tie_word_embeddings = False
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        untied = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in untied.parameters())
    assert count == 175_221_817_344 and f"{count:,}" in next(row.reason for row in ROWS if row.table == "4")
    assert 12 * 12288 * 96 == 14_155_776  # 12 d L, printed as 14.2M


def test_the_memory_claim_follows_from_its_assumptions() -> None:
    *assumed, simulated = holdings()
    full, lora = 174_604_259_328, 18_874_368
    assert [holding.full for holding in assumed] == [6 * full, 8 * full, 12 * full, 16 * full]
    assert [holding.lora for holding in assumed] == [2 * full + beside * lora for beside in (6, 8, 12, 16)]
    assert [round(holding.times) for holding in assumed] == [3, 4, 6, 8]
    # A whole step takes somewhat more than the same without activations.
    assert 1 < simulated.full / assumed[1].full < 1.01 and 1 < simulated.lora / assumed[1].lora < 1.03
    assert 3.5 < simulated.times < 4


def test_claims_on_storage_are_recomputed() -> None:
    found = {claim.claim: claim for claim in claims()}
    assert found["checkpoint, r = 4 on Wq and Wv"].ours == "37.75 MB"
    assert found["checkpoint, fine-tuning / LoRA"].ours == "9,251x"
    assert found["100 adapted models"].ours == "353.0 GB, not 34.9 TB"
    assert all(claim.printed and claim.how for claim in found.values())


def test_a_shape_has_no_weights_to_load(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorank.models import load_base, load_tokenizer, task_of

    assert task_of("gpt3-175b") is None
    for load in (load_tokenizer, lambda name: load_base(name, "causal-lm", tokenizer=object())):
        with pytest.raises(lorank.AdapterError, match="gpt3-175b is a shape without weights"):
            load("gpt3-175b")
    monkeypatch.chdir(tmp_path)
    configuration_of("paper/gpt2-medium").save_pretrained(tmp_path / "gpt3-175b")  # a folder of that name comes first
    assert empty_base("gpt3-175b", "causal-lm").config.n_layer == 24
