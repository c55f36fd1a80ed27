"""Cases that went wrong once: each test is named after what a user would have seen."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import AdapterError, LoRA, surgery
from lorank.hosts import host_of
from lorank.tree import adapted_layers
from lorank.variants import LoRAAdapter

from .. import models


class Small(nn.Module):
    """Two linear layers and a head that is a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6)


# ---- the meta device, and weights that are elsewhere


def test_an_adapter_left_on_the_meta_device_does_not_compute_garbage(x: Tensor) -> None:
    base = Small()
    with torch.device("meta"):
        model: Any = Small()
    lorank.adapt(model, LoRA(rank=2), ["a", "b"], bias="adapted", train_also=["head"])
    with pytest.warns(lorank.AdapterWarning, match="train_also"):
        model.load_state_dict(base.state_dict(), assign=True)
    with pytest.raises(AdapterError, match=r"still on the meta device: load it, or call lorank\.reset"):
        model(x)
    lorank.reset(model)
    assert torch.equal(model(x), base(x))
    models.disturb(model)
    y = model(x)
    assert not torch.equal(y, base(x))
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_buffers_that_no_checkpoint_holds_are_reset_with_a_copy(x: Tensor) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.register_buffer("shift", torch.full((6,), 7.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    base = models.sequential(nn.Linear(6, 6), Shifted())
    model = copy.deepcopy(base)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    model[1].adapters["default"].to_empty(device="cpu")
    lorank.reset(model)
    assert torch.equal(model(x), base(x))


def test_weights_that_accelerate_has_offloaded_are_refused() -> None:
    model = Small()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(AdapterError, match="accelerate has offloaded its weights; adapt the model before"):
        lorank.adapt(model, LoRA(rank=2), ["a"])


def test_inference_mode_makes_nothing_trainable() -> None:
    with torch.inference_mode(), pytest.raises(AdapterError, match=r"not under torch\.inference_mode"):
        lorank.adapt(Small(), LoRA(rank=2), ["a"])


# ---- modules that run what lies in them


def test_a_head_that_is_a_sequence_is_trained_member_by_member(x: Tensor) -> None:
    model = Small()
    base = model(x)
    plan = lorank.adapt(model, LoRA(rank=2), ["a"], train_also=["head"])
    assert list(plan.copies) == ["head.0", "head.2"]
    assert len(model.head) == 3
    models.disturb(model)
    y = model(x)
    with lorank.disabled(model):
        assert torch.equal(model(x), base)
    with lorank.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_containers_that_run_their_members_themselves_are_refused() -> None:
    class Custom(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return sum((module(x) for module in self), torch.zeros(()))

    for container in (nn.ModuleList([nn.Linear(6, 6)]), Custom(nn.Linear(6, 6))):
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "heads": container})
        with pytest.raises(AdapterError, match="runs whatever lies in it; name the modules in it"):
            lorank.adapt(model, LoRA(rank=2), ["a"], train_also=["heads"])


def test_copies_of_what_an_encoder_layer_reads_are_refused() -> None:
    model = models.sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    for part in ("norm1", "self_attn", "linear1", "self_attn.out_proj"):
        with pytest.raises(AdapterError, match="without being called, so that a copy of it would have no effect"):
            lorank.adapt(model, LoRA(rank=2), ["0"], train_also=[part])


def test_biases_in_an_encoder_layer_train_and_are_read_by_its_kernel() -> None:
    model = models.sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    with pytest.raises(AdapterError, match=r"cannot train 1\.self_attn\.in_proj_bias"):
        lorank.adapt(model, LoRA(rank=2), ["0"], bias="all")
    plan = lorank.adapt(model, LoRA(rank=2), ["0", "!self_attn"], bias="all")
    assert set(plan.biases) == {"0", "1.linear1", "1.linear2", "1.norm1", "1.norm2"}
    models.disturb(model)
    x = torch.randn(2, 3, 16)
    y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y)


def test_biases_of_an_lstm_are_not_left_out_silently() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "lstm": nn.LSTM(6, 6)})
    with pytest.raises(AdapterError, match=r"cannot train lstm\.bias_ih_l0; exclude it with '!lstm'"):
        lorank.adapt(model, LoRA(rank=2), ["a"], bias="all")


