"""Classification and regression: one output for one or two texts, whatever else is in the batch."""

import copy
import math
from array import array
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import lorank
from lorank import AdapterError, LoRA, TrainConfig
from lorank.data import Example, Text
from lorank.evaluation import classification_scores, regression_scores
from lorank.models import load_base, load_tokenizer
from lorank.tasks import Classification, Regression
from lorank.tasks.base import evaluating
from lorank.tasks.sequence import label_names

from .. import checkpoints

TEXTS = ["a good film", "a bad film", "the quick brown fox jumps over the lazy dog", "a", "what is two"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a tokenizer that puts [CLS] and [SEP] around texts."""
    return load_tokenizer(str(checkpoints.encoder(tmp_path_factory.mktemp("encoder"))))


def classifier(tokenizer: Any, max_length: int = 64, pair: bool = False, **options: Any) -> Classification:
    options = {"labels": ["bad", "good", "neither"]} | options
    return Classification(tokenizer, max_length, Text("a"), Text("b") if pair else None, "label", **options)


def bert(tokenizer: Any, labels: int) -> Any:
    sizes: dict[str, Any] = {"num_labels": labels}
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        **sizes,
    )
    return BertForSequenceClassification(config).eval()


def tokens(tokenizer: Any, example: Example) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(example.ids))


def test_a_text_is_encoded_with_its_signs_and_label(encoder: Any) -> None:
    (example,) = classifier(encoder).encode([{"a": "a good film", "label": "good"}])
    assert tokens(encoder, example) == ["[CLS]", "a", "good", "film", "[SEP]"]
    assert example.labels == 1
    assert list(example.types or []) == [0] * 5


def test_a_pair_has_token_types(encoder: Any) -> None:
    task = classifier(encoder, pair=True)
    assert task.columns() == {"a": "text", "b": "text_pair", "label": "label"}
    encoded = task.encode([{"a": "a good film", "b": "a dog", "label": "bad"}, {"a": "a", "b": "fox", "label": "good"}])
    assert tokens(encoder, encoded[0]) == ["[CLS]", "a", "good", "film", "[SEP]", "a", "dog", "[SEP]"]
    assert list(encoded[0].types or []) == [0, 0, 0, 0, 0, 1, 1, 1]
    batch = task.collate(encoded)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["input_ids"][1, 5:].tolist() == [encoder.pad_token_id] * 3
    assert batch["labels"].tolist() == [0, 1]


def test_the_types_of_a_pair_reach_the_model(encoder: Any) -> None:
    task, model = classifier(encoder, pair=True), bert(encoder, 3)
    batch = task.collate(task.encode([{"a": "a good film", "b": "a dog", "label": "bad"}]))
    with torch.no_grad():
        right = task.outputs(model, batch)
        without = task.outputs(model, batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])})
    assert not torch.allclose(right, without)


def test_a_tokenizer_without_types_gives_none() -> None:
    task = classifier(checkpoints.causal_tokenizer())
    (example,) = task.encode([{"a": "a good film", "label": "good"}])
    assert example.types is None
    assert set(task.collate([example])) == {"input_ids", "attention_mask", "labels"}


def test_labels_are_found_by_their_text(encoder: Any) -> None:
    task = classifier(encoder, labels=["0", "1", "True"])
    assert [task.target(value) for value in (0, "0", 1, "1", True)] == [0, 0, 1, 1, 2]
    with pytest.raises(AdapterError, match="the label 'goood' is not one of the 3 known; nearest: good"):
        classifier(encoder).target("goood")
    with pytest.raises(AdapterError, match="the label 7 is not one of the 3 known; the labels are bad, good, neither"):
        classifier(encoder).target(7)


def test_a_record_with_an_unknown_label_is_numbered(encoder: Any) -> None:
    data = datasets.Dataset.from_dict({"a": ["a", "good", "film"], "label": ["bad", "good", "god"]})
    with pytest.raises(AdapterError, match=r"cannot use record 3: the label 'god' is not one .* nearest: good"):
        classifier(encoder).examples(data)


def test_cutting_keeps_the_closing_sign(encoder: Any) -> None:
    task = classifier(encoder, max_length=5)
    encoded = task.encode([{"a": text, "label": "bad"} for text in TEXTS])
    kept, remarks = task.cut(encoded)
    assert [tokens(encoder, example) for example in kept] == [
        ["[CLS]", "a", "good", "film", "[SEP]"],
        ["[CLS]", "a", "bad", "film", "[SEP]"],
        ["[CLS]", "the", "quick", "brown", "[SEP]"],
        ["[CLS]", "a", "[SEP]"],
        ["[CLS]", "what", "is", "two", "[SEP]"],
    ]
    assert [len(example.types or []) for example in kept] == [5, 5, 5, 3, 5]
    (remark,) = remarks
    assert remark.startswith("1 of 5 examples are longer than 5 tokens and were cut (the longest has 11")


def test_cutting_a_pair_keeps_the_closing_sign_and_its_type(encoder: Any) -> None:
    task = classifier(encoder, max_length=6, pair=True)
    ((kept,), _) = task.cut(task.encode([{"a": "a good film", "b": "the lazy dog", "label": "bad"}]))
    assert tokens(encoder, kept) == ["[CLS]", "a", "[SEP]", "the", "lazy", "[SEP]"]
    assert list(kept.types or []) == [0, 0, 0, 1, 1, 1]


def test_of_a_pair_the_longer_text_is_cut_first(encoder: Any) -> None:
    task = classifier(encoder, max_length=8, pair=True)
    long, short = "the quick brown fox jumps over the lazy dog", "a film"
    for a, b, expected in (
        (long, short, "[CLS] the quick brown [SEP] a film [SEP]"),
        (short, long, "[CLS] a film [SEP] the quick brown [SEP]"),
        (long, long, "[CLS] the quick [SEP] the quick brown [SEP]"),
    ):
        ((kept,), _) = task.cut(task.encode([{"a": a, "b": b, "label": "bad"}]))
        assert tokens(encoder, kept) == expected.split()


def test_a_pair_with_two_signs_in_the_middle_keeps_both(encoder: Any) -> None:
    tokenizer = copy.deepcopy(encoder)
    form = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer._tokenizer.post_processor = form
    task = classifier(tokenizer, max_length=8, pair=True)
    ((kept,), _) = task.cut(task.encode([{"a": "the quick brown fox", "b": "a good film", "label": "bad"}]))
    assert tokens(encoder, kept) == ["[CLS]", "the", "quick", "[SEP]", "[SEP]", "a", "good", "[SEP]"]


def llama(pad_token_id: int | None) -> Any:
    changes: dict[str, Any] = {"num_labels": 3}
    config = LlamaConfig(
        vocab_size=len(checkpoints.causal_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=pad_token_id,
        **changes,
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("padding", ["<|pad|>", None])
@pytest.mark.parametrize("in_config", [None, 0, 1, 300])
def test_a_decoder_gives_the_same_outputs_in_a_batch_as_alone(
    tmp_path: Path, padding: str | None, in_config: int | None
) -> None:
    tokenizer = checkpoints.causal_tokenizer()
    tokenizer.pad_token = padding
    torch.manual_seed(0)
    llama(in_config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), "classification", labels=["bad", "good", "neither"])
    assert base.fresh == []
    task = classifier(base.tokenizer)
    encoded = task.encode([{"a": text, "label": "bad"} for text in TEXTS])
    with torch.no_grad():
        together = task.outputs(base.model, task.collate(encoded))
        alone = torch.cat([task.outputs(base.model, task.collate([example])) for example in encoded])
        last = [base.model.model(torch.tensor([list(e.ids)])).last_hidden_state[0, -1] for e in encoded]
        expected = base.model.score(torch.stack(last))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-5)


def test_an_encoder_gives_the_same_outputs_in_a_batch_as_alone(encoder: Any) -> None:
    task, model = classifier(encoder), bert(encoder, 3)
    encoded = task.encode([{"a": text, "label": "bad"} for text in TEXTS])
    with torch.no_grad():
        together = task.outputs(model, task.collate(encoded))
        alone = torch.cat([task.outputs(model, task.collate([example])) for example in encoded])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_sum_over_the_records(encoder: Any, smoothing: float) -> None:
    task, model = classifier(encoder, label_smoothing=smoothing), bert(encoder, 3)
    batch = task.collate(task.encode([{"a": t, "label": n} for t, n in zip(TEXTS, task.labels, strict=False)]))
    with torch.no_grad():
        summed, count = task.loss(model, batch)
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        expected = F.cross_entropy(logits, torch.tensor([0, 1, 2]), label_smoothing=smoothing)
        own = model(**batch).loss
    assert count == 3
    torch.testing.assert_close(summed / count, expected)
    if not smoothing:
        torch.testing.assert_close(summed / count, own)


def test_accumulated_unequal_batches_are_one_step_of_all(encoder: Any) -> None:
    task = classifier(encoder)
    encoded = task.encode([{"a": t, "label": n} for t, n in zip(TEXTS, [*task.labels] * 2, strict=False)])
    results = []
    for parts in ([encoded], [encoded[:1], encoded[1:]]):
        torch.manual_seed(0)
        model = bert(encoder, 3)
        lorank.adapt(model, LoRA(rank=2), "all-linear", train_also="classifier")
        batches = [task.collate(part) for part in parts]
        config = TrainConfig(steps=3, learning_rate=1e-3, accumulate=len(parts))
        parameters = lorank.adapter_parameters(model)
        steps = list(lorank.train(parameters, lambda batch, m=model: task.loss(m, batch), batches, config))
        results.append((steps, parameters))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert a.weight == b.weight == 5
        torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-6)
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(parameter, results[1][1][name], rtol=0, atol=2e-6)


class Fixed(nn.Module):
    """A model that gives the numbers in `input_ids` as its outputs."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        return type("Output", (), {"logits": input_ids})


def test_scores_of_a_classifier_by_hand(encoder: Any) -> None:
    task = classifier(encoder, labels=["no", "yes"])
    # Right are the first, second and fourth of five; "yes" is right twice, wrong once, and missed once.
    outputs = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 1, 1])
    batches = [{"input_ids": outputs[:2], "labels": labels[:2]}, {"input_ids": outputs[2:], "labels": labels[2:]}]
    scores = task.measure(Fixed(), batches)
    assert scores.pop("loss") == pytest.approx(float(F.cross_entropy(outputs, labels)))
    matthews = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3, "matthews": matthews})
    assert {"loss", *scores} == set(Classification.scores) and Classification.best in scores


