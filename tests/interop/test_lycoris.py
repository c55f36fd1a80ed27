"""Files go both ways between lorank and the real LyCORIS, and to diffusers, with the same outputs."""

import copy
import json
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorank
from lorank import AdapterError, LoRA
from lorank.variants import AdaLoRA, DoRA, LoHa, LoKr, PiSSA, Spec, VeRA

from .. import models
from . import apart

# Adapts a model as LyCORIS does, with random values, and writes the adapters as its trainers do, with the outputs.
WRITE = """
    import copy, json, sys
    import torch
    from lycoris import create_lycoris
    folder, cases = sys.argv[1:]
    base, x = torch.load(f"{folder}/base.pt", weights_only=False)
    outputs = {}
    for number, settings in enumerate(json.loads(cases)):
        torch.manual_seed(number)
        model = copy.deepcopy(base)
        network = create_lycoris(model, 1.0, **settings)
        network.apply_to()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        network.save_weights(f"{folder}/{number}.safetensors", None, {})
        outputs[number] = model(x).detach()
    torch.save(outputs, f"{folder}/outputs.pt")
"""

# Reads adapters, and writes the model's outputs with each: as it runs, and merged.
READ = """
    import copy, sys
    import torch
    from lycoris import create_lycoris_from_weights
    folder, count = sys.argv[1:]
    outputs = {}
    for number in range(int(count)):
        model, x = torch.load(f"{folder}/base{number}.pt", weights_only=False)
        network, _ = create_lycoris_from_weights(1.0, f"{folder}/{number}.safetensors", model)
        network.apply_to()
        running = model(x).detach()
        network.restore()
        network.merge_to(1.0)
        outputs[number] = running, model(x).detach(), sorted({type(module).__name__ for module in network.loras})
    torch.save(outputs, f"{folder}/outputs.pt")
"""

# Adapts a UNet of diffusers and a text encoder of transformers with lorank, and has diffusers read the files. Then both
# are adapted as LyCORIS does for kohya's trainer, in one file. Prints the largest differences between the outputs.
DIFFUSION = """
    import copy, json, sys, warnings
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as loader
    from lycoris.kohya import create_network
    from transformers import CLIPTextConfig, CLIPTextModel
    import lorank
    folder = sys.argv[1]
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    ids = torch.randint(5, 50, (2, 7))
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    run = {
        "unet": lambda model: model(sample, 3, states).sample,
        "text": lambda model: model(ids).last_hidden_state,
    }
    base = {"unet": unet, "text": text}
    targets = {
        "unet": ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "downsamplers.0.conv", "time_emb_proj"],
        "text": ["q_proj", "fc1", "out_proj"],
    }
    ranked = {"unet": "to_q", "text": "fc1"}
    warnings.simplefilter("ignore")
    found = {}
    with torch.no_grad():
        for name in base:
            model = copy.deepcopy(base[name])
            lorank.adapt(model, lorank.LoRA(2, alpha=3), targets[name], ranks={ranked[name]: 3})
            for parameter in lorank.adapter_parameters(model).values():
                parameter.add_(0.2 * torch.randn_like(parameter))
            path = f"{folder}/{name}.safetensors"
            lorank.save(model, path, format="kohya")
            state, alphas = loader.lora_state_dict(path)
            theirs = copy.deepcopy(base[name])
            if name == "unet":
                loader.load_lora_into_unet(state, alphas, theirs)
            else:
                loader.load_lora_into_text_encoder(state, alphas, theirs)
            wanted = run[name](model)
            found[name] = float((run[name](theirs) - wanted).abs().max())
            found[f"{name} changed"] = float((run[name](base[name]) - wanted).abs().max())
    theirs = copy.deepcopy(base)
    network = create_network(1.0, 3, 2.0, None, theirs["text"], theirs["unet"], preset="attn-mlp")
    network.apply_to(theirs["text"], theirs["unet"], True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        network.save_weights(f"{folder}/both.safetensors", None, {})
        warnings.simplefilter("always")
        for name in base:
            with warnings.catch_warnings(record=True) as warned:
                lorank.load(base[name], f"{folder}/both.safetensors")
            found[f"{name} of both"] = float((run[name](base[name]) - run[name](theirs[name])).abs().max())
            found[f"{name} warned"] = [str(w.message) for w in warned if w.category is lorank.AdapterWarning]
    print(json.dumps(found))
"""


