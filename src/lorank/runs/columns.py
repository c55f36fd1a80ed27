"""Which columns of the data make an example, and what they make the task."""

import dataclasses
from typing import Any

from ..errors import AdapterError, enumerate_names
from ..tasks.sequence import label_names
from .recipe import Recipe


def choose_columns(recipe: Recipe, records: Any) -> Recipe:
    """Return the recipe with its task and columns filled in from the names of the columns."""
    columns = set(records.column_names)
    given = {
        name for name in ("messages", "prompt", "completion", "text", "text_pair", "label") if getattr(recipe, name)
    }
    usual_text = next((name for name in ("text", "sentence") if name in columns), None)
    filled: dict[str, Any] = {}
    task = recipe.task
    if task == "auto":
        if given & {"messages", "prompt", "completion"} or ("messages" in columns and not given):
            task = "causal-lm"
        elif given & {"label", "text_pair"} or ("label" in columns and (usual_text or recipe.text)):
            task = "regression" if _is_continuous(records, recipe.label or "label") else "classification"
        elif recipe.text or "messages" in columns or {"prompt", "completion"} <= columns or usual_text:
            task = "causal-lm"
    if task == "causal-lm":
        if not given:
            if "messages" in columns:
                filled["messages"] = "messages"
            elif {"prompt", "completion"} <= columns:
                filled |= {"prompt": "prompt", "completion": "completion"}
            elif usual_text:
                filled["text"] = usual_text
        elif given & {"prompt", "completion"}:
            filled = {name: name for name in ("prompt", "completion") if name not in given and name in columns}
        chosen = bool(given or filled)
    else:
        filled = {"text": recipe.text or usual_text, "label": recipe.label or ("label" if "label" in columns else None)}
        chosen = all(filled.values())
    if task == "auto" or not chosen:
        wanted = {
            "auto": "messages, prompt and completion, text, or text and label",
            "causal-lm": "messages, prompt and completion, or text",
        }.get(task, "text and label")
        raise AdapterError(
            f"the data has the columns {', '.join(records.column_names)}; say which of them are {wanted}, "
            "for instance --prompt question --completion answer"
        )
    _refuse_unused(recipe, task, given | filled.keys())
    return dataclasses.replace(recipe, task=task, **filled)


def _refuse_unused(recipe: Recipe, task: str, given: set[str]) -> None:
    """Raise when something was asked for that this kind of training does not look at."""
    of_task = {"messages", "prompt", "completion", "text"} if task == "causal-lm" else {"text", "text_pair", "label"}
    unused = sorted(given - of_task)
    if task == "causal-lm":
        kinds = [kind for kind in ({"messages"}, {"prompt", "completion"}, {"text"}) if kind & given]
        unused += sorted(set().union(*kinds[1:]) & given)
        unused += ["chat"] if recipe.chat and not {"prompt", "completion"} & given else []
    else:
        unused += ["chat"] if recipe.chat else []
    if unused:
        with_what = ", ".join(sorted(given - set(unused)))
        raise AdapterError(f"{enumerate_names(unused)} has no use in a {task} run with {with_what}; leave it out")


def _is_continuous(records: Any, column: str) -> bool:
    """Tell whether labels are numbers of which some are not whole."""
    if column not in records.column_names:
        return False  # told later, with the names that there are
    try:
        values = records.unique(column)
    except NotImplementedError:  # lists, which `label_names` refuses
        return False
    found = False
    for value in values:
        if value == "":  # an empty cell, which is told later
            continue
        try:
            found |= not float(value).is_integer()
        except (TypeError, ValueError):
            return False
    return found


def named_labels(records: Any, column: Any, wanted: bool = True) -> tuple[Any, list[str] | None]:
    """Return records whose labels are names where the data set has names for its numbers, and all the names if wanted.

    A number below 0 stands for no label. The names keep the data set's order; without one, see `label_names`.
    """
    if records is None or column is None or column not in records.features:
        return records, None
    feature = records.features[column]
    if not hasattr(feature, "int2str"):
        labels = records[column] if wanted else []
        empty = sum(1 for label in labels if label == "")
        if empty:
            raise AdapterError(f"the label column '{column}' is empty in {empty:,} of {len(records):,} records")
        return records, label_names(labels, column) if wanted else None
    named = [None if number is None or number < 0 else feature.int2str(number) for number in records[column]]
    return records.remove_columns([column]).add_column(column, named), list(feature.names)
