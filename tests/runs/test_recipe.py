"""Recipes: one set of keys in a file and on the command line, and every wrong one is named at once."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorank import AdapterError
from lorank.runs.recipe import Recipe, parse_overrides

GIVEN: dict[str, Any] = {"model": "m", "data": "d.csv"}


def recipe(*assignments: str, **given: Any) -> Recipe:
    return Recipe.of(None, GIVEN, given, parse_overrides(assignments))


def problems(**given: Any) -> list[str]:
    with pytest.raises(AdapterError) as caught:
        Recipe(**(GIVEN | given))
    first, *rest = str(caught.value).splitlines()
    if not rest:
        return [first.removeprefix("the recipe cannot be used: ")]
    assert first == "the recipe cannot be used:"
    return [line.strip() for line in rest]


def test_later_keys_win_over_earlier_ones_and_all_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: base\ndata: d.csv\nrank: 4\nlearning_rate: 2e-4\nsteps: 10\ntargets: [q_proj, v_proj]\n")
    made = Recipe.of(str(path), {"rank": 16, "steps": 20}, {"steps": 30, "clip": None})
    assert (made.model, made.rank, made.steps, made.learning_rate, made.clip) == ("base", 16, 30, 2e-4, None)
    assert made.targets == ["q_proj", "v_proj"]
    untouched = {"epochs", "alpha", "betas", "seed"}
    defaults = Recipe(**GIVEN)
    assert all(getattr(made, name) == getattr(defaults, name) for name in untouched)


def test_an_unknown_key_brings_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r"there is no key 'lerning_rate'; nearest: learning_rate"):
        recipe("lerning_rate=1")
    with pytest.raises(AdapterError) as caught:
        recipe("rnak=3", zzz=1)
    assert len(str(caught.value).splitlines()) == 3, "every unknown key has its line"


def test_an_option_of_a_method_is_told_where_it_goes() -> None:
    with pytest.raises(AdapterError, match=r"'gamma'; it is an option of lora-ga: method_options=\{gamma: \.\.\.\}"):
        recipe("gamma=2")
    for key in ("projection", "variant"):  # the first is a field of VeRA, which the base decides on
        with pytest.raises(AdapterError, match=f"there is no key '{key}'; (?!it is an option)"):
            recipe(f"{key}=9")


def test_everything_wrong_is_said_at_once() -> None:
    found = problems(rank="many", chat="maybe", targets={"a": 1}, steps=1.5, alphas="q=3", model="", seed=None)
    assert found == [
        "model is missing",
        "chat is 'maybe'; it must be true or false",
        "targets is {'a': 1}; it must be a list",
        "rank is 'many'; it must be a whole number or none",
        "alphas is 'q=3'; it must be values by pattern, {pattern: value}",
        "steps is 1.5; it must be a whole number or none",
        "seed is None; it must be a whole number",
    ]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"task": "translation"},
            "task is 'translation'; it must be one of auto, causal-lm, classification, regression",
        ),
        ({"train_on": "prompt"}, "train_on is 'prompt'; it must be one of completion, all"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of auto, float32, bfloat16, mixed"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"eval_share": 1.0}, "eval_share is 1.0; it must lie in [0, 1)"),
        ({"dropout": -0.1}, "dropout is -0.1; it must lie in [0, 1)"),
        ({"clip": 0}, "clip is 0.0; it must be above 0"),
        ({"epochs": -1}, "epochs is -1.0; it must be above 0"),
        ({"warmup": -1}, "warmup is -1.0; it may not be negative"),
        ({"alpha": 0}, "alpha is 0; nothing would train"),
        ({"system": "be short"}, "system needs chat: it goes into the chat template"),
        ({"steps": float("inf")}, "steps is inf; it must be a whole number or none"),
        ({"steps": "nan"}, "steps is 'nan'; it must be a whole number or none"),
        ({"epochs": "inf"}, "epochs is 'inf'; it must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a number or none"),
        ({"rank": True}, "rank is True; it must be a whole number or none"),
        ({"model": ["a"]}, "model is ['a']; it must be text"),
        ({"betas": [0.9, "x"]}, "betas is [0.9, 'x']; it must be a list"),
        ({"ranks": {"q": 1.5}}, "ranks is {'q': 1.5}; it must be values by pattern, {pattern: value}"),
    ],
)
def test_a_value_that_cannot_be_used_is_said(given: dict[str, Any], problem: str) -> None:
    assert problems(**given) == [problem]


def test_values_out_of_range_are_listed_together() -> None:
    assert len(problems(rank=0, batch_size=-1, dropout=2, schedule="square")) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj,", ["q_proj", "v_proj"]),
        ("c_attn[q,v]", ["c_attn[q,v]"]),
        ("c_attn[q,v],c_proj,x[a,b,c]", ["c_attn[q,v]", "c_proj", "x[a,b,c]"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("all-linear,!lm_head", ["all-linear", "!lm_head"]),
        ("!lm_head", ["!lm_head"]),
        ("*.q_proj", ["*.q_proj"]),
        ("re:.*(q|v)_proj", ["re:.*(q|v)_proj"]),
    ],
)
def test_lists_are_split_at_commas_but_not_in_brackets(text: str, expected: list[str]) -> None:
    assert recipe(f"targets={text}").targets == expected
    assert recipe(targets=text if not text.startswith("[") else expected).targets == expected


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("learning_rate=2e-4", 2e-4),
        ("learning_rate=1E-3", 1e-3),
        ("learning_rate=none", None),
        ("learning_rate=", None),
        ("learning-rate=0.5", 0.5),
        ("steps=1e3", 1000),
        ("steps=12", 12),
        ("steps=none", None),
        ("clip=none", None),
        ("clip=2", 2.0),
        ("chat=true", True),
        ("chat=false", False),
        ("betas=0.8,0.99", [0.8, 0.99]),
        ("betas=[0.8, 0.99]", [0.8, 0.99]),
        ("ranks={q_proj: 4, v_proj: 2}", {"q_proj": 4, "v_proj": 2}),
        ("alphas={q_proj: 1e-1}", {"q_proj": 0.1}),
        ("bias=none", "none"),
        ("train_also=none", None),
        ("train_also=[]", []),
        ("train_also=score,norm", ["score", "norm"]),
        ("system=none", None),
        ("wandb=null", None),
        ("prompt=Q: {q}\\nA:", "Q: {q}\nA:"),
        ("prompt={q}", "{q}"),
        ("text=007", "007"),
        ("output=a=b", "a=b"),
        ("label=yes", "yes"),
    ],
)
def test_words_of_the_command_line_are_read_as_their_field_has_them(assignment: str, expected: Any) -> None:
    name = assignment.partition("=")[0].replace("-", "_")
    value = getattr(recipe(assignment), name)
    assert value == expected and type(value) is type(expected)


def test_a_word_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"'rank' is no key=value; known keys are model, data, .* and more"):
        parse_overrides(["rank"])


def test_texts_of_a_file_are_read_as_numbers_where_a_number_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: 7\ndata: d.csv\nlearning_rate: 2e-4\nclip: none\ntargets: q,v\nbetas: 0.9, 0.95\n")
    made = Recipe.of(str(path))
    assert (made.model, made.learning_rate, made.clip) == ("7", 2e-4, None)
    assert (made.targets, made.betas) == (["q", "v"], [0.9, 0.95])


FULL: dict[str, Any] = {
    "model": "päth/to model",
    "data": "d.csv",
    "prompt": "Q: {q}\nA:",
    "completion": " {a}",
    "chat": True,
    "system": "be: short # really\n\n- yes",
    "targets": ["c_attn[q,v]", "!lm_head", "*.q_proj", "re:.*(q|v)"],
    "ranks": {"*.q_proj": 2},
    "alphas": {"x": 0.5},
    "train_also": [],
    "learning_rate": 2e-4,
    "epsilon": 1e-12,
    "clip": None,
    "steps": 3,
    "eval_data": "null",
    "label": "1e3",
}


@pytest.mark.parametrize("given", [GIVEN, FULL, GIVEN | {"train_also": ["a", "b"], "bias": "all", "wandb": "007"}])
def test_a_recipe_can_be_read_again_from_what_it_writes(tmp_path: Path, given: dict[str, Any]) -> None:
    made = Recipe(**given)
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    assert Recipe.of(str(path)) == made
    assert list(yaml.safe_load(made.to_yaml())) == Recipe.names()
    assert all(getattr(made, name) == value for name, value in given.items())


def test_two_recipes_share_no_list() -> None:
    one, other = Recipe(**GIVEN), Recipe(**GIVEN)
    one.targets.append("x")
    one.ranks["x"] = 1
    assert other.targets == ["all-linear"] and other.ranks == {}
    assert Recipe(**GIVEN).targets == ["all-linear"]


def test_every_key_has_its_line_in_the_help() -> None:
    for field in dataclasses.fields(Recipe):
        assert field.metadata["help"] and field.metadata["panel"] in ("Model and data", "Adapter", "Training", "Output")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("- a\n- b\n", r"holds \['a', 'b'\], not keys with values"),
        ("", "holds None, not keys with values"),
        ("a: [1\n", "is not YAML"),
        (b"\xff\xfe\xff", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_said(tmp_path: Path, content: str | bytes, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterError, match=problem):
        Recipe.of(str(path))


def test_a_missing_recipe_brings_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "llama.yaml").write_text("model: m\n")
    with pytest.raises(AdapterError, match=r"there is no recipe .*lama\.yml; nearest: llama\.yaml"):
        Recipe.of(str(tmp_path / "lama.yml"))
    with pytest.raises(AdapterError, match="there is no recipe"):
        Recipe.of(str(tmp_path / "nowhere" / "a.yaml"))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: a\ndata: b\nrank: 4\nrank: 8\n")
    with pytest.raises(AdapterError, match=r"r\.yaml has rank twice"):
        Recipe.of(str(tmp_path / "r.yaml"))


def test_lists_are_not_split_inside_of_brackets_of_any_kind() -> None:
    made = Recipe(model="m", data="d", targets="c_attn[q,v],re:.*(q|v){1,2},k_proj")  # type: ignore[arg-type]
    assert made.targets == ["c_attn[q,v]", "re:.*(q|v){1,2}", "k_proj"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"seed": -1}, "seed is -1; it must lie between 0 and 4294967295"),
        ({"betas": [0.9]}, "betas are [0.9]; they must be two numbers in [0, 1)"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it may not be negative"),
    ],
)
def test_what_the_optimiser_would_refuse_is_refused_first(given: Any, reason: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(reason)):
        Recipe(model="m", data="d", **given)
