"""The whole way with real weights: adapt, train, check, merge, save and load."""

import csv
import hashlib
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lorank

from . import weights

Batch = dict[str, Tensor]

# What the tests train on where LORANK_DATA names no folder of data sets: remarks on films, and whether they praise.
REMARKS = [
    ("A warm and funny film with a wonderful cast.", 1),
    ("The plot makes no sense and the jokes fall flat.", 0),
    ("I was moved to tears by the beautiful ending.", 1),
    ("Two hours of my life that I will never get back.", 0),
    ("Every scene is shot with care and love.", 1),
    ("The actors look as bored as I was.", 0),
    ("A clever thriller that kept me guessing to the end.", 1),
    ("Loud, stupid and far too long.", 0),
    ("She gives the best performance of the year.", 1),
    ("A dull story, badly written and poorly acted.", 0),
    ("Charming from the first minute to the last.", 1),
    ("The worst sequel I have ever had to sit through.", 0),
]

SENTENCE = "The capital of France is Paris, and the river that flows through the city is the Seine."


def praise(count: int = 16) -> list[tuple[str, int]]:
    """Return sentences about films and whether they praise, 1 or 0."""
    rows = _rows("sst2/train.tsv", count, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(row["sentence"], int(row["label"])) for row in rows] or REMARKS


def restaurants(count: int = 8) -> list[str]:
    """Return sentences that describe restaurants."""
    return [row["ref"] for row in _rows("e2e/train.csv", count)] or [text for text, _ in REMARKS[:count]]


def _rows(path: str, count: int, **reading) -> list[dict[str, str]]:
    data = os.environ.get("LORANK_DATA")
    if not data:
        return []
    with (Path(data) / path).open(encoding="utf-8", newline="") as file:
        return list(islice(csv.DictReader(file, **reading), count))


def classified() -> list[Batch]:
    """Return batches for a MiniLM classifier."""
    tokenizer, examples = weights.minilm_tokenizer(), praise()
    return [
        _encoded(tokenizer, [text for text, _ in part]) | {"labels": torch.tensor([label for _, label in part])}
        for part in _parts(examples, 8)
    ]


def continued(cache: Path) -> list[Batch]:
    """Return batches for SmolLM2."""
    tokenizer = weights.smollm2_tokenizer(cache)
    batches = [_encoded(tokenizer, part) for part in _parts(restaurants(), 2)]
    return [b | {"labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches]


def _parts(rows: list, size: int) -> Iterator[list]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Batch:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))


@dataclass(frozen=True)
class Case:
    """A model, what to adapt in it, and what to train it on."""

    build: Callable[[Path], PreTrainedModel]
    batches: Callable[[Path], list[Batch]]
    targets: list[str]
    train_also: list[str]
    learning_rate: float


def _encoder(build: Callable[[], PreTrainedModel], targets: list[str], train_also: list[str], rate: float) -> Case:
    return Case(lambda _: build(), lambda _: classified(), targets, train_also, rate)


CASES = [
    pytest.param(_encoder(weights.minilm_bert, ["query", "value"], ["classifier"], 4e-3), id="bert"),
    pytest.param(_encoder(weights.minilm_roberta, ["query", "value"], ["classifier"], 1e-3), id="roberta"),
    pytest.param(
        _encoder(weights.minilm_deberta, ["query_proj", "value_proj"], ["pooler", "classifier"], 1e-3), id="deberta-v2"
    ),
    pytest.param(
        Case(weights.smollm2, continued, ["q_proj", "v_proj"], [], learning_rate=2e-3),
        id="smollm2",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath / ".cache"


@pytest.mark.parametrize("case", CASES)
def test_adapts_trains_merges_saves_and_loads(case: Case, cache: Path, tmp_path: Path) -> None:
    model, batches = case.build(cache), case.batches(cache)
    inputs = {name: tensor for name, tensor in batches[0].items() if name != "labels"}
    base_outputs, base_digests = _logits(model, inputs), _digests(model)

    plan = lorank.adapt(model, lorank.LoRA(rank=8, alpha=16), case.targets, train_also=case.train_also)
    assert len(plan.places) == 2 * model.config.num_hidden_layers
    assert torch.equal(_logits(model, inputs), base_outputs)

    model.train()
    config = lorank.TrainConfig(steps=20, learning_rate=case.learning_rate, schedule="constant")
    trained = lorank.adapter_parameters(model)
    losses = [float(s.loss) for s in lorank.train(trained.values(), lambda b: model(**b).loss, batches, config)]
    assert fmean(losses[-5:]) < 0.7 * fmean(losses[:5]), losses

    model(**batches[0]).loss.backward()
    assert lorank.check(model) == []
    model.zero_grad()

    model.eval()
    outputs = _logits(model, inputs)
    with lorank.disabled(model):
        assert torch.equal(_logits(model, inputs), base_outputs)
    with lorank.merged(model):
        _assert_close(_logits(model, inputs), outputs)
    now = _digests(model)
    assert {name: now[name] for name in base_digests} == base_digests

    lorank.save(model, tmp_path)
    torch.manual_seed(1)  # so that a fresh head starts from other values
    fresh = case.build(cache)
    lorank.load(fresh, tmp_path)
    loaded = lorank.adapter_parameters(fresh)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert torch.equal(_logits(fresh, inputs), outputs)

    report = lorank.merge(fresh)
    assert report.worst is not None and report.worst.relative_error < 1e-4
    _assert_close(_logits(fresh, inputs), outputs)
    assert list(fresh.state_dict()) == list(base_digests)


@pytest.mark.parametrize(
    ("build", "tolerance"),
    [
        pytest.param(weights.minilm_bert, 0.0, id="bert"),
        pytest.param(weights.minilm_roberta, 0.0, id="roberta"),
        # DeBERTa divides the keys by √d, not the scores, and so rounds in another order; 4e-6 was measured.
        pytest.param(weights.minilm_deberta, 1e-5, id="deberta-v2"),
    ],
)
def test_encoders_compute_what_minilm_does(build: Callable[[], PreTrainedModel], tolerance: float) -> None:
    texts = [text for text, _ in praise()]
    inputs = _encoded(weights.minilm_tokenizer(), texts)
    real = inputs["attention_mask"].bool()
    assert not real.all(), "the sentences are of one length, so padding is not tested"
    with torch.no_grad():
        expected = weights.minilm()(**inputs).last_hidden_state[real]
        found = build().base_model(**inputs).last_hidden_state[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_smollm2_knows_english(cache: Path) -> None:
    model, tokenizer = weights.smollm2(cache), weights.smollm2_tokenizer(cache)
    words = SENTENCE.split()
    shuffled = " ".join(random.Random(0).sample(words, len(words)))
    sentence, noise = _perplexity(model, tokenizer, SENTENCE), _perplexity(model, tokenizer, shuffled)
    assert sentence < 30
    assert noise > 10 * sentence


@torch.no_grad()
def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt").input_ids
    return math.exp(float(model(ids, labels=ids).loss))


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: Batch) -> Tensor:
    return model(**inputs).logits


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """Return a hash of the bits of every tensor."""
    return {name: hashlib.sha256(t.contiguous().numpy()).hexdigest() for name, t in model.state_dict().items()}


def _assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare to 1e-5 of the largest logit: a logit near 0 is a difference of large sums and rounds as they do."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
