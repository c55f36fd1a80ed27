"""Preparing a run: the task is told by the columns, and what would not work later is said before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertLMHeadModel

from lorank import AdapterError
from lorank.accounting import Memory
from lorank.models import load_base, load_tokenizer
from lorank.runs.columns import choose_columns
from lorank.runs.prepare import Prepared, choose_device, choose_dtype, memory_of, prepare
from lorank.runs.recipe import Recipe
from lorank.tasks import Classification, Regression
from lorank.training.rate import suggested_rate

from .. import checkpoints
from . import cases

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.causal(tmp_path_factory.mktemp("causal")))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.encoder(tmp_path_factory.mktemp("encoder")))


def jsonl(folder: Path, records: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def reviews(count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"a {('bad', 'good')[i % 2]} film", "label": ("neg", "pos")[i % 2]} for i in range(count)]


def answers(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"what is {i}? ", "completion": "the quick fox"} for i in range(count)]


def chosen(columns: dict[str, list[Any]] | Dataset, **given: Any) -> dict[str, Any]:
    """Return the task and the columns that are chosen for data with these columns."""
    data = columns if isinstance(columns, Dataset) else Dataset.from_dict(columns)
    made = choose_columns(Recipe(model="m", data="d", **given), data)
    names = ("task", "messages", "prompt", "completion", "text", "text_pair", "label")
    return {name: getattr(made, name) for name in names if getattr(made, name) is not None}


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        ({"messages": [TURNS]}, {}, {"task": "causal-lm", "messages": "messages"}),
        ({"turns": [TURNS]}, {"messages": "turns"}, {"task": "causal-lm", "messages": "turns"}),
        (
            {"prompt": ["a"], "completion": ["b"], "id": ["1"]},
            {},
            {"task": "causal-lm", "prompt": "prompt", "completion": "completion"},
        ),
        (
            {"q": ["a"], "completion": ["b"]},
            {"prompt": "Q: {q}"},
            {"task": "causal-lm", "prompt": "Q: {q}", "completion": "completion"},
        ),
        (
            {"q": ["a"], "a": ["b"], "text": ["c"], "label": [1]},
            {"prompt": "q", "completion": "a"},
            {"task": "causal-lm", "prompt": "q", "completion": "a"},
        ),
        ({"text": ["a"]}, {}, {"task": "causal-lm", "text": "text"}),
        ({"body": ["a"]}, {"text": "{body}!"}, {"task": "causal-lm", "text": "{body}!"}),
        (
            {"text": ["a"], "label": [1]},
            {"task": "causal-lm"},
            {"task": "causal-lm", "text": "text"},
        ),
        (
            {"text": ["a", "b"], "label": ["x", "y"]},
            {},
            {"task": "classification", "text": "text", "label": "label"},
        ),
        (
            {"sentence": ["a", "b"], "label": [0, 1], "idx": [1, 2]},
            {},
            {"task": "classification", "text": "sentence", "label": "label"},
        ),
        (
            {"text": ["a", "b"], "stars": ["1", "2"]},
            {"label": "stars"},
            {"task": "classification", "text": "text", "label": "stars"},
        ),
        (
            {"a": ["x", "y"], "b": ["x", "y"], "label": ["1", "2"]},
            {"text": "a", "text_pair": "b"},
            {"task": "classification", "text": "a", "text_pair": "b", "label": "label"},
        ),
        (
            {"text": ["a", "b"], "label": [1.0, 2.5]},
            {},
            {"task": "regression", "text": "text", "label": "label"},
        ),
        (
            {"text": ["a", "b"], "score": ["3", "4.5"]},
            {"label": "score"},
            {"task": "regression", "text": "text", "label": "score"},
        ),
        (
            {"text": ["a", "b"], "label": [1, 2]},
            {"task": "regression"},
            {"task": "regression", "text": "text", "label": "label"},
        ),
        (
            {"text": ["a", "b"], "label": [1.5, 2.5]},
            {"task": "classification"},
            {"task": "classification", "text": "text", "label": "label"},
        ),
        (
            {"text": ["a", "b"], "label": ["1.5", "neither"]},
            {},
            {"task": "classification", "text": "text", "label": "label"},
        ),
    ],
)
def test_the_task_is_told_by_the_columns(columns: dict[str, Any], given: Any, expected: dict[str, str]) -> None:
    assert chosen(columns, **given) == expected


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "messages, prompt and completion, text, or text and label"),
        ({"task": "causal-lm"}, "messages, prompt and completion, or text"),
        ({"task": "classification"}, "text and label"),
        ({"task": "regression", "text": "question"}, "text and label"),
    ],
)
def test_when_the_columns_do_not_tell_they_are_named(given: Any, wanted: str) -> None:
    with pytest.raises(AdapterError) as caught:
        chosen({"question": ["a"], "answer": ["b"]}, **given)
    assert str(caught.value) == (
        f"the data has the columns question, answer; say which of them are {wanted}, "
        "for instance --prompt question --completion answer"
    )


def test_a_column_that_is_not_there_is_said(tmp_path: Path, causal: str, encoder: str) -> None:
    data = jsonl(tmp_path, reviews())
    with pytest.raises(AdapterError, match="the label column 'lable' is not in the data; nearest: label"):
        prepare(Recipe(model=encoder, data=data, label="lable"))
    with pytest.raises(AdapterError, match="the text column 'txt' is not in the data; nearest: text"):
        prepare(Recipe(model=encoder, data=data, label="label", text="txt"))
    with pytest.raises(AdapterError, match="a completion is missing: prompt and completion go together"):
        prepare(Recipe(model=causal, data=data, prompt="text"))


def test_a_run_on_prompts_is_prepared(tmp_path: Path, causal: str) -> None:
    data = jsonl(tmp_path, answers())
    made = prepare(Recipe(model=causal, data=data, rank=4, batch_size=4, accumulate=2, epochs=2, warmup=0.1))
    assert (len(made.train), len(made.held_out)) == (38, 2)
    assert made.task.kind == made.recipe.task == "causal-lm"
    assert made.config.steps == made.recipe.steps == 10
    assert made.config.warmup == 1
    assert made.recipe.max_length == made.task.max_length == 256
    assert made.recipe.alpha == 8 and made.recipe.best == "loss" and made.recipe.device == str(made.device)
    assert made.recipe.output == f"runs/data-{Path(causal).name}"
    assert made.recipe.train_also == []
    assert "held out 2 of 40 records for evaluation (eval_share)" in made.remarks
    assert len(made.largest_batch()) == 4
    assert len(made.largest_batch()[-1].ids) == max(len(example.ids) for example in made.train)


def test_the_suggested_learning_rate_is_said(tmp_path: Path, causal: str) -> None:
    data = jsonl(tmp_path, answers())
    made = prepare(Recipe(model=causal, data=data, rank=4, alpha=4, rank_stabilised=True))
    rate = suggested_rate(32, 4 / 4**0.5)
    assert made.config.learning_rate == made.recipe.learning_rate == rate
    (said,) = [remark for remark in made.remarks if "learning_rate" in remark]
    assert said.startswith(f"learning_rate {rate:g} is a suggestion, from the width 32 and the scale 2")
    given = prepare(Recipe(model=causal, data=data, learning_rate=1e-4))
    assert given.config.learning_rate == 1e-4
    assert not any("learning_rate" in remark for remark in given.remarks)


def test_the_shares_of_held_out_data(tmp_path: Path, causal: str) -> None:
    data = jsonl(tmp_path, answers())

    def sizes(**given: Any) -> tuple[int, int]:
        made = prepare(Recipe(model=causal, data=data, **given))
        return len(made.train), len(made.held_out)

    assert sizes(eval_share=0) == (40, 0)
    assert sizes(eval_share=0.25) == (30, 10)
    assert sizes(eval_share=0.25, eval_limit=3) == (37, 3)
    assert sizes(limit=20) == (19, 1)
    other = jsonl(tmp_path, answers(5), "held.jsonl")
    assert sizes(eval_data=other) == (40, 5)
    assert sizes(eval_data=other, eval_limit=2) == (40, 2)


def test_the_same_recipe_prepares_the_same_run(tmp_path: Path, causal: str) -> None:
    data = jsonl(tmp_path, answers())

    def of(seed: int) -> tuple[Prepared, dict[str, torch.Tensor]]:
        made = prepare(Recipe(model=causal, data=data, seed=seed))
        return made, {name: p for name, p in made.model.named_parameters() if p.requires_grad}

    (one, a), (other, b), (third, c) = of(1), of(1), of(2)
    assert one.data_digest() == other.data_digest() != third.data_digest()
    assert one.base_digest() == other.base_digest() == third.base_digest()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_fresh_head_is_trained_whole(tmp_path: Path, encoder: str) -> None:
    made = prepare(Recipe(model=encoder, data=jsonl(tmp_path, reviews())))
    assert isinstance(made.task, Classification) and made.task.labels == ["neg", "pos"]
    assert made.base.fresh == made.recipe.train_also == ["classifier"]
    assert made.model.config.id2label == {0: "neg", 1: "pos"}
    assert made.recipe.best == "accuracy"
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in trained)
    with pytest.raises(AdapterError, match=r"classifier would stay at random values.*by default classifier"):
        prepare(Recipe(model=encoder, data=str(tmp_path / "data.jsonl"), train_also=[]))


def test_a_head_of_the_checkpoint_is_kept(tmp_path: Path, encoder: str) -> None:
    config = BertConfig.from_pretrained(encoder, num_labels=2)
    head = BertForSequenceClassification(config)
    folder = tmp_path / "classifier"
    head.save_pretrained(folder)
    load_tokenizer(encoder).save_pretrained(folder)
    base = load_base(str(folder), "classification", labels=["a", "b"])
    assert base.fresh == [] and torch.equal(base.model.classifier.weight, head.classifier.weight)
    assert load_base(str(folder), "classification", labels=["a", "b", "c"]).fresh == ["classifier"]
    made = prepare(Recipe(model=str(folder), data=jsonl(tmp_path, reviews())))
    assert made.recipe.train_also == ["classifier"]


def labelled(path: Path, numbers: list[int | None], names: list[str]) -> str:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": [f"a {number} film" for number in numbers], "label": numbers}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def test_names_of_labels_are_those_of_the_data_set(tmp_path: Path, encoder: str) -> None:
    data = labelled(tmp_path / "a.parquet", [0, 1] * 10, ["neg", "pos"])
    held = labelled(tmp_path / "b.parquet", [1, 0], ["neg", "pos"])
    made = prepare(Recipe(model=encoder, data=data, eval_data=held))
    assert made.recipe.task == "classification"
    assert isinstance(made.task, Classification) and made.task.labels == ["neg", "pos"]
    assert sorted(example.labels for example in made.train) == [0] * 10 + [1] * 10
    assert sorted(example.labels for example in made.held_out) == [0, 1]


@pytest.mark.parametrize("missing", [-1, None])
def test_a_record_without_a_label_is_said(tmp_path: Path, encoder: str, missing: int | None) -> None:
    data = labelled(tmp_path / "a.parquet", [0, 1, missing, 1, 0], ["neg", "pos"])
    with pytest.raises(AdapterError, match=r"the label column 'label' is empty in 1 of 5 records \(records 3\)"):
        prepare(Recipe(model=encoder, data=data, eval_share=0))


def test_a_regression_on_numbered_names_takes_the_numbers(tmp_path: Path, encoder: str) -> None:
    data = labelled(tmp_path / "a.parquet", [0, 1, 2] * 5, ["bad", "fair", "good"])
    made = prepare(Recipe(model=encoder, data=data, task="regression", eval_share=0))
    assert isinstance(made.task, Regression)
    assert sorted({float(example.labels) for example in made.train}) == [0, 1, 2]  # type: ignore[arg-type]
    assert made.model.config.num_labels == 1 and made.recipe.best == "loss"


def test_a_label_that_is_only_held_out_is_known(tmp_path: Path, encoder: str) -> None:
    records = [*reviews(20), {"text": "a dog", "label": "other"}]
    for seed in range(6):
        made = prepare(Recipe(model=encoder, data=jsonl(tmp_path, records), seed=seed, eval_share=0.4))
        assert isinstance(made.task, Classification) and made.task.labels == ["neg", "other", "pos"]


def test_labels_keep_the_order_of_the_data_set_or_of_the_base(tmp_path: Path, encoder: str) -> None:
    data = labelled(tmp_path / "a.parquet", [0, 1, 2] * 8, ["yes", "maybe", "no"])
    made = prepare(Recipe(model=encoder, data=data))
    assert isinstance(made.task, Classification) and made.task.labels == ["yes", "maybe", "no"]
    config = BertConfig.from_pretrained(encoder, id2label={0: "no", 1: "yes", 2: "maybe"})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    load_tokenizer(encoder).save_pretrained(tmp_path / "classifier")
    made = prepare(Recipe(model=str(tmp_path / "classifier"), data=data))
    assert isinstance(made.task, Classification) and made.task.labels == ["no", "yes", "maybe"]


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"messages": "chat", "text": "text"}, "text"),
        ({"text": "text", "chat": True, "task": "causal-lm"}, "chat"),
        ({"task": "causal-lm", "text": "text", "label": "label"}, "label"),
        ({"task": "classification", "text": "text", "label": "label", "prompt": "chat"}, "prompt"),
    ],
)
def test_what_a_run_does_not_look_at_is_refused(given: Any, unused: str) -> None:
    with pytest.raises(AdapterError, match=f"^{unused} has no use in a"):
        chosen({"text": ["a"], "label": ["b"], "chat": ["c"]}, **given)


def test_lists_of_labels_are_refused(tmp_path: Path, encoder: str) -> None:
    data = jsonl(tmp_path, [{"text": "a", "label": [0, 1]}, {"text": "b", "label": [1]}] * 3)
    with pytest.raises(AdapterError, match="column 'label' holds a list where one label is needed"):
        prepare(Recipe(model=encoder, data=data))


@pytest.mark.parametrize("head", [None, BertForMaskedLM])
def test_an_encoder_is_no_causal_language_model(tmp_path: Path, head: Any) -> None:
    folder = checkpoints.encoder(tmp_path / "encoder")
    if head is not None:
        head(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(AdapterError, match="is no causal language model"):
        prepare(Recipe(model=str(folder), data=jsonl(tmp_path, [{"text": "a good film"}] * 30)))


def test_a_decoder_of_the_same_kind_is_one(tmp_path: Path) -> None:
    folder = checkpoints.encoder(tmp_path / "decoder")
    BertLMHeadModel(BertConfig.from_pretrained(folder, is_decoder=True)).save_pretrained(folder)
    assert load_base(str(folder), "causal-lm").fresh == []


def test_a_chat_is_prepared_through_the_template(tmp_path: Path, causal: str) -> None:
    made = prepare(Recipe(model=causal, data=jsonl(tmp_path, [{"messages": TURNS}] * 30)))
    text = made.base.tokenizer.decode(made.train[0].ids)
    assert text == "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>"
    as_turn = prepare(
        Recipe(model=causal, data=jsonl(tmp_path, answers()), chat=True, system="be short"),
    )
    assert as_turn.base.tokenizer.decode(as_turn.train[0].ids).startswith("<|system|>\nbe short<|end|>\n<|user|>\nwhat")


def test_examples_that_were_cut_are_remarked_on(tmp_path: Path, causal: str) -> None:
    records = [*answers(30), {"prompt": "0 " * 100, "completion": "x"}]
    made = prepare(Recipe(model=causal, data=jsonl(tmp_path, records), max_length=30, eval_share=0))
    assert len(made.train) == 30
    assert any("1 of 31 examples are longer than 30 tokens and were cut" in remark for remark in made.remarks)
    with pytest.raises(AdapterError, match="there is nothing to train on"):
        prepare(Recipe(model=causal, data=jsonl(tmp_path, records[-1:] * 5), max_length=30))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"best": "accuracy"}, "best is 'accuracy'; a causal-lm run has the scores loss, perplexity, token_accuracy"),
        ({"targets": ["q_prj"]}, "q_proj"),
        ({"betas": [0.9]}, "betas"),
    ],
)
def test_what_would_not_work_later_is_said_now(tmp_path: Path, causal: str, given: Any, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        prepare(Recipe(model=causal, data=jsonl(tmp_path, answers()), **given))


def test_smoothing_has_no_meaning_for_a_regression(tmp_path: Path, encoder: str) -> None:
    data = jsonl(tmp_path, [{"text": "a", "label": i / 2} for i in range(10)])
    with pytest.raises(AdapterError, match="label_smoothing has no meaning for a regression"):
        prepare(Recipe(model=encoder, data=data, label_smoothing=0.1))


def test_the_memory_of_a_step_is_counted(tmp_path: Path, causal: str, encoder: str) -> None:
    data = jsonl(tmp_path, answers())
    small, large = (memory_of(prepare(Recipe(model=causal, data=data, batch_size=size))) for size in (1, 16))
    assert not isinstance(small, str) and not isinstance(large, str)
    assert large.activations > small.activations
    of_encoder = memory_of(prepare(Recipe(model=encoder, data=jsonl(tmp_path, reviews(), "reviews.jsonl"))))
    assert not isinstance(of_encoder, str)


def test_the_dtype_follows_the_device() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_device("cpu") == cpu


def test_gradients_pass_when_activations_are_recomputed(tmp_path: Path, causal: str) -> None:
    made = prepare(Recipe(model=causal, data=jsonl(tmp_path, answers()), gradient_checkpointing=True, dropout=0.0))
    made.model.train()
    loss, _ = made.task.loss(made.model, made.task.collate(made.largest_batch()))
    loss.backward()
    trained = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


def test_more_tokens_than_the_model_reads_are_refused(tmp_path: Path, causal: str) -> None:
    data = jsonl(tmp_path, answers())
    with pytest.raises(AdapterError, match="max_length is 257; this model reads at most 256 tokens"):
        prepare(Recipe(model=causal, data=data, max_length=257))
    assert prepare(Recipe(model=causal, data=data, max_length=256)).task.max_length == 256


def test_an_empty_cell_is_no_label(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,pos\nb,neg\nc,\n")
    with pytest.raises(AdapterError, match="the label column 'label' is empty in 1 of 3 records"):
        prepare(Recipe(model=encoder, data=str(tmp_path / "a.csv")))
    (tmp_path / "b.csv").write_text("text,label\na,0.5\nb,1.5\nc,\n")
    with pytest.raises(AdapterError, match="the label '' is no number"):
        prepare(Recipe(model=encoder, data=str(tmp_path / "b.csv"), eval_share=0))


def test_held_out_data_may_have_one_label(tmp_path: Path, encoder: str) -> None:
    held = jsonl(tmp_path, [{"text": "a good film", "label": "pos"}] * 3, "held.jsonl")
    made = prepare(Recipe(model=encoder, data=jsonl(tmp_path, reviews()), eval_data=held))
    assert [example.labels for example in made.held_out] == [1, 1, 1]


def test_messages_go_before_a_label() -> None:
    data = {"messages": [[{"role": "user", "content": "a"}]], "text": ["b"], "label": ["c"]}
    assert chosen(data) == {"task": "causal-lm", "messages": "messages"}


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path, causal: str) -> None:
    with pytest.raises(AdapterError, match="warmup is 1000 steps, and the run has 2"):
        prepare(Recipe(model=causal, data=jsonl(tmp_path, answers()), steps=2, warmup=1000))


def test_a_device_without_values_is_refused() -> None:
    with pytest.raises(AdapterError, match="device 'meta' cannot be used"):
        choose_device("meta")


def test_the_estimate_is_of_the_changed_base(llama: Path, tmp_path: Path) -> None:
    data = cases.completions(tmp_path / "d.jsonl")
    found = []
    for options in ({}, {"num_hidden_layers": 1}):
        wanted = cases.recipe(llama, data, tmp_path / "run", model_options=options)
        memory = memory_of(prepare(wanted))
        assert isinstance(memory, Memory)
        found.append(memory)
    assert found[1].adapter == found[0].adapter / 2 and found[1].base < found[0].base
