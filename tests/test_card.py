"""The model card: what stands in it is in the files, nothing of this machine is, and its code runs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import lorank
from lorank import LoRA
from lorank.card import is_untouched, model_card, why_not_peft

from . import checkpoints, models
from .cli.running import run, run_json
from .hub_server import Hub, connected
from .runs.cases import completions, sentiments

Tables = list[list[list[str]]]


def save(folder: Path, model: Any, targets: Any, spec: Any = None, about: Any = None, **options: Any) -> Any:
    lorank.adapt(model, spec or LoRA(rank=4, alpha=6), targets, **options)
    models.disturb(model)
    lorank.save(model, folder, about=about)
    return model


def tables(card: str) -> Tables:
    """Return the rows of every table; a row with too many or too few cells would not be one."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])} and set(rows[1]) == {"---"}
        found.append([rows[0], *rows[2:]])
    return found


def settings(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def code(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def train(base: Path, data: Path, output: Path, *words: object) -> Path:
    fixed = ["--steps", 4, "--eval-every", 2, "--batch-size", 4, "--output", output]
    run_json("train", "--model", base, "--data", data, *fixed, *words)
    return output


def test_the_facts_are_those_of_the_file(tmp_path: Path) -> None:
    model = models.llama()
    model.config._name_or_path = "someone/tiny-llama"
    save(
        tmp_path, model, ["q_proj", "down_proj"], train_also=["norm"], ranks={"layers.1.*": 2}, alphas={"layers.1.*": 5}
    )
    card = model_card(tmp_path, "me/first", license="apache-2.0")
    assert settings(card) == {
        "base_model": "someone/tiny-llama",
        "library_name": "peft",
        "tags": ["lora", "lorank"],
        "license": "apache-2.0",
    }
    facts, layers = tables(card)
    rows = {row[0]: row[1] for row in facts}
    size = sum((tmp_path / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert rows.pop("size") == f"{size / 1000:.1f} kB"
    count = sum(parameter.numel() for parameter in lorank.adapter_parameters(model).values())
    assert rows == {
        "": "",
        "base": "[someone/tiny-llama](https://huggingface.co/someone/tiny-llama)",
        "method": "`lora`",
        "rank": "2 to 4",
        "alpha": "5 to 6",
        "scale": "1.5 to 2.5",
        "trained parameters": f"{count:,}",
        "trained whole": "`model.norm`",
    }
    assert layers[0] == ["layer", "layers", "method", "rank", "alpha", "scale", "out x in", "parameters"]
    assert ["`model.layers.0.self_attn.q_proj`", "1", "lora", "4", "6", "1.5", "32 x 32", "256"] in layers
    assert ["`model.layers.1.mlp.down_proj`", "1", "lora", "2", "5", "2.5", "32 x 48", "160"] in layers
    assert "# first\n" in card and "## Training" not in card


@pytest.mark.parametrize("spec", [lorank.DoRA(rank=4, alpha=6), lorank.LoHa(rank=4, alpha=6), lorank.VeRA(rank=8)])
def test_the_method_is_named(spec: Any, tmp_path: Path) -> None:
    save(tmp_path, models.llama(), ["q_proj"], spec)
    card = model_card(tmp_path, "me/first")
    assert settings(card)["tags"] == ["lora", "lorank", spec.variant]
    assert f"A low-rank adapter ({type(spec).__name__})." in card and f"| `{spec.variant}` |" in card


def test_what_the_maker_says_does_not_replace_what_was_found(tmp_path: Path) -> None:
    about = {"rank": 64, "size": "tiny", "base": "other/base", "tied": "all", "mine": "kept"}
    save(tmp_path, models.llama(), ["q_proj"], about=about)
    rows = {row[0]: row[1] for row in tables(model_card(tmp_path, "me/first"))[0]}
    assert rows["rank"] == "4" and "kB" in rows["size"] and rows["mine"] == "`kept`"
    assert not {"base", "tied"} & rows.keys()


@pytest.mark.parametrize(
    ("file", "options"), [("my-lora.gguf", ""), ("sst2.gguf", " --path sst2.gguf"), ("my lora.safetensors", "")]
)
@pytest.mark.filterwarnings("ignore:.*known with their model alone:lorank.AdapterWarning")
def test_commands_name_an_adapters_only_file(file: str, options: str, hub: Hub, tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    lorank.adapt(model, LoRA(rank=2), ["q_proj"])
    models.disturb(model)
    lorank.save(model, tmp_path / file, format="gguf" if file.endswith("gguf") else "kohya")
    lorank.push(tmp_path / file, "me/single")
    card = model_card(tmp_path / file, "me/single")
    ((block, *_),) = [re.findall(r"^```sh\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)]
    pulled, *others = [shlex.split(line)[1:] for line in block.splitlines()]
    assert block.startswith(f"lorank pull me/single{options}\n") and [words[0] for words in others] == [
        "inspect",
        "merge",
    ]
    for words in (pulled, *others):
        run(*[str(base) if word == "path/to/base" else word for word in words])
    assert (Path("merged") / "config.json").is_file()
    path = f', path="{file}"' if options else ""
    assert f'lorank.pull("me/single"{path})' in card


def test_a_run_tells_how_it_was_trained(tmp_path: Path) -> None:
    base = checkpoints.causal(tmp_path / "base")
    data = completions(tmp_path / "secret-data.jsonl")
    folder = train(base, data, tmp_path / "run", "--learning-rate", 0.01, "--dropout", 0.1, "--seed", 5)
    card = model_card(folder, "me/first")
    assert card == model_card(folder / "adapter", "me/first") == model_card(folder, "me/first")
    facts = json.loads((folder / "run.json").read_text())
    first, _, training, scores = ({row[0]: row[-1] for row in table} for table in tables(card))
    share = facts["trainable_parameters"] / facts["base_parameters"]
    trained = f"{facts['trainable_parameters']:,}, {share:.3%} of the base's {facts['base_parameters']:,}"
    assert first["trained parameters"] == trained and first["task"] == "`causal-lm`" and first["prompt"] == "`prompt`"
    wanted = {
        "steps": "4",
        "batch size": "4",
        "learning rate": "0.01",
        "dropout": "0.1",
        "seed": "5",
        "device": "`cpu`",
    }
    assert wanted.items() <= training.items()
    assert training["training examples"] == str(facts["examples"])
    assert training["held-out examples"] == str(facts["held_out"]) and "torch" in training["versions"]
    best = facts["best"]
    assert f"at step {best['step']}:" in card and scores["loss"] == f"{best['loss']:.4f}"
    assert "![loss by step](loss.png)" in card
    for trace in (str(tmp_path), "secret-data", "/home", "/usr", "base_model", "datasets:"):
        assert trace not in card
    (folder / "loss.png").unlink()
    facts.pop("best")
    (folder / "run.json").write_text(json.dumps(facts))
    unfinished = model_card(folder, "me/first")
    assert "loss.png" not in unfinished and "Scores" not in unfinished


def test_a_data_set_of_the_hub_is_named_and_a_file_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run" / "adapter", models.llama(), ["q_proj"])
    monkeypatch.chdir(tmp_path)
    Path("local-data").mkdir()
    for data, named in {
        "nyu-mll/glue:sst2": "nyu-mll/glue",
        "imdb": "imdb",
        "/data/x": None,
        "data.jsonl": None,
        "some/data.parquet": None,
        "local-data": None,
        "~/x": None,
        "../x": None,
    }.items():
        (tmp_path / "run" / "recipe.yaml").write_text(f"model: m\ndata: {data}\n")
        card = model_card(tmp_path / "run", "me/first")
        assert settings(card).get("datasets") == ([named] if named else None)
        assert named is not None or data not in card


def test_what_peft_cannot_load_is_not_offered(tmp_path: Path) -> None:
    model: Any = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(4, 6)})
    save(tmp_path, model, ["lstm"])
    card = model_card(tmp_path, "me/first")
    assert settings(card)["library_name"] == "lorank" and "PeftModel" not in card
    assert "PEFT cannot load it:\n\n- lstm: only lorank reads this layer" in card
    assert why_not_peft({"peft_type": "LORA", "layers_pattern": "h", "layers_to_transform": [1]}) == []
    assert why_not_peft({"peft_type": "LORA", "layers_pattern": None}) == []
    assert why_not_peft(None)


def test_paths_of_a_machine_stay_there(tmp_path: Path) -> None:
    about = {"task": "causal-lm", "prompt": "{q}\n", "where": str(tmp_path), "home": "~/x", "disk": "C:\\data\\x"}
    save(tmp_path, models.llama(), ["q_proj"], about=about)
    file = tmp_path / "adapter_config.json"
    for base in (str(tmp_path / "llama"), "./llama", "~/llama", "C:\\llama", "llama.gguf", "a/b/c", str(tmp_path)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
        card = model_card(tmp_path, "me/first")
        assert base not in card and str(tmp_path) not in card and "base_model" not in settings(card)
        assert "~/x" not in card and "C:" not in card and "| prompt | `{q}\\n` |" in card
        assert "model = ...  # the base" in code(card)[0] and "--model path/to/base" in card


def test_names_do_not_break_the_page(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict(
        {"a|b": torch.nn.Linear(4, 4), "c`d": torch.nn.Linear(4, 4), "e\t# f": torch.nn.Linear(4, 4)}
    )
    about = {"task": "x | y\n# heading", "labels": ["a|b", "<b>", "```"], "n|n": 1, "nested": {"a": 1}}
    save(tmp_path, model, lambda name, module: isinstance(module, torch.nn.Linear), about=about)
    card = model_card(tmp_path, "me/first")
    facts, layers = tables(card)
    assert len(layers) == 4 and ["task", "`x \\| y\\n# heading`"] in facts and ["n\\|n", "1"] in facts
    assert "\n# heading" not in card and "\t" not in card and "nested" not in card
    headings = re.findall(r"^#+ .*$", card, re.MULTILINE)
    assert headings == ["# first", "## Layers", "## Use"]


def test_it_is_known_whether_somebody_changed_a_card(tmp_path: Path) -> None:
    save(tmp_path, models.llama(), ["q_proj"])
    card = model_card(tmp_path, "me/first")
    assert is_untouched(card) and is_untouched(card.replace("\n", "\r\n"))
    assert not is_untouched(card.replace("# first", "# My first"))
    assert not is_untouched(card + "More.\n") and not is_untouched("# Mine\n") and not is_untouched("")


def test_the_hubs_library_reads_it(tmp_path: Path) -> None:
    save(tmp_path, models.llama(), ["q_proj"])
    data = ModelCard(model_card(tmp_path, "me/first", license="mit")).data.to_dict()
    assert data == {"library_name": "peft", "license": "mit", "tags": ["lora", "lorank"]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Hub().running() as found, connected(found, tmp_path / "home"):
        found.big = 10**9
        yield found


# peft reads a property that this transformers deprecates
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning")
def test_its_code_does_what_the_adapter_does(hub: Hub, tmp_path: Path) -> None:
    """Both ways of a card, with the base from the hub, compute what the model did that was saved."""
    torch.manual_seed(0)
    base = models.llama()
    base.save_pretrained(tmp_path / "base")
    hub.holding("someone/tiny", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    base.config._name_or_path = "someone/tiny"
    model = save(tmp_path / "adapter", base, ["q_proj", "v_proj"], about={"task": "causal-lm"})
    ids = models.ids(2, 6)
    wanted = model(ids).logits
    lorank.push(tmp_path / "adapter", "me/first")
    lorank.pull("me/first", "read-me")
    blocks = code((Path("read-me") / "README.md").read_text())
    assert len(blocks) == 2 and "lorank.load" in blocks[0] and "PeftModel" in blocks[1]
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        assert torch.allclose(names["model"].eval()(ids).logits, wanted, atol=1e-5)


def test_the_code_of_a_classifier_has_its_labels(hub: Hub, tmp_path: Path) -> None:
    checkpoints.encoder(tmp_path / "bert")
    folder = train(tmp_path / "bert", sentiments(tmp_path / "data.tsv"), tmp_path / "run")
    hub.holding("someone/bert", {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()})
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/bert"}))
    lorank.push(folder, "me/reviews")
    card = model_card(folder, "me/reviews")
    assert {row[0]: row[1] for row in tables(card)[0]}["labels"] == "`bad`, `good`"
    assert ", as a classifier" in card and "num_labels=2" in card and "lorank generate" not in card
    names: dict[str, Any] = {}
    exec(code(card)[0], names)
    assert names["model"].classifier.out_features == 2
    assert {"classifier"} <= {name.partition(".")[0] for name in lorank.adapter_parameters(names["model"])}