# ---- hooks and arguments


def test_hooks_of_a_copied_module_run_once(x: Tensor) -> None:
    model = models.sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    calls: list[str] = []
    model[1].register_forward_pre_hook(lambda module, args: calls.append("before"))
    model[1].register_forward_hook(lambda module, args, y: 2 * y)
    base = model(x)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    calls.clear()
    assert torch.equal(model(x), base)
    assert calls == ["before"]


def test_the_input_is_found_by_its_name(x: Tensor) -> None:
    class Masked(nn.Linear):
        def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
            y = super().forward(input)
            return y if mask is None else y * mask

    layer: Any = Masked(6, 6)
    model = models.sequential(layer)
    lorank.adapt(model, LoRA(rank=2), "0")
    models.disturb(model)
    assert torch.equal(layer(mask=torch.ones(6), input=x), layer(x))
    assert torch.equal(layer(input=x), layer(x))


# ---- several adapters on one layer


def test_a_copy_and_anothers_bias_on_one_layer_merge_as_they_run(x: Tensor) -> None:
    model = models.sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"], name="copy")
    models.disturb(model)
    lorank.adapt(model, LoRA(rank=2), "0", bias="all", name="bias")
    models.disturb(model)
    lorank.activate(model, "copy", "bias")
    y = model(x)
    with lorank.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_merging_one_bias_leaves_anothers_effect(x: Tensor) -> None:
    model = Small()
    for name in ("one", "two"):
        lorank.adapt(model, LoRA(rank=2), ["a"], bias="adapted", name=name)
        models.disturb(model)
    lorank.activate(model, "one", "two")
    y = model(x)
    lorank.merge(model, "one")
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_adapting_inside_a_disabled_block_leaves_what_was_active(x: Tensor) -> None:
    model = Small()
    lorank.adapt(model, LoRA(rank=2), ["a", "b"], name="old")
    models.disturb(model)
    y = model(x)
    with lorank.disabled(model):
        lorank.adapt(model, LoRA(rank=2), ["b"], name="new")
    assert lorank.active_adapters(model) == ["old"]
    assert torch.equal(model(x), y)


