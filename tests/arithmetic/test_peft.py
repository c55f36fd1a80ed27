"""Against the real PEFT's add_weighted_adapter: its exact ways agree with ours, and its ways on factors are others."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import LoRA, arithmetic
from lorank.formats import read
from lorank.formats.content import Content

from .. import models
from .dense import adapter, close, deltas

LAYERS = ["q_proj", "down_proj", "embed_tokens"]
# peft reads a property that this transformers deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning")


def two_adapters(folder: Path, targets: list[str] = LAYERS) -> tuple[Any, Content, Content]:
    """Return a model with two adapters in PEFT, and both as PEFT saved them."""
    first = peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets)
    model: Any = peft.get_peft_model(models.llama(), first, adapter_name="first")
    second = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True)
    if len(targets) == 1:  # PEFT's ways on factors need one rank
        second = peft.LoraConfig(r=4, lora_alpha=5, target_modules=targets)
    model.add_adapter("second", second)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model, read(folder / "first"), read(folder / "second")


def deltas_in(model: Any, name: str) -> dict[str, Tensor]:
    """Return ΔW of an adapter as PEFT computes it."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer: Any = module
            delta = layer.get_delta_weight(name).detach().double()
            label = path.removeprefix("base_model.model.")
            found[label] = delta.T if label.endswith("embed_tokens") else delta
    return found


def test_cat_is_exact(tmp_path: Path) -> None:
    model, a, b = two_adapters(tmp_path)
    model.add_weighted_adapter(["first", "second"], [0.7, -0.3], "sum", combination_type="cat")
    made, _ = arithmetic.combine({"a": (a, 0.7), "b": (b, -0.3)})
    assert close(deltas(made), deltas_in(model, "sum"), 1e-6)


def test_svd_is_svd(tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"]  # of an embedding PEFT's SVD has the factors the wrong way round
    model, a, b = two_adapters(tmp_path, targets)
    model.add_weighted_adapter(["first", "second"], [0.7, -0.3], "sum", combination_type="svd", svd_rank=3)
    made, report = arithmetic.combine({"a": (a, 0.7), "b": (b, -0.3)}, method="svd", rank=3)
    assert close(deltas(made), deltas_in(model, "sum"), 1e-5)
    exact = deltas_in(model, "first"), deltas_in(model, "second")
    for row in report.rows:
        W = 0.7 * exact[0][row.label] - 0.3 * exact[1][row.label]
        lost = float((deltas_in(model, "sum")[row.label] - W).norm() / W.norm())
        assert row.error == pytest.approx(lost, rel=1e-4)


def test_ties_svd_is_ties(tmp_path: Path) -> None:
    """With equal weights; PEFT applies others after the election of signs, so that a negative one has no vote."""
    model, a, b = two_adapters(tmp_path, ["q_proj", "down_proj"])
    options: dict[str, Any] = {"combination_type": "ties_svd", "svd_rank": 5, "density": 0.25}
    model.add_weighted_adapter(["first", "second"], [0.6, 0.6], "sum", **options)
    made, _ = arithmetic.combine({"a": (a, 0.6), "b": (b, 0.6)}, method="ties", rank=5, density=0.25)
    assert close(deltas(made), deltas_in(model, "sum"), 1e-4)


@pytest.mark.parametrize(("theirs", "ours"), [("linear", "exact"), ("ties", "ties"), ("dare_linear", "dare")])
def test_its_ways_on_factors_are_no_such_combination_of_updates(theirs: str, ours: Any, tmp_path: Path) -> None:
    model, a, b = two_adapters(tmp_path, ["q_proj"])
    density: dict[str, Any] = {} if ours == "exact" else {"density": 0.5}
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum", combination_type=theirs, **density)
    made, _ = arithmetic.combine({"a": (a, 0.5), "b": (b, 0.5)}, method=ours, rank=32, **density)
    for label, W in deltas_in(model, "sum").items():
        assert float((deltas(made)[label] - W).norm() / W.norm()) > 0.5


def test_peft_loads_what_was_combined(tmp_path: Path) -> None:
    model, a, b = two_adapters(tmp_path)
    made, _ = arithmetic.combine({"a": (a, 0.7), "b": (b, -0.3)})
    arithmetic.write(made, tmp_path / "sum")
    resized, _ = arithmetic.resize(made, energy=0.8)
    arithmetic.write(resized, str(tmp_path / "small"))
    model.add_weighted_adapter(["first", "second"], [0.7, -0.3], "sum", combination_type="cat")
    for folder, expected in (("sum", deltas_in(model, "sum")), ("small", deltas(resized))):
        again: Any = peft.PeftModel.from_pretrained(models.llama(), str(tmp_path / folder))
        assert close(deltas_in(again, "default"), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT mends that by itself
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize(
    ("build", "targets", "example"),
    [
        (models.gpt2, ["c_attn", "mlp.c_proj"], models.ids),
        (
            lambda: models.sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=2)),
            ["0", "1"],
            lambda: torch.randn(2, 4, 8, 8),
        ),
    ],
)
def test_files_of_other_layers_keep_their_form_without_a_model(
    build: Any, targets: list[str], example: Any, tmp_path: Path
) -> None:
    model = build()
    base, plain = deepcopy(model), deepcopy(model)
    adapter(model, targets, LoRA(rank=4))
    lorank.save(model, tmp_path / "adapter")
    made, report = arithmetic.resize(read(tmp_path / "adapter"), 3)
    assert report.error > 0
    made.base_model = "org/base"
    arithmetic.write(made, tmp_path / "small")
    theirs: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "small"))
    assert theirs.peft_config["default"].base_model_name_or_path == "org/base"
    lorank.resize(model, rank=3)
    x = example()
    with torch.no_grad():
        outputs = [net(x) for net in (theirs, model, plain)]
    first, second, untouched = (getattr(output, "logits", output) for output in outputs)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    assert float((untouched - second).abs().max()) > 0.1
