"""All scores of texts by name, and the sets of them that data sets are reported with."""

from collections.abc import Iterable, Sequence

from ...errors import AdapterError, did_you_mean, raise_problems
from ...extras import require
from . import coco, exact, java, logical_form, mteval, rouge, ter, webnlg
from .base import Metric, Predictions, References

METRICS: dict[str, Metric] = {
    **mteval.METRICS,
    **coco.METRICS,
    **webnlg.METRICS,
    **ter.METRICS,
    **rouge.METRICS,
    **exact.METRICS,
    **logical_form.METRICS,
}
PRESETS = {
    "e2e": ("bleu", "nist", "meteor", "rouge-l-coco", "cider"),
    "webnlg": ("bleu-webnlg", "meteor-webnlg", "ter-webnlg"),
    "dart": ("bleu-webnlg", "meteor-webnlg", "ter-webnlg"),
    "samsum": ("rouge-1", "rouge-2", "rouge-l"),
    "wikisql": ("logical-form",),
}


def chosen_metrics(wanted: str | Iterable[str]) -> list[str]:
    """Return names of scores from a list of them and of presets, or a text with commas between; each is there once."""
    given = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    given = [name.strip().lower() for name in given if name.strip()]
    known = {name: (name,) for name in METRICS} | PRESETS
    raise_problems(
        "cannot score texts",
        [f"there is no score '{name}'; {did_you_mean(name, known)}" for name in given if name not in known]
        or ([] if given else [f"no score is named; there are {', '.join(known)}"]),
    )
    return list(dict.fromkeys(name for one in given for name in known[one]))


def require_metrics(names: Iterable[str]) -> None:
    """Raise AdapterError unless what the scores need is installed, with what to install."""
    problems = []
    for name in names:
        try:
            for package in METRICS[name].packages:
                require(package, f"'{name}'")
            if METRICS[name].java:
                java.java()
        except AdapterError as error:
            problems.append(str(error))
    raise_problems("cannot score texts", list(dict.fromkeys(problems)))


def text_scores(predictions: Predictions, references: References, metrics: str | Iterable[str]) -> dict[str, float]:
    """Return scores of texts, by name, in the order in which they are asked for.

    predictions: the texts.
    references: of each text, one or more that would be right.
    metrics: names out of METRICS and PRESETS, as a list or with commas between.

    All are of the set as a whole. BLEU, METEOR, ROUGE, TER and accuracies are shares, not percent. Raises AdapterError
    for lists that do not fit each other, unknown names, and what is not installed.
    """
    names = chosen_metrics(metrics)
    raise_problems("cannot score texts", _problems(predictions, references))
    require_metrics(names)
    found: dict[str, float] = {}
    for compute in dict.fromkeys(METRICS[name].compute for name in names):
        found |= compute([name for name in names if METRICS[name].compute is compute], predictions, references)
    return {name: found[name] for name in names}


def _problems(predictions: Predictions, references: References) -> list[str]:
    if isinstance(predictions, str) or isinstance(references, str):
        return ["predictions and references are lists, one entry a text"]
    problems = [] if len(predictions) else ["there is no text"]
    if len(predictions) != len(references):
        problems.append(f"there are {len(predictions):,} texts and references for {len(references):,}")
    problems += _few(f"text {i + 1:,} is no text: {text!r:.60}" for i, text in enumerate(predictions) if not _is(text))
    problems += _few(
        f"the references of text {i + 1:,} are no list of texts: {ours!r:.60}"
        for i, ours in enumerate(references)
        if isinstance(ours, str) or not isinstance(ours, Sequence) or not ours or not all(map(_is, ours))
    )
    return problems


def _is(text: object) -> bool:
    return isinstance(text, str)


def _few(problems: Iterable[str], limit: int = 5) -> list[str]:
    listed = list(problems)
    return listed if len(listed) <= limit else [*listed[:limit], f"and {len(listed) - limit:,} more like the last"]