def test_of_several_classes_f1_is_the_mean() -> None:
    scores = classification_scores([0, 0, 1, 2], [0, 1, 1, 1], 3)
    f1 = [2 * 1 / (2 * 1 + 0 + 1), 2 * 1 / (2 * 1 + 2 + 0), 0.0]
    assert scores["accuracy"] == 0.5 and scores["f1"] == pytest.approx(sum(f1) / 3)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([1, 1], [1, 1]), ([0, 0], [0, 0]), ([0, 1], [0, 0]), ([1], [0]), ([0, 0], [0, 1])],
)
def test_scores_without_a_correlation_are_zero_and_warn_of_nothing(
    labels: list[int], predictions: list[int], classes: int
) -> None:
    scores = classification_scores(labels, predictions, classes)
    assert scores["matthews"] == 0
    assert scores["accuracy"] == sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels)


def test_scores_of_a_regression_by_hand(encoder: Any) -> None:
    task = Regression(encoder, 64, Text("a"), None, "label")
    outputs, labels = torch.tensor([[1.0], [2.0], [4.0], [3.0]]), torch.tensor([1.0, 3.0, 4.0, 2.0])
    batches = [{"input_ids": outputs[:3], "labels": labels[:3]}, {"input_ids": outputs[3:], "labels": labels[3:]}]
    # The same numbers on both sides, of which two changed places: 1 - 6 * (1 + 1) / (4 * 15).
    expected = {"loss": 2 / 4, "pearson": 0.8, "spearman": 0.8}
    assert task.measure(Fixed(), batches) == pytest.approx(expected)
    summed, count = task.loss(Fixed(), {"input_ids": outputs, "labels": labels})
    assert (float(summed), count) == (2.0, 4)
    assert set(expected) == set(Regression.scores)


