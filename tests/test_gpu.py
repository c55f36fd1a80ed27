"""What only an accelerator can show. Skipped where there is none."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank import LoRA

from . import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(model: Any) -> Any:
    return model.cuda()


def test_adapters_are_made_where_the_layer_is_and_move_with_it(tmp_path: Path) -> None:
    base, x = models.gpt2(), models.ids()
    model = on_gpu(copy.deepcopy(base))
    lorank.adapt(model, LoRA(rank=2), ["c_attn[q,v]", "c_fc"], train_also=["lm_head"], bias="adapted")
    assert all(parameter.is_cuda for parameter in model.parameters())
    models.disturb(model)
    y = model(x.cuda()).logits
    lorank.save(model, tmp_path)
    torch.testing.assert_close(model.cpu()(x).logits, y.cpu(), rtol=1e-4, atol=1e-4)
    lorank.load(base, tmp_path)
    torch.testing.assert_close(base(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_is_exact_whatever_the_switches_say(dtype: torch.dtype) -> None:
    model: Any = models.sequential(nn.Linear(512, 512, dtype=dtype))
    lorank.adapt(model, LoRA(rank=64), "0")
    models.disturb(model, size=0.5)
    exact = copy.deepcopy(model).double()
    lorank.merge(exact)
    model = on_gpu(model)
    torch.set_float32_matmul_precision("medium")  # TF32 would cost three digits of the update
    try:
        with torch.autocast("cuda", torch.bfloat16):
            lorank.merge(model)
    finally:
        torch.set_float32_matmul_precision("highest")
    merged = model[0].weight.cpu().double()
    if dtype == torch.float32:
        torch.testing.assert_close(merged, exact[0].weight, rtol=1e-5, atol=1e-5)
    else:
        differs = merged != exact[0].weight.to(dtype).double()
        assert differs.float().mean() < 1e-3  # float32 sums in another order round a few halves the other way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_trains_in_half_precision(dtype: torch.dtype) -> None:
    model, batch = on_gpu(models.llama().to(dtype)).train(), models.ids(8, 16).cuda()
    lorank.adapt(model, LoRA(rank=8), "all-linear")
    config = lorank.TrainConfig(steps=30, learning_rate=1e-2)
    parameters = lorank.adapter_parameters(model).values()
    losses = []
    for step in lorank.train(parameters, lambda x: model(x, labels=x).loss, [batch], config):
        lorank.check(model, moved=step.index > 1)
        losses.append(float(step.loss))
    assert losses[-1] < 0.95 * losses[0]
    y = model(batch).logits
    with lorank.merged(model):
        torch.testing.assert_close(model(batch).logits, y, rtol=0.1, atol=0.15)


def test_autocast_over_a_float32_base() -> None:
    model, batch = on_gpu(models.llama()), models.ids(4, 16).cuda()
    lorank.adapt(model, LoRA(rank=4), ["q_proj", "embed_tokens"])
    models.disturb(model)
    y = model(batch).logits
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(batch, labels=batch).loss
        z = model(batch).logits
    loss.backward()
    lorank.check(model)
    torch.testing.assert_close(z.float(), y, rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_it_compiles_with_inductor() -> None:
    model: Any = on_gpu(models.Plain())
    x = models.ids().cuda()
    lorank.adapt(model, LoRA(rank=2), ["up", "embed"], train_also=["head"])
    models.disturb(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    compiled(x).square().sum().backward()
    lorank.check(model)
    lorank.activate(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