def test_copying_inside_a_merged_block_is_refused() -> None:
    model = Small()
    lorank.adapt(model, LoRA(rank=2), ["a"])
    with lorank.merged(model), pytest.raises(AdapterError, match="cannot copy"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_a_state_dict_taken_in_a_merged_block_is_an_ordinary_checkpoint(x: Tensor) -> None:
    model = Small()
    names = list(model.state_dict())
    lorank.adapt(model, LoRA(rank=2), ["a"])
    models.disturb(model)
    y = model(x)
    with lorank.merged(model):
        checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for action in (lambda: model.load_state_dict(checkpoint), lambda: lorank.reset(model, "default")):
            with pytest.raises(AdapterError, match=r"inside `with lorank\.merged"):
                action()
    assert list(checkpoint) == names
    plain = Small()
    plain.load_state_dict(checkpoint)
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_model_that_was_adapted_is_not_enough_to_remove_from() -> None:
    model = models.sequential(Small(), nn.Linear(3, 3))
    lorank.adapt(model, LoRA(rank=2), ["a"])
    for action in (lorank.remove, lorank.merge):
        with pytest.raises(AdapterError, match=r"put on a larger model, in which 'a' is '0\.a'; give that one"):
            action(model[0])
    lorank.remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_disabled_block_keeps_the_order_of_what_was_active(x: Tensor) -> None:
    model = Small()
    for name, targets in (("one", ["a"]), ("two", ["b"]), ("three", ["a", "b"])):
        lorank.adapt(model, LoRA(rank=2), targets, name=name)
    lorank.activate(model, "three", "two", "one")
    before = [layer.adapters.active for layer in adapted_layers(model).values()]
    with lorank.disabled(model):
        assert lorank.active_adapters(model) == []
    assert [layer.adapters.active for layer in adapted_layers(model).values()] == before


def test_a_failure_while_attaching_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    before = [(type(module), list(module.__dict__)) for module in model.modules()]
    attach = surgery.attach

    def fails(layer: nn.Module, layer_name: str, *rest: Any) -> None:
        if layer_name == "b":
            raise MemoryError
        attach(layer, layer_name, *rest)

    monkeypatch.setattr(surgery, "attach", fails)
    with pytest.raises(MemoryError):
        lorank.adapt(model, LoRA(rank=2), ["a", "b"])
    assert [(type(module), list(module.__dict__)) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@dataclass(frozen=True)
class Alone(LoRA):
    """A variant that is not additive, as DoRA is not."""

    def build(self, host: Any, layer: nn.Module, part: str, device: Any = None) -> LoRAAdapter:
        adapter = super().build(host, layer, part, device)
        adapter.__class__ = AloneAdapter
        return adapter


class AloneAdapter(LoRAAdapter):
    additive = False


def test_one_adapter_at_most_that_is_not_additive_is_active() -> None:
    model = Small()
    lorank.adapt(model, LoRA(rank=2), ["a"], name="additive")
    lorank.adapt(model, Alone(rank=2), ["b"], name="one")
    lorank.adapt(model, Alone(rank=2), ["a"], name="other")
    lorank.activate(model, "additive", "one")
    with pytest.raises(AdapterError, match="'one', 'other' are not additive: each is a change of the base alone"):
        lorank.activate(model, "one", "additive", "other")
    assert lorank.active_adapters(model) == ["additive", "one"]


def test_dropout_of_an_embedding_drops_whole_tokens() -> None:
    model: Any = models.sequential(nn.Embedding(50, 8))
    lorank.adapt(model, LoRA(rank=4, dropout=0.5), "0")
    models.disturb(model, size=1.0)
    ids = torch.arange(50)
    update = model.eval()(ids) - model[0].base_forward(ids)
    dropped = model.train()(ids) - model[0].base_forward(ids)
    zero = (dropped == 0).all(-1)
    assert 10 < int(zero.sum()) < 40
    torch.testing.assert_close(dropped[~zero], 2 * update[~zero], rtol=1e-4, atol=1e-5)


def test_dropout_of_a_linear_layer_drops_its_input(x: Tensor) -> None:
    model: Any = models.sequential(nn.Linear(6, 6))
    lorank.adapt(model, LoRA(rank=4, dropout=0.5), "0")
    models.disturb(model, size=1.0)
    model.train()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    expected = (
        model[0].base_forward(x) + nn.functional.dropout(x, 0.5) @ model[0].adapters["default"].delta_weight(None).T
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_padding_row_of_an_embedding_is_not_trained() -> None:
    model: Any = models.sequential(nn.Embedding(10, 4, padding_idx=3))
    lorank.adapt(model, LoRA(rank=2), "0")
    model(torch.arange(10)).sum().backward()
    gradient = model[0].adapters["default"].A.grad
    assert not gradient[:, 3].any() and gradient[:, 4].any()


# ---- layers that are not what they seem


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_an_odd_subclass_is_refused_on_every_way_in() -> None:
    model = models.sequential(nn.Linear(6, 6), Doubling(6, 6))
    with pytest.raises(AdapterError, match="Doubling does not compute"):
        lorank.adapt(model, LoRA(rank=2), "0", bias="all")
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"], name="copy")
    with pytest.raises(AdapterError, match="Doubling does not compute"):
        lorank.adapt(model, LoRA(rank=2), "1", name="adapter")


def test_an_odd_subclass_that_was_adapted_on_the_meta_device_is_found_when_merging() -> None:
    with torch.device("meta"):
        model = models.sequential(Doubling(6, 6))
    lorank.adapt(model, LoRA(rank=2), "0")
    model.load_state_dict(models.sequential(Doubling(6, 6)).state_dict(), assign=True)
    lorank.reset(model)
    with pytest.raises(AdapterError, match="Doubling does not compute"):
        lorank.merge(model)


def test_a_subclass_with_another_signature_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return scale * super().forward(input)

    class Loud(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Plain(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    for layer in (Scaled(6, 6), Loud(6, 6)):
        with pytest.raises(AdapterError, match="does not compute"):
            host_of(layer)
    assert host_of(Plain(6, 6)).transposed


def test_a_subclass_that_is_nearly_its_base_is_not_its_base() -> None:
    class Nearly(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 1.01 * super().forward(input)

    zeros = Doubling(6, 6)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    for layer in (Nearly(6, 6), zeros):
        with pytest.raises(AdapterError, match="does not compute"):
            host_of(layer)


def test_a_norm_with_an_activation_has_no_bias_to_offset() -> None:
    class NormAct(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    with pytest.raises(AdapterError, match=r"1: lorank does not know how NormAct applies its bias"):
        lorank.adapt(models.sequential(nn.Linear(6, 6), NormAct(6)).eval(), LoRA(rank=2), "0", bias="all")


def test_a_class_that_cannot_be_subclassed_is_refused_before_anything_changes() -> None:
    class Strict(nn.Linear):
        def __init_subclass__(cls, *, needed: int) -> None: ...

    model = Small()
    model.b = Strict(6, 6)
    before = [(type(module), list(module.__dict__)) for module in model.modules()]
    with pytest.raises(AdapterError, match="b: Strict cannot be subclassed"):
        lorank.adapt(model, LoRA(rank=2), ["a", "b"])
    assert [(type(module), list(module.__dict__)) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_expanded_weight_cannot_be_merged() -> None:
    model = models.sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.randn(1, 6).expand(6, 6))
    lorank.adapt(model, LoRA(rank=2), "0")
    with pytest.raises(AdapterError, match="has an expanded weight"):
        lorank.merge(model)


def test_a_module_that_is_used_elsewhere_too_is_not_replaced_by_a_copy() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.dense(x))

    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), Head()
            self.probe = self.head.dense

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x).sum(-1) + self.probe(x).sum(-1)

    model = Probed()
    lorank.adapt(model, LoRA(rank=2), "body", train_also=["head"])
    with pytest.raises(AdapterError, match="modules in head are also used as probe"):
        lorank.merge(model)


def test_a_bias_that_float16_cannot_hold_is_refused() -> None:
    model = models.sequential(nn.Linear(6, 6)).half()
    lorank.adapt(model, LoRA(rank=2), "0", bias="adapted")
    with torch.no_grad():
        model[0].adapters["default"].bias.offset.fill_(1e5)
    with pytest.raises(AdapterError, match="the merged bias is too large for float16"):
        lorank.merge(model)


# ---- what was changed since


def test_a_module_replaced_after_adapt_does_not_stop_remove() -> None:
    model = Small()
    lorank.adapt(model, LoRA(rank=2), ["a"])
    model.b = nn.Linear(6, 6, bias=False)
    model.b.requires_grad_(False)
    lorank.remove(model)
    assert model.a.weight.requires_grad and model.b.weight.requires_grad
    assert not any("lorank" in key for key in model.__dict__)


def test_a_partial_checkpoint_is_not_taken_for_a_base() -> None:
    model, fewer = Small(), Small()
    lorank.adapt(model, LoRA(rank=2), ["a", "b"])
    lorank.adapt(fewer, LoRA(rank=2), ["a"])
    with pytest.raises(RuntimeError, match=r"Missing key.*b\.adapters\.default\.A"):
        model.load_state_dict(fewer.state_dict())
    model.load_state_dict(Small().state_dict())
    lorank.remove(model)
    assert not model._load_state_dict_post_hooks


def test_a_base_loaded_under_a_trained_bias_keeps_the_training(x: Tensor) -> None:
    model, other = Small(), Small()
    lorank.adapt(model, LoRA(rank=2), ["a"], bias="adapted")
    other_base = other(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other_base)
    lorank.adapt(other, LoRA(rank=2), ["a"], train_also=["b"])
    with pytest.warns(lorank.AdapterWarning, match=r"keep the values they had: call lorank\.reset"):
        other.load_state_dict(Small().state_dict())


def test_statistics_that_training_would_move_are_told() -> None:
    model = models.sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    with pytest.warns(lorank.AdapterWarning, match="1: training moves the running statistics"):
        lorank.adapt(model, LoRA(rank=2), "0")
    lorank.remove(model)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    lorank.adapt(model.eval(), LoRA(rank=2), "0", name="other")


def test_a_head_of_a_bfloat16_base_is_trained_in_float32() -> None:
    model: Any = models.sequential(nn.Linear(64, 64), nn.Linear(64, 3)).to(torch.bfloat16)
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    x, y = torch.randn(32, 64, dtype=torch.bfloat16), torch.randint(3, (32,))
    base = model(x)
    assert base.dtype == torch.bfloat16
    with lorank.disabled(model):
        assert torch.equal(model(x), base)
    weight = lorank.adapter_parameters(model)["1.adapters.default.weight"]
    assert weight.dtype == torch.float32
    before = weight.clone()
    config = lorank.TrainConfig(steps=20, learning_rate=1e-5)  # below what bfloat16 weights of this size can follow
    for _ in lorank.train(
        lorank.adapter_parameters(model).values(),
        lambda b: nn.functional.cross_entropy(model(x).float(), y),
        [x],
        config,
    ):
        pass
    assert (weight != before).float().mean() > 0.99
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_regions_that_are_compiled_do_not_change_names(tmp_path: Any) -> None:
    model, x = models.llama(), models.ids()
    base = copy.deepcopy(model)
    for i in range(2):
        model.model.layers[i] = torch.compile(model.model.layers[i], backend="eager")
    plan = lorank.adapt(model, LoRA(rank=2), ["q_proj"])
    assert plan.layers[0] == "model.layers.0.self_attn.q_proj"
    models.disturb(model)
    lorank.save(model, tmp_path)
    lorank.load(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(base(x).logits, model(x).logits)


# ---- arguments of the wrong kind


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        *[
            ({"spec": "lora"}, "the spec is 'lora'"),
            ({"spec": LoRA}, "the spec is"),
            ({"targets": None}, "targets are None"),
        ],
        *[
            ({"targets": nn.Linear}, "target Linear is a class; select its layers with lambda"),
            ({"ranks": 4}, "ranks is 4"),
        ],
        *[({"train_also": None}, "train_also is None"), ({"targets": "al-linear"}, "nearest: all-linear")],
    ],
)
def test_arguments_of_the_wrong_kind_are_answered(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        lorank.adapt(**({"model": Small(), "spec": LoRA(rank=2), "targets": "a"} | arguments))


def test_a_lazy_module_elsewhere_is_no_obstacle() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "lazy": nn.LazyLinear(6)})
    assert lorank.plan(model, LoRA(rank=2), "a").base_parameters == 42


def test_parameters_of_a_copy_that_are_no_numbers_are_not_trained(x: Tensor) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)

    model = models.sequential(nn.Linear(6, 6), Counting())
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    model(x).sum().backward()
    assert "1.adapters.default.steps" not in lorank.adapter_parameters(model)
    assert lorank.check(model) == []


# ---- copies, again


def test_a_head_whose_weight_a_hook_computes_is_refused(x: Tensor) -> None:
    head = prune.l1_unstructured(nn.Linear(6, 2), "weight", 0.5)
    model = models.sequential(nn.Linear(6, 6), head)
    with torch.no_grad():
        model(x)
    with pytest.raises(AdapterError, match=r"1: a hook computes its weight \(pruned or normalised\)"):
        lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])