def small() -> tuple[Any, Tensor]:
    """Return a model of linear layers and convolutions, with names that have _ in them, and an input."""
    convolutions = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 1))
    attention = nn.Sequential(OrderedDict(to_q=nn.Linear(16, 24), to_out=nn.Linear(24, 20, bias=False)))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        down_blocks=convolutions, norm=nn.GroupNorm(2, 12), flat=nn.Flatten(2), mid_block=attention
    )
    return nn.Sequential(layers).eval(), torch.randn(3, 6, 8, 8)


def grouped() -> tuple[Any, Tensor]:
    """Return a model of convolutions over one dimension, which are grouped and depthwise, and an input."""
    layers = (nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 9))
    return nn.Sequential(*layers).eval(), torch.randn(3, 4, 8)


def layers_of(model: nn.Module) -> list[str]:
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


CORES = "the cores of a Tucker decomposition"
AS_PAIR = "which was multiplied out to LoRA"
FROM_LYCORIS = {  # settings of `create_lycoris`, and what loading warns of
    "lora": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 5, "conv_dim": 2, "conv_alpha": 1}, ""),
    "lora with scalars": ({"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "use_scalar": True}, ""),
    "lora with cores": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 5, "use_tucker": True}, CORES),
    "dora": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 5, "dora_wd": True}, ""),
    "dora with cores": (
        {"algo": "lora", "linear_dim": 2, "linear_alpha": 5, "dora_wd": True, "use_tucker": 1},
        CORES,
    ),
    "loha": ({"algo": "loha", "linear_dim": 3, "linear_alpha": 5}, ""),
    "loha with cores": ({"algo": "loha", "linear_dim": 3, "linear_alpha": 5, "use_tucker": True}, CORES),
    "lokr": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 5}, ""),
    "lokr of a factor": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 2}, ""),
    "lokr of an uneven factor": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 8}, AS_PAIR),
    "lokr of both": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 5, "decompose_both": True}, ""),
    "lokr with cores": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 5, "use_tucker": True}, CORES),
    "lokr, whole": ({"algo": "lokr", "linear_dim": 100, "linear_alpha": 5}, ""),
    "lokr, whole by wish": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 5, "full_matrix": True}, ""),
    "lokr, the larger first": (
        {"algo": "lokr", "linear_dim": 1, "linear_alpha": 5, "unbalanced_factorization": True},
        AS_PAIR,
    ),
}


REFUSED = {
    "dora of columns": (
        {"algo": "lora", "linear_dim": 2, "dora_wd": True, "wd_on_output": False},
        "scale columns instead",
    ),
    "loha with dora": ({"algo": "loha", "linear_dim": 2, "dora_wd": True}, "DoRA of LoRA alone"),
    "lokr with dora": ({"algo": "lokr", "linear_dim": 2, "dora_wd": True}, "DoRA of LoRA alone"),
    "full": ({"algo": "full"}, "a difference of the whole weight"),
    "norms": ({"algo": "lora", "train_norm": True}, "a difference of the whole bias of a norm"),
    "glora": ({"algo": "glora"}, "GLoRA's"),
    "ia3": ({"algo": "ia3"}, "(IA)³'s"),
    "oft": ({"algo": "diag-oft", "linear_dim": 2}, "an orthogonal transform"),
}
WRITTEN = [*FROM_LYCORIS, *REFUSED]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tensor]:
    """Return a folder with what LyCORIS wrote for each case, and the model and input that it was for."""
    folder = tmp_path_factory.mktemp("theirs")
    model, x = small()
    torch.save((model, x), folder / "base.pt")
    apart.run("lycoris", WRITE, folder, json.dumps([settings for settings, _ in (FROM_LYCORIS | REFUSED).values()]))
    return folder, model, x


@pytest.mark.parametrize("case", FROM_LYCORIS)
def test_lorank_reads_what_lycoris_writes(theirs: tuple[Path, Any, Tensor], case: str) -> None:
    folder, base, x = theirs
    model, number = copy.deepcopy(base), WRITTEN.index(case)
    wanted = torch.load(folder / "outputs.pt")[number]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        plan = lorank.load(model, folder / f"{number}.safetensors")
    assert [place.name for place in plan.places] == layers_of(base)
    assert_same(model(x), wanted)
    assert not torch.allclose(base(x), wanted, atol=1e-2)
    remark = FROM_LYCORIS[case][1]
    assert [remark in str(w.message) for w in warned] == ([True] if remark else []), [str(w.message) for w in warned]