def test_correlations_are_of_values_and_of_ranks() -> None:
    scores = regression_scores([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1000.0])
    assert scores["spearman"] == pytest.approx(1)
    deviations = [-1.5, -0.5, 0.5, 1.5], [1 - 277.75, 10 - 277.75, 100 - 277.75, 1000 - 277.75]
    covariance = sum(a * b for a, b in zip(*deviations, strict=True))
    assert scores["pearson"] == pytest.approx(covariance / math.hypot(*deviations[0]) / math.hypot(*deviations[1]))
    for values, predicted in (([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0], [1.0])):
        assert all(math.isnan(value) for value in regression_scores(values, predicted).values())


def test_a_regression_takes_numbers_alone(encoder: Any) -> None:
    task = Regression(encoder, 64, Text("a"), None, "label")
    assert [task.target(value) for value in ("3.5", 2, -1.25, "1e-3")] == [3.5, 2, -1.25, 0.001]
    with pytest.raises(AdapterError, match="the label 'good' is no number"):
        task.target("good")
    for value in ("nan", "inf", float("-inf")):
        with pytest.raises(AdapterError, match="is not finite"):
            task.target(value)
    batch = task.collate(task.encode([{"a": "a good film", "label": "0.5"}]))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.5]


def test_a_regression_is_the_models_own(encoder: Any) -> None:
    task, model = Regression(encoder, 64, Text("a"), None, "label"), bert(encoder, 1)
    batch = task.collate(task.encode([{"a": text, "label": i / 2} for i, text in enumerate(TEXTS)]))
    with evaluating(model):
        summed, count = task.loss(model, batch)
        own = model(**batch).loss
        measured = task.measure(model, [batch])
    torch.testing.assert_close(summed / count, own)
    assert measured["loss"] == pytest.approx(float(own))


