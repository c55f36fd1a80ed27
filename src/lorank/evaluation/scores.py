"""Scores of classification and regression, by scikit-learn and scipy."""

from collections.abc import Sequence

from ..extras import require


def classification_scores(labels: Sequence[int], predictions: Sequence[int], classes: int) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of predicted classes.

    F1 is that of class 1 when there are two, as GLUE has it, and the mean over the classes when there are more.
    """
    metrics = require("sklearn.metrics", "scoring a classifier")
    average = "binary" if classes == 2 else "macro"
    constant = len(set(labels)) < 2 or len(set(predictions)) < 2  # no correlation; scikit-learn would warn at times
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "f1": float(metrics.f1_score(labels, predictions, average=average, zero_division=0.0)),
        "matthews": 0.0 if constant else float(metrics.matthews_corrcoef(labels, predictions)),
    }


def regression_scores(values: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; NaN where one side is constant and there is none."""
    stats = require("scipy.stats", "scoring a regression")
    if len(set(values)) < 2 or len(set(predictions)) < 2:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {
        "pearson": float(stats.pearsonr(values, predictions).statistic),
        "spearman": float(stats.spearmanr(values, predictions).statistic),
    }
