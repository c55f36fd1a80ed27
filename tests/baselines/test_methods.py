"""What every baseline promises, on every architecture: a model that stays itself, trains, saves and loads."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lorank
from lorank import AdapterError, AdapterWarning, LoRA
from lorank.baselines import BASELINES, AdapterD, AdapterH, AdapterP, BitFit, Full, PrefixEmbedding, PrefixLayer, TopK
from lorank.formats import detect, read
from lorank.models import recompute_activations

from .. import models
from .cases import ARCHITECTURES, FROM_THE_BASE, METHODS, PAIRS, adapted, logits, loss, surrounded


@pytest.mark.parametrize("architecture, method", PAIRS)
def test_it_trains_saves_loads_and_goes(architecture: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, ids = ARCHITECTURES[architecture](), models.ids()
    keys, classes = list(model.state_dict()), {name: type(module) for name, module in model.named_modules()}
    before = logits(model, ids)
    made = adapted(model, method)
    assert list(model.state_dict())[: len(keys)] == keys or set(keys) < set(model.state_dict())
    trained = lorank.adapter_parameters(model)
    assert made.trainable_parameters == sum(parameter.numel() for parameter in trained.values())
    if method in FROM_THE_BASE:
        torch.testing.assert_close(logits(model, ids), before)
    ids = surrounded(model, ids)

    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(3):
        optimiser.zero_grad()
        value = loss(model, ids)
        value.backward()
        assert lorank.check(model, moved=step > 1) == []
        losses.append(float(value.detach()))
        optimiser.step()
    assert losses[2] < losses[0]
    assert not [name for name, parameter in trained.items() if torch.equal(parameter, start[name])]

    expected = logits(model, ids)
    lorank.save(model, tmp_path)
    assert detect(tmp_path) == "lorank" and read(tmp_path).problems == []
    again = lorank.load(model, tmp_path, "again")
    assert again.trainable_parameters == made.trainable_parameters
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)

    merges = all(getattr(one, "merges", True) for one in [METHODS[method]] if not isinstance(one, list))
    if merges and not isinstance(METHODS[method], list):
        with lorank.merged(model, "again"):
            torch.testing.assert_close(logits(model, ids), expected)
    else:
        with pytest.raises(AdapterError, match="runs beside the base's layers and changes none of their weights"):
            lorank.merge(model, "again")
    lorank.remove(model, "again")
    lorank.remove(model, "default")
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("method", ["adapter-h", "bitfit", "prefix-layer"])
def test_another_base_is_noticed(method: str, tmp_path: Path) -> None:
    model = models.gpt2()
    adapted(model, method)
    models.disturb(model)
    lorank.save(model, tmp_path)
    with pytest.raises(AdapterError, match="the base differs from the one this adapter was saved on"):
        lorank.load(models.gpt2(), tmp_path)
    with pytest.warns(AdapterWarning, match="the base differs"):
        lorank.load(models.gpt2(), tmp_path, allow_other_base=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_the_meta_device_is_counted(method: str) -> None:
    with torch.device("meta"):
        empty = models.gpt2()
    targets = "attention" if isinstance(METHODS[method], list) else None
    planned = lorank.plan(empty, METHODS[method], targets)
    assert planned.trainable_parameters == lorank.plan(models.gpt2(), METHODS[method], targets).trainable_parameters
    assert f"{planned.trainable_parameters:,} parameters to train" in str(planned)
    assert "at inference, " in str(planned)


@pytest.mark.parametrize("method", ["adapter-l", "prefix-embedding", "prefix-layer"])
def test_reset_fills_what_was_made_on_the_meta_device(method: str) -> None:
    whole = models.gpt2()
    with torch.device("meta"):
        model = models.gpt2()
    adapted(model, method)
    with pytest.raises(AdapterError, match="still on the meta device"):
        model.load_state_dict(whole.state_dict(), assign=True, strict=False)
        model.tie_weights()
        logits(model, surrounded(model, models.ids()))
    lorank.reset(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.isfinite(logits(model, surrounded(model, models.ids()))).all()


def test_two_tasks_switch_on_one_base() -> None:
    model, ids = models.llama(), models.ids()
    before = logits(model, ids)
    lorank.adapt(model, AdapterH(size=4), name="a")
    lorank.adapt(model, LoRA(rank=2), "attention", name="b")
    models.disturb(model, "a")
    models.disturb(model, "b")
    lorank.activate(model, "a")
    alone = logits(model, ids)
    lorank.activate(model, "b", "a")
    both = logits(model, ids)
    lorank.activate(model, "a", "b")
    torch.testing.assert_close(logits(model, ids), both)  # what runs behind a layer runs behind all its updates
    assert not torch.allclose(both, alone)
    lorank.merge(model, "b")
    lorank.activate(model, "a")
    torch.testing.assert_close(logits(model, ids), both)
    with lorank.disabled(model):
        assert not torch.allclose(logits(model, ids), before)  # b is in the base now


def test_baselines_are_known_by_their_names() -> None:
    for name, method in BASELINES.items():
        spec = method()
        assert spec.variant == name and method.from_json(spec.to_json()) == spec
        assert len(spec.inference()) > 5


@pytest.mark.parametrize(
    "spec, targets, reason",
    [
        (Full(), None, "full fine-tuning is no adapter"),
        (BitFit(), "c_attn", "bitfit has its own places; targets say nothing to it, and can only exclude biases"),
        (AdapterH(), "!h.0", "adapter-h has its own places; targets say nothing to it"),
        (TopK(3), None, "top-k is to train 3 blocks, and the model has 2"),
        (AdapterD(drop=2), None, "drops those of the first 2 blocks, and there are 2"),
        (AdapterH(places=("nothing",)), None, "places: 'nothing' names no module"),
        (TopK(1, stack="h"), None, "there is no list of blocks 'h'; known are transformer.h"),
        (AdapterH(places=("wte",)), None, "wte: nothing can be put behind it"),
        ([AdapterH(), AdapterH(size=2)], None, "adapter-h, adapter-h in one adapter"),
        ([LoRA(), lorank.DoRA()], "c_attn", "it can have one method of updates"),
        ([PrefixEmbedding(), PrefixLayer()], None, "two baselines would run with transformer.wte"),
        ([], None, "the spec is 'an empty list'"),
        (["lora"], "c_attn", "the spec is 'lora'"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: object, targets: str | None, reason: str) -> None:
    model = models.gpt2()
    with pytest.raises(AdapterError, match=reason):
        lorank.adapt(model, spec, targets)  # type: ignore[arg-type]
    assert lorank.adapter_names(model) == [] and all(p.requires_grad for p in model.parameters())


def test_a_model_without_biases_has_no_bitfit() -> None:
    with pytest.raises(AdapterError, match="this model has none"):
        lorank.adapt(models.llama(), BitFit())


def test_dora_has_nothing_behind_it() -> None:
    with pytest.raises(AdapterError, match="dora is no sum with the layer's output"):
        lorank.adapt(models.llama(), [lorank.DoRA(rank=2), AdapterH(size=2)], "o_proj")


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: AdapterH(size=0), "size is 0; it must be a whole number of at least 1"),
        (lambda: AdapterH(places=[""]), "must be names of modules"),  # type: ignore[arg-type]
        (lambda: AdapterH(places=3), "must be names of modules"),  # type: ignore[arg-type]
        (lambda: AdapterD(drop=-1), "drop is -1"),
        (lambda: TopK(True), "blocks is True"),
        (lambda: PrefixLayer(0, 0), "there would be nothing to train"),
        (lambda: PrefixEmbedding(1.5), "prefix is 1.5"),  # type: ignore[arg-type]
    ],
)
def test_values_are_checked(make: object, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
def test_a_copied_block_is_one_block_to_the_model(make: Any) -> None:
    """Its outputs are noted once, and how attention is computed can be changed later."""
    model, ids = make(attn_implementation="eager"), models.ids()
    lorank.adapt(model, TopK(1))
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        assert len(found.hidden_states) == 3
        model.set_attn_implementation("sdpa")
        again = model(ids).logits
        torch.testing.assert_close(again, found.logits)
        if make is not models.bert:  # later tokens change nothing before them
            other = ids.clone()
            other[:, 2:] = 7
            torch.testing.assert_close(model(other).logits[:, :2], again[:, :2])


def test_a_copied_block_of_a_half_precision_base_is_checkpointed() -> None:
    model, ids = models.llama().bfloat16(), models.ids()
    lorank.adapt(model, TopK(1))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            recompute_activations(model)
        model.train().zero_grad()
        model(ids).logits.float().square().mean().backward()
        found.append([parameter.grad.clone() for parameter in lorank.adapter_parameters(model).values()])  # type: ignore
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_norm_that_is_read_without_being_called_takes_nothing_behind_it() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(AdapterError, match="its weights are read without it being called"):
        lorank.adapt(model, AdapterP(4, places=("norm2",)))


@pytest.mark.parametrize("spec", [PrefixEmbedding(2, 1), PrefixLayer(2, 1)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_embeddings_in_the_place_of_ids_have_no_special_tokens(spec: Any, checkpointed: bool) -> None:
    model, ids = models.llama(), models.ids()
    lorank.adapt(model, spec)
    logits(model, surrounded(model, ids))
    if checkpointed:
        recompute_activations(model)
    model.train()(surrounded(model, ids)).logits.sum().backward()
    with pytest.raises(AdapterError, match="give input_ids"), torch.no_grad():
        model(inputs_embeds=torch.randn(3, 10, 32))
    with pytest.raises(AdapterError, match="there is no token 100"):
        logits(model, torch.tensor([[97, 98, 5, 100]]))


def test_threads_have_batches_of_their_own() -> None:
    model = models.llama()
    lorank.adapt(model, PrefixLayer(3, 2))
    batches = [surrounded(model, models.ids(2, 9)), surrounded(model, models.ids(2, 14))[:, :14]]
    expected = [logits(model, batch) for batch in batches]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            if not torch.allclose(logits(model, batches[number]), expected[number], atol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("spec", [PrefixEmbedding(2, 1), PrefixLayer(2, 1)])
def test_models_of_two_stacks_are_refused(spec: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    with pytest.raises(AdapterError, match="this one has an encoder and a decoder"):
        lorank.adapt(T5ForConditionalGeneration(T5Config(**sizes)), spec)


def test_rows_have_the_width_of_the_blocks() -> None:
    from transformers import ElectraConfig, ElectraModel

    sizes: dict[str, Any] = {"vocab_size": 60, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 40}
    model = ElectraModel(ElectraConfig(**sizes)).eval()
    lorank.adapt(model, PrefixLayer(2, 1))
    ids = surrounded(model, torch.randint(5, 60, (2, 6)))
    model(ids).last_hidden_state.sum().backward()
    assert {tuple(p.shape) for p in lorank.adapter_parameters(model).values()} == {(3, 16)}
