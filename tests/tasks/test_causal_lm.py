"""Causal language models: the loss is the model's own, over the trained tokens alone, however they are batched."""

import math
from array import array
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import lorank
from lorank import AdapterError, LoRA, TrainConfig
from lorank.data import IGNORED, Example, rendering_of
from lorank.tasks import CausalLM
from lorank.tasks.base import evaluating
from lorank.tasks.causal_lm import trained_logits

from ..checkpoints import causal_tokenizer

TOKENIZER = causal_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
}
RECORDS = [
    {"q": "what is two and two?", "a": " four"},
    {"q": "the", "a": " quick brown fox jumps over the lazy dog"},
    {"q": "a", "a": ""},
    {"q": "0123456789 0123456789", "a": "!"},
    {"q": "a bad film", "a": " a good film"},
]


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def gpt2() -> GPT2LMHeadModel:
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_positions=64, **config))  # type: ignore[arg-type]


def gemma2() -> Gemma2ForCausalLM:
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05, query_pre_attn_scalar=8)
    return Gemma2ForCausalLM(config)


def granite() -> GraniteForCausalLM:
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.02))


def cohere() -> Cohere2ForCausalLM:
    return Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=20.0))


def task(max_length: int = 100, **options: Any) -> CausalLM:
    rendering = rendering_of({"prompt": "q", "completion": "a"}, TOKENIZER)
    return CausalLM(TOKENIZER, max_length, rendering, **options)


def examples(chosen: CausalLM | None = None) -> list[Example]:
    return (chosen or task()).examples(datasets.Dataset.from_list(RECORDS))


def own_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("make", [llama, gpt2, gemma2, granite, cohere])
def test_the_loss_is_the_models_own(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = task().collate(examples())
    with torch.no_grad():
        own = model(**batch).loss
        summed, count = task().loss(model, batch)
    assert count == int((batch["labels"][:, 1:] != IGNORED).sum())
    torch.testing.assert_close(summed / count, own, rtol=0, atol=1e-5)
    assert abs(float(own) - math.log(len(TOKENIZER))) > 1e-3, "else nothing is told apart from a model without logits"


@pytest.mark.parametrize("make", [llama, gpt2, gemma2, granite, cohere])
def test_the_gradients_are_the_models_own(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = task().collate(examples())
    model(**batch).loss.backward()
    own = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    summed, count = task().loss(model, batch)
    (summed / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_head_sees_the_chosen_positions_alone() -> None:
    model, batch = llama().eval(), task().collate(examples())
    seen: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        logits, labels = trained_logits(model, batch)
        count = len(labels)
        assert logits.shape == (count, len(TOKENIZER))
        assert 0 < count < batch["labels"].numel() / 2
        whole = model(**own_inputs(batch)).logits
    # This hook was there first: it sees the whole, and what the head is then given shows in the second one.
    assert seen[-1] == (*batch["labels"].shape, 16)
    chosen = batch["labels"][:, 1:] != IGNORED
    torch.testing.assert_close(logits, whole[:, :-1][chosen], rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, batch["labels"][:, 1:][chosen])
    assert len(model.lm_head._forward_pre_hooks) == 1, "the hook of the loss is gone"


def test_the_heads_work_is_that_of_the_chosen_positions() -> None:
    model, batch = llama().eval(), task().collate(examples())
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    summed, count = task().loss(model, batch)
    assert shapes == [(count, len(TOKENIZER))]
    summed.backward()


def test_the_hook_is_gone_when_the_model_fails() -> None:
    model, batch = llama(), task().collate(examples())
    batch["input_ids"] = batch["input_ids"] + 10**6
    with pytest.raises(IndexError):
        task().loss(model, batch)
    assert not model.lm_head._forward_pre_hooks


class Odd(nn.Module):
    """A language model whose head is not to be found, or is called in a way of its own."""

    def __init__(self, inner: Any, by_name: bool) -> None:
        super().__init__()
        self.inner, self.by_name = inner, by_name
        if by_name:
            self.get_output_embeddings = inner.get_output_embeddings

    def forward(self, use_cache: bool, **inputs: Tensor) -> Any:
        if not self.by_name:
            return self.inner(**inputs)
        hidden = self.inner.model(**inputs).last_hidden_state
        return type("Output", (), {"logits": self.inner.lm_head(input=hidden)})


@pytest.mark.parametrize("by_name", [False, True])
def test_a_head_that_cannot_be_hooked_gives_the_same_loss(by_name: bool) -> None:
    model, batch = llama().eval(), task().collate(examples())
    with torch.no_grad():
        expected, count = task().loss(model, batch)
        found, again = task().loss(Odd(model, by_name), batch)
    assert count == again
    torch.testing.assert_close(found, expected)


def test_one_wide_batch_of_one_token() -> None:
    model = llama().eval()
    one = Example(array("i", [70, 71]), array("i", [IGNORED, 71]))
    batch = task().collate([one])
    with torch.no_grad():
        summed, count = task().loss(model, batch)
        own = model(**batch).loss
    assert count == 1
    torch.testing.assert_close(summed, own, rtol=0, atol=1e-5)


def test_padding_changes_nothing() -> None:
    model, encoded = llama().eval(), examples()
    with torch.no_grad():
        together = task().loss(model, task().collate(encoded))
        apart = [task().loss(model, task().collate([example])) for example in encoded]
    assert together[1] == sum(count for _, count in apart)
    torch.testing.assert_close(together[0], torch.stack([loss for loss, _ in apart]).sum(), rtol=1e-5, atol=1e-4)


def test_accumulated_unequal_batches_are_one_step_of_all_weighted_by_tokens() -> None:
    encoded = examples()
    counts = [task().loss(llama().eval(), task().collate([example]))[1] for example in encoded]
    assert len(set(counts)) > 2, "batches of equal weight would show nothing"
    results = []
    for parts in ([encoded], [encoded[:1], encoded[1:2], encoded[2:]]):
        torch.manual_seed(0)
        model = llama()
        lorank.adapt(model, LoRA(rank=4), "all-linear")
        batches = [task().collate(part) for part in parts]
        config = TrainConfig(steps=3, learning_rate=1e-3, accumulate=len(parts), clip=1.0)
        parameters = lorank.adapter_parameters(model)
        steps = list(lorank.train(parameters, lambda batch, m=model: task().loss(m, batch), batches, config))
        results.append((steps, {name: parameter.detach() for name, parameter in parameters.items()}))
    (whole, one), (split, many) = results
    for a, b in zip(whole, split, strict=True):
        assert a.weight == b.weight == sum(counts)
        torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-6)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=1e-6)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=0, atol=1e-6)


