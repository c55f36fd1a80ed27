"""The model card of an adapter: README.md as the hub shows it, of what stands in the adapter's files and its run's."""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .accounting import readable
from .adapter_files import choose, files_of
from .baselines import BASELINES
from .errors import AdapterError
from .examining import Examination, examine
from .extras import require
from .formats.peft import CONFIG
from .formats.peft.config import hub_id, read_config
from .planned import joined
from .runs.loading import folder_of
from .runs.metrics import PLOT
from .runs.run import FACTS, RECIPE
from .runs.subject import AdapterSubject
from .variants import METHODS

_HUB = "https://huggingface.co"
_MARK = re.compile(r"\n<!-- written by lorank ([0-9a-f]{16}) from the adapter's files.*-->\n\Z")
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}
# What of a recipe says how a run was trained; paths stay where they are.
_SETTINGS = (
    *("batch_size", "accumulate", "learning_rate", "schedule", "warmup", "lora_plus"),
    *("weight_decay", "betas", "epsilon", "clip", "label_smoothing", "dropout", "max_length"),
    *("gradient_checkpointing", "seed"),
)


def model_card(adapter: Path, repo: str, *, license: str | None = None, found: Examination | None = None) -> str:
    """Return the text of README.md for an adapter that will be `repo` on the hub.

    adapter: its folder or file, or the folder of the run that it is the result of.
    found: what `examine` says of it, where that is known already.

    Nothing stands in it that is not in the files, and no path of this machine; equal files give the same text. Raises
    AdapterError for an adapter that cannot be read.
    """
    place = folder_of(str(adapter))
    found, run = found or examine(place), run_of(place)
    recipe = _mapping(run / RECIPE) if run else {}
    facts = _mapping(run / FACTS) if run else {}
    base, config = hub_id(found.base_model), _config(place)
    name = repo.rpartition("/")[2]
    blocks = [
        _front_matter(found, base, _data_set(recipe), license, why_not_peft(config)),
        f"# {name}",
        _what(found, base),
        _table(["", ""], _about(found, base, place, facts)),
        *_layers(found),
        *_training(recipe, facts, run),
        *_use(found, base, repo, why_not_peft(config), list(files_of(place))),
    ]
    text = "\n\n".join(block for block in blocks if block) + "\n"
    return f"{text}\n<!-- written by lorank {_digest(text)} from the adapter's files; an edited card is kept -->\n"


def is_untouched(text: str) -> bool:
    """Tell whether a card is as `model_card` wrote it, so that nobody's words are lost with it."""
    text = text.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def run_of(place: Path) -> Path | None:
    """Return the folder of the run that an adapter is the result of, if it lies in one."""
    folder = (place if place.is_dir() else place.parent).resolve()
    return folder.parent if folder.name == AdapterSubject.kept and (folder.parent / RECIPE).is_file() else None


def _data_set(recipe: Mapping[str, Any]) -> str | None:
    """Return the data set of the hub that a run was trained on, without its configuration; None for a file."""
    data = recipe.get("data")
    return hub_id(data.partition(":")[0]) if isinstance(data, str) and "\\" not in data else None


def why_not_peft(config: Mapping[str, Any] | None) -> list[str]:
    """Return why PEFT cannot load an adapter with this configuration, [] where it can."""
    if config is None or "peft_type" not in config:
        return ["the file is in another format"]
    pattern = config.get("layers_pattern")  # PEFT refuses it alone; lorank writes there what PEFT would lose
    if not pattern or config.get("layers_to_transform") is not None:
        return []
    return [str(reason) for reason in pattern] if isinstance(pattern, list) else [str(pattern)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config(place: Path) -> dict[str, Any] | None:
    """Return an adapter's configuration, None for formats without one."""
    files = files_of(place)
    return read_config(files[CONFIG]) if CONFIG in files else None


def _mapping(path: Path) -> dict[str, Any]:
    """Return what a run wrote into a file of YAML or JSON, {} where there is none."""
    if not path.is_file():
        return {}
    yaml = require("yaml", "reading a recipe")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}