@pytest.mark.parametrize("case", REFUSED)
def test_what_lorank_has_not_is_refused(theirs: tuple[Path, Any, Tensor], case: str) -> None:
    folder, base, _ = theirs
    with pytest.raises(AdapterError, match=re.escape(REFUSED[case][1])):
        lorank.load(copy.deepcopy(base), folder / f"{WRITTEN.index(case)}.safetensors")


ALL: dict[str, tuple[Spec, str, bool]] = {  # the kind of LyCORIS's modules, and whether it merges them right
    "lora": (LoRA(3, alpha=5), "LoConModule", True),
    "rank-stabilised": (LoRA(3, alpha=5, rank_stabilised=True), "LoConModule", True),
    "dora": (DoRA(3, alpha=5), "LoConModule", True),
    "loha": (LoHa(3, alpha=3), "LohaModule", True),
    "loha, scaled": (LoHa(3, alpha=5), "LohaModule", False),
    "lokr": (LoKr(1, alpha=1), "LokrModule", True),
    "lokr, scaled": (LoKr(1, alpha=5), "LokrModule", False),
    "lokr of a factor": (LoKr(1, alpha=1, factor=2), "LokrModule", True),
    "lokr of both": (LoKr(1, alpha=5, decompose_both=True), "LokrModule", False),
    "lokr, whole": (LoKr(100, alpha=5), "LokrModule", True),
    "lokr of an uneven factor": (LoKr(1, alpha=5, factor=8), "LoConModule", True),
    "pissa": (PiSSA(2, alpha=3), "LoConModule", True),
    "vera": (VeRA(4), "LoConModule", True),
    "adalora": (AdaLoRA(4, alpha=3, target_rank=2), "LoConModule", True),
}
GROUPED: dict[str, tuple[Spec, str, bool]] = {
    "lora, grouped": (LoRA(2, alpha=3), "LoConModule", True),
    "dora, grouped": (DoRA(2, alpha=3), "LoConModule", True),
    "loha, grouped": (LoHa(2, alpha=2), "LohaModule", True),
    "lokr, grouped": (LoKr(1, alpha=1), "LokrModule", True),
    "lokr, whole and grouped": (LoKr(16, alpha=8), "LoConModule", True),
}
TO_LYCORIS = ALL | GROUPED


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Return by case: the base, the adapted model, an input, what saving warned of, and what LyCORIS made of it."""
    folder = tmp_path_factory.mktemp("ours")
    made = {}
    for number, (case, (spec, _, _)) in enumerate(TO_LYCORIS.items()):
        base, x = grouped() if case in GROUPED else small()
        model = copy.deepcopy(base)
        lorank.adapt(model, spec, layers_of(model))
        models.disturb(model)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            lorank.save(model, folder / f"{number}.safetensors", format="kohya")
        torch.save((base, x), folder / f"base{number}.pt")
        made[case] = base, model, x, [str(w.message) for w in warned], folder / f"{number}.safetensors"
    apart.run("lycoris", READ, folder, len(made))
    outputs = torch.load(folder / "outputs.pt")
    return {case: (*values, *outputs[number]) for number, (case, values) in enumerate(made.items())}


@pytest.mark.parametrize("case", TO_LYCORIS)
def test_lycoris_reads_what_lorank_writes(ours: dict[str, tuple[Any, ...]], case: str) -> None:
    _, kind, merges = TO_LYCORIS[case]
    base, model, x, warned, path, running, merged, kinds = ours[case]
    wanted = model(x)
    assert not torch.allclose(base(x), wanted, atol=1e-2)
    assert_same(running, wanted)
    # LyCORIS takes the scale of LoHa and LoKr twice where it merges; that is said.
    assert torch.allclose(merged, wanted, rtol=1e-5, atol=1e-5) == merges
    assert any("multiplies with alpha / rank twice" in warning for warning in warned) == (not merges)
    assert kinds == ([kind, "LokrModule"] if case == "lokr, whole and grouped" else [kind])
    again = copy.deepcopy(base)
    lorank.load(again, path)
    assert_same(again(x), wanted)


def test_diffusion_models(tmp_path: Path) -> None:
    found = json.loads(apart.run("lycoris", DIFFUSION, tmp_path).splitlines()[-1])
    for name, other in (("unet", "lora_te"), ("text", "lora_unet")):
        assert found[name] < 1e-5 and found[f"{name} of both"] < 1e-5 and found[f"{name} changed"] > 1e-2
        (warned,) = found[f"{name} warned"]
        assert f"layers {other}_… are for another model, and were left out" in warned
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "unet.safetensors"))
    assert all(key.startswith("lora_te_text_model_encoder_") for key in load_file(tmp_path / "text.safetensors"))