def test_a_task_says_how_to_make_it_again(encoder: Any) -> None:
    about = classifier(encoder, pair=True).about()
    assert about == {
        "task": "classification",
        "text": "a",
        "text_pair": "b",
        "label": "label",
        "labels": ["bad", "good", "neither"],
    }
    regression = Regression(encoder, 64, Text("{a} {c}"), None, "score")
    assert regression.about() == {"task": "regression", "text": "{a} {c}", "label": "score"}
    assert regression.columns() == {"a": "text", "c": "text", "score": "label"}


def test_names_of_labels_are_in_a_fixed_order() -> None:
    assert label_names(["b", "a", "b", "c"], "x") == ["a", "b", "c"]
    assert label_names(["10", "9", "-1"], "x") == label_names([9, 10, -1, 9], "x") == ["-1", "9", "10"]
    assert label_names([True, False], "x") == ["False", "True"]
    assert label_names(["a", None, "b"], "x") == ["a", "b"]


def test_a_column_that_holds_no_labels_is_refused() -> None:
    with pytest.raises(AdapterError, match="column 'x' has one label, a: there is nothing to tell apart"):
        label_names(["a", "a"], "x")
    with pytest.raises(AdapterError, match=r"column 'x' has 201 different labels .* task=regression"):
        label_names(range(201), "x")
    with pytest.raises(AdapterError, match=r"column 'x' holds a list where one label is needed: \[0, 1\]"):
        label_names([[0, 1], [1]], "x")


def test_cutting_leaves_every_classified_record_in(encoder: Any) -> None:
    task = classifier(encoder, max_length=2)
    kept, _ = task.cut([Example(array("i", [2, 5, 3]), 0), Example(array("i", []), 1)])
    assert [(list(example.ids), example.labels) for example in kept] == [([2, 3], 0), ([], 1)]


def test_labels_that_only_look_like_numbers_are_texts() -> None:
    assert label_names(["²", "1"], "label") == ["1", "²"]
    assert label_names(["--5", "3"], "label") == ["--5", "3"]
    assert label_names(["10", "-2", "3"], "label") == ["-2", "3", "10"]