def _front_matter(
    found: Examination, base: str | None, data: str | None, license: str | None, not_peft: list[str]
) -> str:
    settings: dict[str, Any] = {"base_model": base} if base else {}
    settings["library_name"] = "lorank" if not_peft else "peft"
    settings["tags"] = list(dict.fromkeys(["lora", "lorank", *_methods(found)]))
    settings |= {"datasets": [data]} if data else {}
    settings |= {"license": license} if license else {}
    text = require("yaml", "writing a model card").safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _methods(found: Examination) -> list[str]:
    return sorted({layer.method for layer in found.layers} | {one.method for one in found.beside})


def _what(found: Examination, base: str | None) -> str:
    names = [{**METHODS, **BASELINES}[method].__name__ for method in _methods(found)]
    what = "low-rank adapter" if found.layers else "adapter"
    what = f"A{'' if found.layers else 'n'} {what}" + (f" ({', '.join(names)})" if names else "")
    purpose = {"causal-lm": ", a language model", "classification": ", as a classifier"}.get(_task(found), "")
    version = found.about.get("lorank")
    made = f", trained with lorank {_text(version)}" if isinstance(version, str) else ""
    return f"{what}{f' of [{base}]({_HUB}/{base})' if base else ''}{purpose if base else ''}{made}."


def _task(found: Examination) -> str:
    task = found.about.get("task")
    return task if isinstance(task, str) else ""


