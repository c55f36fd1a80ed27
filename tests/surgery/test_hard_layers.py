"""What is easily gone wrong with ties, rows of tokens and parameters: silent losses above all."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA, formats, streaming

from .. import models
from ..interop.test_peft import pytestmark, read_by_peft  # noqa: F401  # the marks hold here too
from ..models import Plain, disturb, ids


def tied_llama() -> Any:
    return models.llama(tie_word_embeddings=True)


def with_token(token: int) -> Tensor:
    x = ids()
    x[0, 0] = token
    return x


class ReadsItsHead(Plain):
    """Multiplies with its head's weight without calling the head."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x @ self.head.weight.T


# ---- what is read of W + ΔW


def test_rows_of_tokens_are_in_a_tied_head_that_is_read() -> None:
    model, x = ReadsItsHead(tied=True), with_token(7)
    lorank.adapt(model, LoRA(rank=2), "up", train_tokens={"embed": [7, 8]})
    disturb(model)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_an_update_that_cannot_be_formed_is_an_error_and_not_the_bare_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ReadsItsHead()
    lorank.adapt(model, LoRA(rank=2), "head")

    def fail(*args: object) -> Tensor:
        raise AttributeError("nothing here")

    monkeypatch.setattr(lorank.variants.LoRAAdapter, "change", fail)
    with pytest.raises(RuntimeError, match="weight with its update cannot be formed: nothing here"):
        model(ids())


# ---- ties


def test_save_pretrained_of_tied_adapters_has_them_once(tmp_path: Path) -> None:
    model, x = tied_llama(), ids()
    base = model(x).logits
    lorank.adapt(model, LoRA(rank=2), "embed_tokens", tie=True)
    disturb(model)
    model.save_pretrained(tmp_path)
    assert len([key for key in load_file(tmp_path / "model.safetensors") if "adapters" in key]) == 2
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(x).logits, base)


def test_a_convolution_and_a_transposed_one_are_not_taken_for_one_matrix() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 3, padding=1))
    model[1].weight = model[0].weight
    with pytest.raises(AdapterError, match="1 has only a part of the weight of 0, or has it in another order"):
        lorank.adapt(model, LoRA(rank=2), "0", tie=True)


def test_a_linear_layer_and_a_pointwise_convolution_are_not_run_alike() -> None:
    model = models.sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    model[1].weight = nn.Parameter(model[0].weight.detach()[..., None])
    with pytest.raises(AdapterError, match="has it in another order"):
        lorank.adapt(model, LoRA(rank=2), "0", tie=True)


