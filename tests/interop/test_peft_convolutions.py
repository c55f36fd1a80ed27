"""Files with convolutions go both ways between lorank and the real peft, as far as peft computes what it says."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA

from .. import models
from .test_peft import peft_model, read_by_peft

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")


class Net(nn.Module):
    """A convolution, and a linear layer on the mean of every channel."""

    def __init__(self, conv: nn.Module, channels: int):
        super().__init__()
        self.conv = conv
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(2).mean(-1))


# What peft has right: stride and padding. Its A forgets dilation, and pads with zeros in every padding_mode.
PLAIN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (6, 9)),
    "1d-strided": (lambda: nn.Conv1d(6, 8, 4, stride=2, padding=3, bias=False), (6, 9)),
    "1d-pointwise": (lambda: nn.Conv1d(6, 8, 1), (6, 9)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(0, 1)), (6, 7, 8)),
    "2d-same": (lambda: nn.Conv2d(6, 8, 3, padding="same"), (6, 7, 8)),
    "2d-pointwise": (lambda: nn.Conv2d(6, 8, 1), (6, 7, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=1, stride=(2, 1, 1)), (4, 4, 3, 4)),
}
GROUPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, groups=2), (6, 9)),
    "1d-depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8, padding=2), (8, 9)),
    "2d": (lambda: nn.Conv2d(6, 9, 3, groups=3, stride=2, padding=1), (6, 7, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False), (4, 3, 3, 4)),
}


def net(layer: nn.Module) -> Any:
    return Net(layer, layer.out_channels).eval()  # pyright: ignore[reportArgumentType]


def adapt(model: nn.Module, **options: Any) -> None:
    lorank.adapt(model, LoRA(rank=3, alpha=4, **options), ["conv", "head"])
    models.disturb(model)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_lorank_reads_what_peft_writes(kind: str, stabilised: bool, tmp_path: Path) -> None:
    make, shape = PLAIN[kind]
    base, x = net(make()), torch.randn(2, *shape)
    config: dict[str, Any] = {"r": 3, "lora_alpha": 4, "use_rslora": stabilised}
    theirs = peft_model(copy.deepcopy(base), target_modules=["conv", "head"], **config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path / "theirs")
    assert set(plan.layers) == {"conv", "head"}
    assert_near(model(x), theirs(x))
    assert not torch.allclose(model(x), base(x), atol=1e-3)
    lorank.save(model, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    after = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    lorank.merge(model)
    assert_near(model(x), theirs.merge_and_unload()(x))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_peft_reads_what_lorank_writes(kind: str, stabilised: bool, tmp_path: Path) -> None:
    make, shape = PLAIN[kind]
    base, x = net(make()), torch.randn(2, *shape)
    adapt(model := copy.deepcopy(base), rank_stabilised=stabilised)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    assert_near(theirs(x), model(x))
    assert not torch.allclose(model(x), base(x), atol=1e-3)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", GROUPED)
def test_peft_computes_the_same_of_a_grouped_convolution(kind: str, stabilised: bool, tmp_path: Path) -> None:
    make, shape = GROUPED[kind]
    base, x = net(make()), torch.randn(2, *shape)
    adapt(model := copy.deepcopy(base), rank_stabilised=stabilised)
    lorank.save(model, tmp_path)
    layer = base.conv
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.conv.lora_{factor}.weight"] for factor in "AB")
    assert A.shape == (3 * layer.groups, layer.in_channels, *layer.kernel_size)
    assert B.shape[:2] == (layer.out_channels, 3)
    inner = layer.in_channels // layer.groups
    for group in range(layer.groups):  # zeros for the channels of all other groups
        of_group = A[group * 3 : (group + 1) * 3]
        others = torch.cat([of_group[:, : group * inner], of_group[:, (group + 1) * inner :]], 1)
        assert of_group[:, group * inner : (group + 1) * inner].any() and not others.any()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert_near(theirs(x), model(x))
    fresh = copy.deepcopy(base)
    plan = lorank.load(fresh, tmp_path)
    assert [place.spec.rank for place in plan.places] == [3, 3]
    assert torch.equal(fresh(x), model(x))


def test_a_grouped_convolution_without_the_header_of_lorank_is_taken_apart_all_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    make, shape = GROUPED["2d"]
    base, x = net(make()), torch.randn(2, *shape)
    for stabilised in (False, True):
        adapt(model := copy.deepcopy(base), rank_stabilised=stabilised)
        lorank.save(model, tmp_path)
        save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
        plan = lorank.load(fresh := copy.deepcopy(base), tmp_path)
        assert [place.spec.rank for place in plan.places] == [3, 3]
        assert_near(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
def test_a_grouped_convolution_that_peft_could_never_merge_is_refused(kind: str, tmp_path: Path) -> None:
    make, _ = GROUPED[kind]
    base = net(make())
    theirs = peft_model(copy.deepcopy(base), target_modules=["conv"], r=6)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(NotImplementedError):
        theirs.merge_and_unload()  # pyright: ignore[reportCallIssue]
    with pytest.raises(
        AdapterError, match=r"conv: its lora_A mixes the channels of all \d groups.*could not be merged"
    ):
        lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []


@pytest.mark.parametrize("option", [{"dilation": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_where_peft_computes_something_else_its_merged_weights_are_the_same(
    option: dict[str, Any], tmp_path: Path
) -> None:
    base, x = net(nn.Conv1d(6, 8, 3, **option)), torch.randn(2, 6, 9)
    adapt(model := copy.deepcopy(base))
    y = model(x)
    lorank.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert_near(theirs.merge_and_unload()(x), y)  # pyright: ignore[reportCallIssue]
    lorank.merge(model)
    assert_near(model(x), y)


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Conv1d])
def test_wrong_shapes_of_kernels_are_named(kind: Any, tmp_path: Path) -> None:
    wide, narrow = (nn.ModuleDict({"conv": kind(6, 8, size)}) for size in (3, 2))
    lorank.adapt(wide, LoRA(rank=2), "conv")
    lorank.save(wide, tmp_path)
    with pytest.raises(AdapterError, match=r"conv: [AB] is \(.*\) in the file, the model needs"):
        lorank.load(narrow, tmp_path)