def test_members_of_a_sequence_that_only_keep_statistics_are_copied_too(x: Tensor, tmp_path: Any) -> None:
    model = Small()
    model.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))
    base = copy.deepcopy(model)
    plan = lorank.adapt(model, LoRA(rank=2), "a", train_also=["head"])
    assert list(plan.copies) == ["head.0", "head.1", "head.2"]
    model.train()
    for _ in range(3):
        model(3 * x + 1)
    model.eval()
    base.eval()
    y = model(x)
    with lorank.disabled(model):
        assert torch.equal(model(x), base(x))
    lorank.save(model, tmp_path)
    lorank.load(base, tmp_path)
    assert torch.equal(base(x), y)


def test_weights_tied_across_members_of_a_sequence_are_refused() -> None:
    first, last = nn.Linear(6, 6), nn.Linear(6, 6)
    last.weight = first.weight
    model = models.sequential(nn.Linear(6, 6), nn.Sequential(first, nn.ReLU(), last))
    with pytest.raises(AdapterError, match=r"1\.0 and 1\.2 share a weight, which two copies would not"):
        lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])


def test_a_tie_inside_a_copy_survives_a_reset_from_the_meta_device(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    with torch.device("meta"):
        model = models.sequential(nn.Linear(6, 6), Tied())
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    model.to_empty(device="cpu")
    model[1].b.weight = model[1].a.weight
    with pytest.warns(lorank.AdapterWarning):
        model.load_state_dict(models.sequential(nn.Linear(6, 6), Tied()).state_dict())
    lorank.reset(model)
    twin = model[1].adapters["default"]
    assert twin.a.weight is twin.b.weight
    models.disturb(model)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_copy_that_its_base_cannot_hold_is_refused_and_its_rounding_is_reported() -> None:
    model = models.sequential(nn.Linear(6, 6), nn.Linear(6, 2)).half()
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    models.disturb(model)
    large = copy.deepcopy(model)
    with torch.no_grad():
        large[1].adapters["default"].weight.fill_(1e5)
    with pytest.raises(AdapterError, match=r"1\.weight: too large for float16"):
        lorank.merge(large)
    report = lorank.merge(model)
    assert {row.label for row in report.rows} == {"0", "1.weight", "1.bias"}
    assert all(0 < row.relative_error < 1e-2 for row in report.rows)


def test_a_head_that_is_parametrised_after_adapt_still_runs(x: Tensor) -> None:
    model = models.sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    lorank.adapt(model, LoRA(rank=2), "0", train_also=["1"])
    y = model(x)
    nn.utils.parametrizations.weight_norm(model[1])
    assert torch.equal(model(x), y)


# ---- roots inside roots, and blocks


def test_loading_in_a_merged_block_is_refused_before_anything_is_written(x: Tensor) -> None:
    model = models.sequential(nn.Linear(6, 6), Small())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    lorank.adapt(model, LoRA(rank=2), ["a"])
    y = model(x)
    with lorank.merged(model), pytest.raises(AdapterError, match="cannot load a state dict inside"):
        model.load_state_dict(zeros)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("inner_first", [True, False])
@pytest.mark.parametrize("remove_inner_first", [True, False])
def test_a_model_and_a_part_of_it_may_both_be_adapted(inner_first: bool, remove_inner_first: bool) -> None:
    model = models.sequential(nn.Linear(6, 6), Small())
    attributes = [(list(m.__dict__), len(m._load_state_dict_post_hooks)) for m in model.modules()]
    adapts = [
        lambda: lorank.adapt(model[1], LoRA(rank=2), ["a"], name="inner"),
        lambda: lorank.adapt(model, LoRA(rank=2), ["0"], name="outer"),
    ]
    removes = [lambda: lorank.remove(model[1], "inner"), lambda: lorank.remove(model, "outer")]
    for action in adapts if inner_first else adapts[::-1]:
        action()
    for i, action in enumerate(removes if remove_inner_first else removes[::-1]):
        action()
        if i == 0:
            assert (
                not model[0 if remove_inner_first else 1]
                .get_parameter("weight" if remove_inner_first else "b.weight")
                .requires_grad
            )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [(list(m.__dict__), len(m._load_state_dict_post_hooks)) for m in model.modules()] == attributes


# ---- targets and plans


def test_attentions_that_cannot_be_adapted_can_be_excluded() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    plan = lorank.plan(model, LoRA(rank=1), ["all-linear", "!attention"])
    assert plan.layers == ["fc"] and plan.left_out == {}


def test_a_head_that_is_named_is_not_listed_as_left_out() -> None:
    plan = lorank.plan(models.llama(), LoRA(rank=1), ["lm_head", "all-linear"])
    assert "lm_head" in plan.layers and plan.left_out == {}


def test_a_plan_joins_names_only_where_all_combinations_are_meant() -> None:
    grid = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]) for _ in range(3)])
    model = nn.ModuleDict({"l": grid})
    assert "l.{0-2}.{0-2}  x 9" in str(lorank.plan(model, LoRA(rank=1), "all-linear"))
    assert "l.*.*   x 3" in str(lorank.plan(model, LoRA(rank=1), ["l.0.1", "l.1.0", "l.2.2"]))
    assert "l.{0,2}.1  x 2" in str(lorank.plan(model, LoRA(rank=1), ["l.0.1", "l.2.1"]))


def test_a_base_with_infinities_recognises_itself(tmp_path: Any) -> None:
    model = models.sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0] = float("-inf")
    lorank.adapt(model, LoRA(rank=2), "0")
    lorank.save(model, tmp_path)
    lorank.remove(model)
    lorank.load(model, tmp_path)