def test_label_smoothing_is_that_of_the_full_logits() -> None:
    model, batch = gemma2().eval(), task().collate(examples())
    with torch.no_grad():
        summed, count = task(label_smoothing=0.2).loss(model, batch)
        logits = model(**own_inputs(batch)).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.2, ignore_index=IGNORED)
        plain, _ = task().loss(model, batch)
        measured = task(label_smoothing=0.2).measure(model, [batch])
    torch.testing.assert_close(summed / count, expected, rtol=0, atol=1e-5)
    assert abs(summed - plain) > 1e-4
    assert measured["loss"] == pytest.approx(float(plain) / count), "scores are without smoothing"


def test_training_on_all_takes_the_prompt_too() -> None:
    chosen = task(train_on="all")
    encoded = examples(chosen)
    assert [example.ids for example in encoded] == [example.ids for example in examples()]
    assert all(example.labels == example.ids for example in encoded)
    model, batch = llama().eval(), chosen.collate(encoded)
    with torch.no_grad():
        _, count = chosen.loss(model, batch)
    assert count == sum(len(example.ids) - 1 for example in encoded)
    assert chosen.about() == {"task": "causal-lm", "train_on": "all", "prompt": "q", "completion": "a"}


def test_a_batch_is_padded_on_the_right() -> None:
    a = Example(array("i", [70, 71, 72]), array("i", [IGNORED, 71, 72]))
    b = Example(array("i", [80]), array("i", [80]))
    batch = task().collate([a, b])
    pad = TOKENIZER.pad_token_id
    assert batch["input_ids"].tolist() == [[70, 71, 72], [80, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 71, 72], [80, IGNORED, IGNORED]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    bare = causal_tokenizer()
    bare.pad_token = None
    batch = CausalLM(bare, 100, task().rendering).collate([a, b])
    assert batch["input_ids"].tolist()[1] == [80, bare.eos_token_id, bare.eos_token_id]


def example_of(prompt: int, completion: int) -> Example:
    ids = array("i", range(70, 70 + prompt + completion))
    return Example(ids, array("i", [IGNORED] * prompt) + ids[prompt:])


def test_long_examples_are_cut_and_useless_ones_left_out() -> None:
    kept, remarks = task(8).cut([example_of(2, 3), example_of(5, 9), example_of(8, 2), example_of(3, 5)])
    assert [len(example.ids) for example in kept] == [5, 8, 8]
    assert kept[0] == example_of(2, 3)
    assert kept[1] == Example(example_of(5, 9).ids[:8], example_of(5, 9).labels[:8])  # type: ignore[index]
    assert remarks == [
        "2 of 4 examples are longer than 8 tokens and were cut; 1 of them have no trained token left and were left "
        "out (the longest has 14; max_length sets the limit)"
    ]
    kept, remarks = task(8).cut([example_of(2, 3), example_of(4, 6)])
    assert len(kept) == 2 and remarks == [
        "1 of 2 examples are longer than 8 tokens and were cut (the longest has 10; max_length sets the limit)"
    ]
    assert task(14).cut([example_of(5, 9)]) == ([example_of(5, 9)], [])


def test_examples_without_a_trained_token_are_left_out_whatever_their_length() -> None:
    one = Example(array("i", [1]), array("i", [1]))  # an empty text and its end: nothing comes before it
    none = Example(array("i", []), array("i", []))
    kept, remarks = task().cut([one, example_of(2, 3), none, example_of(3, 0)])
    assert kept == [example_of(2, 3)]
    assert remarks == ["3 of 4 examples have no token to train on and were left out"]
    kept, remarks = task(4).cut([one, example_of(2, 3), example_of(4, 3)])
    assert len(kept) == 1 and len(remarks) == 2
    assert remarks[1].startswith("2 of 3 examples are longer than 4 tokens and were cut; 1 of them")


def test_empty_lines_of_a_text_do_not_reach_a_batch() -> None:
    chosen = CausalLM(TOKENIZER, 100, rendering_of({"text": "text"}, TOKENIZER))
    kept, _ = chosen.cut(chosen.examples(datasets.Dataset.from_dict({"text": ["", "a good film", ""]})))
    assert len(kept) == 1
    model = llama()
    with evaluating(model):
        assert math.isfinite(chosen.measure(model, [chosen.collate(kept)])["loss"])


class Fixed(nn.Module):
    """A model that gives these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Any:
        return type("Output", (), {"logits": self.logits[: len(inputs["input_ids"])]})


def test_scores_of_a_case_by_hand() -> None:
    # Three words; the second and the third token are trained on, and the fourth in the first row.
    ids = torch.tensor([[0, 1, 2, 1], [0, 2, 0, 0]])
    labels = torch.tensor([[IGNORED, 1, 2, 1], [IGNORED, 2, IGNORED, IGNORED]])
    shares = torch.tensor(
        [
            [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.9, 0.05, 0.05]],
            [[0.25, 0.25, 0.5], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05]],
        ]
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    scores = task().measure(Fixed(shares.log()), [batch])
    loss = -(math.log(0.5) + math.log(0.25) + math.log(0.75) + math.log(0.5)) / 4
    assert scores == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 3 / 4})
    first = {name: tensor[:1] for name, tensor in batch.items()}
    second = {name: tensor[1:] for name, tensor in batch.items()}
    turned = Fixed(shares.log())
    apart = [task().measure(turned, [first]), task().measure(Fixed(shares.log()[1:]), [second])]
    assert scores["loss"] == pytest.approx((3 * apart[0]["loss"] + apart[1]["loss"]) / 4)


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity() -> None:
    batch = task().collate([Example(array("i", [0, 1]), array("i", [0, 1]))])
    logits = torch.zeros(1, 2, len(TOKENIZER))
    logits[..., 1] = -1e4
    scores = task().measure(Fixed(logits), [batch])
    assert scores["loss"] > 9e3 and scores["perplexity"] == math.inf


def test_measuring_batches_is_measuring_the_whole() -> None:
    model, encoded = llama(), examples()
    with evaluating(model):
        whole = task().measure(model, [task().collate(encoded)])
        parts = task().measure(model, [task().collate(encoded[:2]), task().collate(encoded[2:])])
    assert whole == pytest.approx(parts, rel=1e-5)
    assert set(whole) == set(CausalLM.scores) and CausalLM.best in whole


def test_evaluating_leaves_every_mode_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not torch.is_grad_enabled() and not any(module.training for module in model.modules())
        raise RuntimeError
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False, False]


def test_a_prompt_and_a_completion_that_run_together_are_remarked_on() -> None:
    def remarks(prompt: str, completion: str, prompt_form: str = "q") -> list[str]:
        rendering = rendering_of({"prompt": prompt_form, "completion": "a"}, TOKENIZER)
        chosen = CausalLM(TOKENIZER, 100, rendering)
        return chosen.remarks(chosen.encode([{"q": prompt, "a": completion}]))

    assert remarks("what?", "four") == [
        "prompt and completion meet without a space or a line break; the template prompt='{q}\\n' would part them"
    ]
    assert "prompt='Q: {q}\\n'" in remarks("what?", "four", "Q: {q}")[0]
    assert remarks("what?", " four") == remarks("what?\n", "four") == remarks("what", "four", "{q}\nA: ") == []
    text = CausalLM(TOKENIZER, 100, rendering_of({"text": "q"}, TOKENIZER))
    assert text.remarks(text.encode([{"q": "what?"}])) == []


def test_a_record_that_cannot_be_used_is_numbered() -> None:
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 1001
    data = datasets.Dataset.from_dict({"messages": [*messages, [{"role": "user", "content": "a"}]]})
    chosen = CausalLM(TOKENIZER, 100, rendering_of({"messages": "messages"}, TOKENIZER))
    with pytest.raises(AdapterError, match="cannot use record 1,002: a conversation without a turn of the assistant"):
        chosen.examples(data)


def test_columns_that_are_missing_are_said_before_anything_is_encoded() -> None:
    with pytest.raises(AdapterError, match="the completion column 'a' is not in the data; the columns are b, q"):
        task().examples(datasets.Dataset.from_dict({"q": ["x"], "b": ["y"]}))
