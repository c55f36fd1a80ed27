"""The scores of GLUE agree with their formulas, on predictions for a real development set."""

import csv
import os
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lorank.evaluation import classification_scores, regression_scores


@pytest.fixture(scope="module")
def predicted() -> tuple[list[int], list[float]]:
    """Return the labels of SST-2's 872 development sentences, and what a bag of words makes of each."""
    data = os.environ.get("LORANK_DATA")
    if not data:
        pytest.skip("LORANK_DATA names no folder with SST-2")

    def rows(name: str) -> list[dict[str, str]]:
        with (Path(data or "") / "sst2" / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    train, dev = rows("train.tsv")[:3000], rows("dev.tsv")
    words = CountVectorizer(max_features=500)
    model = LogisticRegression(max_iter=500)
    model.fit(words.fit_transform([row["sentence"] for row in train]), [int(row["label"]) for row in train])
    shares = model.predict_proba(words.transform([row["sentence"] for row in dev]))[:, 1]
    return [int(row["label"]) for row in dev], [round(float(share), 2) for share in shares]  # rounded, for ties


def pearson(one: list[float], other: list[float]) -> float:
    means = sum(one) / len(one), sum(other) / len(other)
    pairs = [(a - means[0], b - means[1]) for a, b in zip(one, other, strict=True)]
    return sum(a * b for a, b in pairs) / (sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs)) ** 0.5


def ranks(values: list[float]) -> list[float]:
    """Return the place of each value among all; equal ones share the mean of theirs."""
    counts, places, begin = Counter(values), {}, 0
    for value in sorted(counts):
        places[value] = begin + (counts[value] + 1) / 2
        begin += counts[value]
    return [places[value] for value in values]


def test_classes_are_scored_by_the_formulas(predicted: tuple[list[int], list[float]]) -> None:
    labels, shares = predicted
    guesses = [int(share > 0.5) for share in shares]
    count = Counter(zip(labels, guesses, strict=True))
    right, wrong, missed, left = count[1, 1], count[0, 1], count[1, 0], count[0, 0]
    assert min(right, wrong, missed, left) > 50
    below = ((right + wrong) * (right + missed) * (left + wrong) * (left + missed)) ** 0.5
    found = classification_scores(labels, guesses, 2)
    assert found == pytest.approx(
        {
            "accuracy": (right + left) / 872,  # SST-2, MNLI, QNLI, RTE; QQP and MRPC with F1
            "f1": 2 * right / (2 * right + wrong + missed),
            "matthews": (right * left - wrong * missed) / below,  # CoLA
        }
    )


def test_values_are_scored_by_the_formulas(predicted: tuple[list[int], list[float]]) -> None:
    """STS-B's two; here the values are the lengths of what two sets of words say."""
    labels, shares = predicted
    values = [share + 0.3 * label for share, label in zip(shares, labels, strict=True)]
    found = regression_scores(values, shares)
    assert found == pytest.approx(
        {"pearson": pearson(values, shares), "spearman": pearson(ranks(values), ranks(shares))}
    )
    assert found["pearson"] != pytest.approx(found["spearman"], abs=1e-4)


def test_the_accuracy_over_two_sets_is_that_of_both_together(predicted: tuple[list[int], list[float]]) -> None:
    """MNLI's overall accuracy: over the matched and the mismatched set, weighted by their sizes."""
    labels, shares = predicted
    guesses = [int(share > 0.5) for share in shares]
    parts = [slice(0, 300), slice(300, None)]
    accuracies = [classification_scores(labels[part], guesses[part], 2)["accuracy"] for part in parts]
    together = classification_scores(labels, guesses, 2)["accuracy"]
    assert together == pytest.approx((300 * accuracies[0] + 572 * accuracies[1]) / 872)
    assert accuracies[0] != accuracies[1]