def _about(found: Examination, base: str | None, place: Path, facts: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the first table."""
    trained = f"{found.parameters:,}"
    whole = facts.get("base_parameters")
    if isinstance(whole, int) and whole:
        trained += f", {found.parameters / whole:.3%} of the base's {whole:,}"
    rows = {
        "base": f"[{base}]({_HUB}/{base})" if base else "",
        "method": ", ".join(f"`{method}`" for method in _methods(found)),
        "rank": _span([layer.rank for layer in found.layers]),
        "alpha": _span([layer.alpha for layer in found.layers if layer.alpha is not None]),
        "scale": _span([layer.scale for layer in found.layers]),
        "trained parameters": trained,
        "size": readable(sum(file.stat().st_size for file in files_of(place).values())),
        "trained whole": ", ".join(map(_code, found.copies)),
        "biases": str(len(found.biases)) if found.biases else "",
        "rows of tokens": ", ".join(f"{len(ids)} of {_code(name)}" for name, ids in found.tokens.items()),
        "beside the layers": ", ".join(f"{one.settings}, with {one.modules} modules" for one in found.beside),
        "at inference": "; ".join(one.inference for one in found.beside),
        "tied": ", ".join(f"{_code(name)} to {_code(source)}" for name, source in found.tied.items()),
    }
    rows |= {key: _value(value) for key, value in found.about.items() if key != "lorank" and key not in rows}
    return [[_text(key), value] for key, value in rows.items() if value]


def _layers(found: Examination) -> list[str]:
    rows = []
    for group in found.groups():
        first = group[0]
        rows.append(
            [
                _code(joined([layer.name for layer in group])),
                str(len(group)),
                first.method,
                str(first.rank),
                "" if first.alpha is None else f"{first.alpha:g}",
                f"{first.scale:g}",
                " x ".join(map(str, first.shape or ("?",))),
                f"{sum(layer.parameters for layer in group):,}",
            ]
        )
    heads = ["layer", "layers", "method", "rank", "alpha", "scale", "out x in", "parameters"]
    return ["## Layers", _table(heads, rows)] if rows else []


def _training(recipe: Mapping[str, Any], facts: Mapping[str, Any], run: Path | None) -> list[str]:
    """Return what a run's files say of how the adapter was trained, and how good it is."""
    if run is None:
        return []
    data = _data_set(recipe)
    rows = {"data": f"[{data}]({_HUB}/datasets/{data})" if data else ""}
    rows |= {"training examples": _value(facts.get("examples")), "held-out examples": _value(facts.get("held_out"))}
    done, steps = facts.get("steps_done"), recipe.get("steps")
    rows["steps"] = f"{_value(done)} of {_value(steps)}" if done and steps and done != steps else _value(done or steps)
    rows |= {key.replace("_", " "): _value(recipe.get(key)) for key in _SETTINGS}
    rows["dtype of the base"] = _value(recipe.get("dtype"))
    rows["device"] = _value(facts.get("device"))
    versions = facts.get("versions")
    if isinstance(versions, dict):
        listed = {"lorank": facts.get("lorank"), **versions}
        rows["versions"] = ", ".join(f"{name} {_text(text)}" for name, text in listed.items() if text)
    blocks = ["## Training", _table(["setting", "value"], [[key, value] for key, value in rows.items() if value])]
    best = facts.get("best")
    if isinstance(best, dict) and best:
        step = best.get("step")
        scores = [[_text(key), _number(value)] for key, value in best.items() if key != "step"]
        blocks += [f"Scores on the held-out examples{f', at step {step}' if step else ''}:"]
        blocks += [_table(["score", "value"], scores)]
    if (run / PLOT).is_file():
        blocks.append(f"![loss by step]({PLOT})")
    return blocks


def _use(found: Examination, base: str | None, repo: str, not_peft: list[str], files: list[str]) -> list[str]:
    """Return how to load the adapter of these files; what they do not say is left to the reader."""
    name, task = repo.rpartition("/")[2], _task(found)
    path, path_option = "", ""
    if len(files) == 1:
        name = shlex.quote(f"{name}/{files[0]}")
        if not _is_found(files[0]):
            path, path_option = f", path={json.dumps(files[0])}", f" --path {shlex.quote(files[0])}"
    cls = _CLASSES.get(task) if base else None
    labels = found.about.get("labels")
    outputs = len(labels) if isinstance(labels, list) else 1 if task == "regression" else None
    heads = f", num_labels={outputs}" if outputs and task != "causal-lm" else ""
    model = f'model = {cls}.from_pretrained("{base}"{heads})' if cls else "model = ...  # the base, as a PyTorch module"
    imported = f"from transformers import {cls}\n" if cls else ""
    blocks = [
        "## Use",
        "With lorank:",
        f'```python\nimport lorank\n{imported}\n{model}\nlorank.load(model, lorank.pull("{repo}"{path}))\n```',
    ]
    if not_peft:
        listed = "".join(f"\n- {_text(reason)}" for reason in not_peft)
        blocks.append(f"PEFT cannot load it:\n{listed}")
    else:
        peft = f'model = PeftModel.from_pretrained(model, "{repo}")'
        blocks.append("With PEFT:")
        blocks.append(f"```python\nfrom peft import PeftModel\n{imported}\n{model}\n{peft}\n```")
    base_option = "" if base else " --model path/to/base"
    lines = [f"lorank pull {repo}{path_option}", f"lorank inspect {name}"]
    lines += [f"lorank generate --adapter {name} --prompt '...'"] if base and task == "causal-lm" else []
    lines += [f"lorank merge --adapter {name}{base_option} --out merged"] if not found.beside else []
    merged = "" if found.beside else ", merged into an ordinary checkpoint"
    blocks.append(f"On the command line{merged}:")
    blocks.append("```sh\n" + "\n".join(lines) + "\n```")
    return blocks


def _is_found(file: str) -> bool:
    """Tell whether an adapter's only file is found in a repository by its name."""
    try:
        return choose([file], None, allow_pickle=False).file == file
    except AdapterError:
        return False


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _span(values: list[Any]) -> str:
    low, high = min(values, default=None), max(values, default=None)
    if low is None:
        return ""
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _value(value: Any) -> str:
    """Return a setting as the tables show it; nothing for what is not set, and for paths."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return "" if _is_path(value) else _code(value)
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(shown for item in value if (shown := _value(item)))
    return ""


def _is_path(text: str) -> bool:
    """Tell whether a text is a path on some machine."""
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not a number" if value is None else _text(value)
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 1000 else f"{value:,.4g}"


def _text(value: Any) -> str:
    """Return a text in which nothing is markup, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(value).split()))


def _code(text: str) -> str:
    """Return a text set as code, on one line of a table; line breaks become visible."""
    shown = repr(text)[1:-1].replace("\\'", "'") if not text.isprintable() else text
    fence = "``" if "`" in shown else "`"
    pad = " " if "`" in shown or shown != shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")