def test_a_tied_layer_with_a_forward_of_its_own_goes_through_a_file(tmp_path: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, x = models.sequential(Doubled(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    model[1].weight = model[0].weight
    lorank.adapt(model, LoRA(rank=2), "0.weight", tie=True)
    disturb(model)
    y = model(x)
    lorank.save(model, tmp_path)
    lorank.remove(model)
    lorank.load(model, tmp_path)
    assert torch.equal(model(x), y)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_peft_finds_the_bias_of_a_tied_head(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    model: Any = BertForMaskedLM(models.bert().config).eval()
    theirs, x = copy.deepcopy(model), ids()
    lorank.adapt(model, LoRA(rank=2), ["query", "word_embeddings"], tie=True, bias="all")
    disturb(model)
    lorank.save(model, tmp_path)
    read = read_by_peft(theirs, tmp_path)
    torch.testing.assert_close(read(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


def test_a_tie_that_was_broken_since_is_not_merged() -> None:
    model, x = Plain(tied=True), ids()
    lorank.adapt(model, LoRA(rank=2), "head", tie=True)
    disturb(model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(AdapterError, match="head has the update of embed, and no longer its weight"):
        lorank.merge(model)
    y = model(x)
    model.head.weight = model.embed.weight
    lorank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


# ---- rows of tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_tokens": {"embed": [1], "head": [2]}}, "shares its weight with embed, of which other tokens"),
        ({"train_tokens": {"embed": [1], "*mbed": [2]}}, "gives embed two lists of token numbers"),
        ({"train_tokens": {"embed": 3}}, "token numbers are whole numbers"),
        ({"train_tokens": {"embed": [1]}, "train_also": "head"}, "head would be adapted and trained whole at once"),
        ({"train_tokens": {"embed": [1]}, "train_also": "embed"}, "embed would be adapted and trained whole at once"),
    ],
)
def test_what_would_be_dropped_is_refused(options: dict[str, Any], message: str) -> None:
    model = Plain(tied=True)
    with pytest.raises(AdapterError, match=message):
        lorank.adapt(model, LoRA(rank=2), "up", **options)
    assert not lorank.adapter_names(model)


def test_a_mirror_is_not_replaced_by_a_copy() -> None:
    for target, copied in (("embed", "head"), ("head", "embed")):
        with pytest.raises(AdapterError, match="would be adapted and trained whole at once"):
            lorank.adapt(Plain(tied=True), LoRA(rank=2), target, tie=True, train_also=copied)


@pytest.mark.filterwarnings("ignore:.*tie")
def test_rows_named_by_a_tied_head_are_the_embeddings(tmp_path: Path) -> None:
    model, x = tied_llama(), with_token(7)
    theirs = copy.deepcopy(model)
    plan = lorank.adapt(model, LoRA(rank=2), "q_proj", train_tokens={"lm_head": [7]})
    assert plan.tokens == {"model.embed_tokens": (7,)} and list(plan.tied) == ["lm_head"]
    disturb(model)
    lorank.save(model, tmp_path)
    read = read_by_peft(theirs, tmp_path)
    torch.testing.assert_close(read(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_head_with_rows_of_its_own_has_pefts_name(tmp_path: Path) -> None:
    class Biased(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, models.VOCABULARY)

    model, x = Biased(), with_token(7)
    ours = copy.deepcopy(model)
    lorank.adapt(model, LoRA(rank=2), "up", train_tokens={"embed": [7], "head": [7]}, bias="all")
    disturb(model)
    lorank.save(model, tmp_path)  # peft 0.21 itself drops the bias of a linear layer with trained tokens
    assert "base_model.model.head.token_adapter.base_layer.bias" in load_file(tmp_path / "adapter_model.safetensors")
    lorank.load(ours, tmp_path)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)


def test_rows_survive_the_meta_device() -> None:
    base = Plain()
    with torch.device("meta"):
        model = Plain()
    lorank.adapt(model, LoRA(rank=2), "up", train_tokens={"embed": [7, 8]})
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict())
    lorank.reset(model)
    x = with_token(7)
    assert torch.equal(model(x), base(x))
    disturb(model)
    y = model(x)
    lorank.merge(model)
    torch.testing.assert_close(model(x), y)
    assert (model.embed.weight != base.embed.weight).any(dim=1).nonzero().flatten().tolist() == [7, 8]


def test_check_tells_of_tokens_that_did_not_occur() -> None:
    model = Plain()
    lorank.adapt(model, LoRA(rank=2), "up", train_tokens={"embed": [2]})  # no special token is among `ids`
    model(ids()).square().mean().backward()
    assert lorank.check(model) == ["embed: none of the 1 trained tokens occurred"]


def test_a_parameter_with_the_name_of_something_else_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_parameter("change", nn.Parameter(torch.randn(4, 4)))
    with pytest.raises(AdapterError, match=r"0\.change: an adapter has an attribute of this name"):
        lorank.adapt(model, LoRA(rank=2), "0.change")


# ---- files and checkpoints


@pytest.mark.parametrize(
    "options", [{"targets": "embed_tokens", "tie": True}, {"targets": "up_proj", "train_tokens": [7]}]
)
def test_a_checkpoint_with_both_names_of_a_tied_weight_stays_tied(tmp_path: Path, options: dict[str, Any]) -> None:
    model, x = tied_llama(), with_token(7)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    lorank.adapt(model, LoRA(rank=2), **options)
    disturb(model)
    lorank.save(model, tmp_path / "adapter")
    with torch.device("meta"):
        meta = type(model)(model.config)
    meta.tie_weights()
    content = formats.read(tmp_path / "adapter", meta)
    streaming.merge_checkpoint(tmp_path / "base", content, meta, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


def test_a_copied_model_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->beo", x, self.scores)

    model = nn.Sequential(Mixture())
    lorank.adapt(model, LoRA(rank=2), "scores")
    disturb(model)
    lorank.save(model, tmp_path / "own")
    lorank.save(copy.deepcopy(model), tmp_path / "copied")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "copied" / file).read_bytes()


@pytest.mark.parametrize("kernels", [((4, 8, 3), (8, 8, 1)), ((4, 8, 3), (8,)), ((4, 8, 3), (8, 0, 1))])
def test_kernels_that_are_no_pair_are_an_error(tmp_path: Path, kernels: tuple[tuple[int, ...], ...]) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["0"]}')
    names = [f"base_model.model.0.lora_{kind}.weight" for kind in "AB"]
    tensors = {name: torch.ones(shape) for name, shape in zip(names, kernels, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="no pair of"):
        lorank.load(model, tmp_path)
