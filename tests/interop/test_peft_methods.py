"""Methods beside LoRA compute what PEFT's do, in a forward, a training step and a merge, and files go both ways."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import EVA, AdaLoRA, AdapterError, DoRA, LoHa, LoKr, LoRA, LoRAFA, VeRA
from lorank.variants import Spec
from lorank.variants.lokr import divided

from .. import models
from .test_peft import output, pytestmark, read_by_peft  # noqa: F401  # the marks hold here too


class Net(nn.Module):
    """A layer of some kind, and a linear one on the mean over its places."""

    def __init__(self, layer: nn.Module, channels: int, last: bool = True):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(channels, 5)
        self.last = last  # channels are the last dimension of the layer's output

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(torch.tanh(y.mean(1) if self.last else y.flatten(2).mean(-1)))


def conv1d() -> Any:
    layer = Conv1D(12, 10)
    nn.init.normal_(layer.bias)
    return layer


# {kind: (model, shape of its input)}
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Net(nn.Linear(10, 12), 12), (3, 4, 10)),
    "conv1d-hf": (lambda: Net(conv1d(), 12), (3, 4, 10)),
    "embedding": (lambda: Net(nn.Embedding(models.VOCABULARY, 12), 12), (3, 7)),
    "conv-1d": (lambda: Net(nn.Conv1d(6, 8, 3, padding=1), 8, last=False), (3, 6, 9)),
    "conv-2d": (lambda: Net(nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(0, 1)), 8, last=False), (3, 6, 7, 8)),
    "conv-3d": (lambda: Net(nn.Conv3d(4, 6, (1, 2, 3), padding=1), 6, last=False), (3, 4, 4, 3, 4)),
}
LYCORIS = ["linear", "conv-1d", "conv-2d"]
TARGETS = ["layer", "head"]
Config = Callable[[list[str]], peft.PeftConfig]

# {method: (ours, PEFT's, the kinds of layers that PEFT has it for)}
METHODS: dict[str, tuple[Spec, Config, list[str]]] = {
    "dora": (
        DoRA(rank=3, alpha=4),
        lambda targets: peft.LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=targets),
        list(KINDS),
    ),
    "dora-rank-stabilised": (
        DoRA(rank=3, alpha=4, rank_stabilised=True),
        lambda targets: peft.LoraConfig(r=3, lora_alpha=4, use_dora=True, use_rslora=True, target_modules=targets),
        ["linear", "conv-2d"],
    ),
    "vera": (VeRA(rank=5), lambda targets: peft.VeraConfig(r=5, target_modules=targets), ["linear", "conv1d-hf"]),
    "adalora": (
        AdaLoRA(rank=3, alpha=4, target_rank=2),
        lambda targets: peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=4, total_step=10, orth_reg_weight=0.0, target_modules=targets
        ),
        ["linear", "conv1d-hf", "conv-2d"],
    ),
    "loha": (
        LoHa(rank=3, alpha=4),
        lambda targets: peft.LoHaConfig(r=3, alpha=4, target_modules=targets),
        LYCORIS,
    ),
    "lokr": (
        LoKr(rank=1, alpha=2),
        lambda targets: peft.LoKrConfig(r=1, alpha=2, target_modules=targets),
        LYCORIS,
    ),
    "lokr-both": (
        LoKr(rank=1, alpha=2, decompose_both=True, factor=5),
        lambda targets: peft.LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=5, target_modules=targets),
        LYCORIS,
    ),
    "lokr-whole": (
        LoKr(rank=8, alpha=4),
        lambda targets: peft.LoKrConfig(r=8, alpha=4, target_modules=targets),
        ["linear", "conv-2d"],
    ),
}
GRID = [(method, kind) for method, (_, _, kinds) in METHODS.items() for kind in kinds]


def inputs(kind: str) -> Tensor:
    shape = KINDS[kind][1]
    return models.ids(*shape) if kind == "embedding" else torch.randn(shape)


def wrapped(base: nn.Module, config: peft.PeftConfig) -> Any:
    """Return PEFT's model of a copy of the base, with an adapter that has an effect, in train mode."""
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def loaded(base: nn.Module, path: Path) -> Any:
    """Return a copy of the base with the adapter of a file, in train mode; a warning is an error."""
    model = copy.deepcopy(base)
    lorank.load(model, path)
    return model.train()


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_same_tensors(one: Path, other: Path) -> None:
    """Compare the tensors of two files."""
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method, kind", GRID)
def test_forward_step_and_merge_are_those_of_peft(method: str, kind: str, optimiser: Any, tmp_path: Path) -> None:
    base, x = KINDS[kind][0](), inputs(kind)
    theirs = wrapped(base, METHODS[method][1](TARGETS))
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = loaded(base, tmp_path / "start")
    assert_near(ours(x), theirs(x))
    assert not torch.allclose(ours(x), base(x), atol=1e-3)
    trained = [p for p in theirs.parameters() if p.requires_grad], list(lorank.adapter_parameters(ours).values())
    assert sum(p.numel() for p in trained[0]) == sum(p.numel() for p in trained[1])
    options: dict[str, Any] = (
        {} if optimiser is torch.optim.SGD else {"eps": 1e-3}
    )  # or a gradient of 1e-9 would decide a whole step
    for model, parameters in zip((theirs, ours), trained, strict=True):
        stepping = optimiser(parameters, lr=0.05, **options)
        model(x).square().sum().backward()
        stepping.step()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    lorank.save(ours, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    y = ours(x)
    assert_near(y, theirs(x))
    lorank.merge(ours)
    assert_near(ours(x), theirs.merge_and_unload()(x))
    assert_near(ours(x), y)


@pytest.mark.parametrize("method, kind", GRID)
def test_peft_reads_what_lorank_writes(method: str, kind: str, tmp_path: Path) -> None:
    base, x = KINDS[kind][0](), inputs(kind)
    model = copy.deepcopy(base)
    targets = ["layer"] if kind == "conv1d-hf" else TARGETS  # PEFT warns of models with both kinds
    lorank.adapt(model, METHODS[method][0], targets)
    models.disturb(model)
    lorank.save(model, tmp_path)
    theirs = read_by_peft(copy.deepcopy(base), tmp_path)
    assert_near(theirs(x), model(x))
    assert not torch.allclose(model(x), base(x), atol=1e-3)
    theirs.save_pretrained(str(tmp_path / "again"))  # pyright: ignore[reportCallIssue]
    assert_same_tensors(tmp_path, tmp_path / "again")


LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_files_of_whole_models_go_both_ways(method: str, tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    spec, config, _ = METHODS[method]
    theirs = wrapped(base, config(LLAMA)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path / "theirs")
    assert len(plan.places) == 6
    assert_near(output(model, x), output(theirs, x))
    lorank.save(model, tmp_path / "ours")
    assert_near(output(read_by_peft(copy.deepcopy(base), tmp_path / "ours"), x), output(theirs, x))
    varied = copy.deepcopy(base)
    ranks: dict[str, Any] = {} if isinstance(spec, VeRA | AdaLoRA) else {"v_proj": 1, "layers.1.*.q_proj": 2}
    alphas: dict[str, Any] = {} if isinstance(spec, VeRA | AdaLoRA) else {"down_proj": 3}
    lorank.adapt(varied, spec, LLAMA, ranks=ranks, alphas=alphas)
    models.disturb(varied)
    lorank.save(varied, tmp_path / "varied")
    assert_near(output(read_by_peft(copy.deepcopy(base), tmp_path / "varied"), x), output(varied, x))


def test_methods_that_are_lora_once_they_are_trained_go_over_as_lora(tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    base.model.embed_tokens.weight.data[:, :4] *= 8  # inputs of the first layers then vary in few directions
    for spec in (LoRAFA(rank=3, alpha=6), EVA(rank=3, alpha=6)):
        model: Any = copy.deepcopy(base)
        lorank.adapt(model, spec, LLAMA)
        if isinstance(spec, EVA):
            ranks = lorank.calibrate(model, model, [models.ids(8, 9)])
            assert sum(ranks.values()) == 18 and len(set(ranks.values())) > 1
        models.disturb(model)
        path = tmp_path / spec.variant
        lorank.save(model, path)
        assert_near(output(read_by_peft(copy.deepcopy(base), path), x), output(model, x))
        again = loaded(base, path)
        assert torch.equal(output(again, x), output(model, x))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_beside_dora_go_both_ways(bias: Any, tmp_path: Path) -> None:
    base, x = KINDS["linear"][0](), inputs("linear")
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["layer"], bias=bias)
    theirs = wrapped(base, config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = loaded(base, tmp_path / "theirs")
    assert_near(model(x), theirs(x))
    lorank.save(model, tmp_path / "ours")
    assert_near(read_by_peft(copy.deepcopy(base), tmp_path / "ours")(x), theirs(x))


@pytest.mark.parametrize("method", ["dora", "loha", "lokr"])
def test_patterns_of_ranks_that_peft_wrote_are_followed(method: str, tmp_path: Path) -> None:
    base, x = models.llama(), models.ids()
    config: Any = METHODS[method][1](LLAMA)
    config.rank_pattern = {"v_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 6}
    config.alpha_pattern = {"layers.0.self_attn.v_proj": 1, "q_proj": 5}
    theirs = wrapped(base, config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = copy.deepcopy(base)
    plan = lorank.load(model, tmp_path)
    assert {p.name.removeprefix("model.layers."): p.spec.rank for p in plan.places}["1.mlp.down_proj"] == 6
    assert_near(output(model, x), output(theirs, x))


def test_what_peft_would_misread_it_refuses(tmp_path: Path) -> None:
    grouped = Net(nn.Conv2d(6, 9, 3, groups=3), 9, last=False)
    for base, spec in ((KINDS["conv-1d"][0](), LoKr(rank=8)), (grouped, AdaLoRA(rank=2, target_rank=1))):
        model = copy.deepcopy(base)
        lorank.adapt(model, spec, TARGETS)
        models.disturb(model)
        path = tmp_path / spec.variant
        lorank.save(model, path)
        with pytest.raises(ValueError, match="layers_pattern"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path))  # pyright: ignore[reportArgumentType]
        assert json.loads((path / "adapter_config.json").read_text())["layers_pattern"] == [
            "layer: only lorank reads this layer"
        ]
        x = torch.randn(2, 6, 7) if isinstance(spec, LoKr) else torch.randn(2, 6, 7, 7)
        assert torch.equal(loaded(base, path)(x), model(x))


def test_sides_are_divided_as_in_peft() -> None:
    for size in [*range(1, 130), 768, 2**20, 3 * 7 * 11 * 13, 10007]:
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 100):
            assert divided(size, factor) == factorization(size, factor), (size, factor)


def test_a_kronecker_product_that_peft_forms_along_other_dimensions_is_refused(tmp_path: Path) -> None:
    base, x = KINDS["conv-1d"][0](), inputs("conv-1d")
    theirs = wrapped(base, peft.LoKrConfig(r=8, alpha=4, target_modules=["layer"]))
    layer: Any = theirs.base_model.model.layer
    C, D = layer.lokr_w1["default"], layer.lokr_w2["default"]
    meant = 0.5 * torch.einsum("ij,klm->ikjlm", C, D).reshape(8, 6, 3)  # what LyCORIS computes
    assert not torch.allclose(layer.get_delta_weight("default"), meant, atol=1e-2)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"lokr_w2 is \(4, 3, 3\), of a Conv1d: PEFT multiplies it"):
        lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []
    assert theirs(x).shape == base(x).shape


@pytest.mark.parametrize("effective", ["loha", "lokr"])
def test_a_decomposition_of_kernels_that_lorank_has_not_is_refused(effective: str, tmp_path: Path) -> None:
    base = KINDS["conv-2d"][0]()
    make: Any = peft.LoHaConfig if effective == "loha" else peft.LoKrConfig
    wrapped(base, make(r=1, use_effective_conv2d=True, target_modules=["layer"])).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"hada_t1|lokr_t2|use_effective_conv2d"):
        lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []


def test_a_magnitude_without_use_dora_is_refused(tmp_path: Path) -> None:
    """As torchtune writes them: PEFT leaves the magnitudes out, without a word."""
    base = models.llama()
    theirs = wrapped(base, peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"a DoRA magnitude, and adapter_config.json does not say use_dora") as error:
        lorank.load(base, tmp_path)
    assert str(error.value).count("a DoRA magnitude") == 2
    assert lorank.adapter_names(base) == []
    settings["use_dora"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lorank.load(base, tmp_path)


@pytest.mark.parametrize("method", ["dora", "vera", "adalora", "loha", "lokr"])
def test_a_tensor_that_a_file_lacks_is_named(method: str, tmp_path: Path) -> None:
    base = KINDS["linear"][0]()
    wrapped(base, METHODS[method][1](TARGETS)).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if ".layer." in key]:
        save_file({other: tensor for other, tensor in tensors.items() if other != key}, file)
        with pytest.raises(AdapterError, match=r"layer: .*lacks"):
            lorank.load(base, tmp_path)
    assert lorank.adapter_names(base) == []


def test_a_file_of_vera_needs_its_pair_and_the_one_of_its_seed(tmp_path: Path) -> None:
    base = KINDS["linear"][0]()
    file = tmp_path / "adapter_model.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, that it will rely on the seed
        config = peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=False)
        wrapped(base, config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"save it with save_projection=True"):
        lorank.load(base, tmp_path)
    wrapped(base, peft.VeraConfig(r=4, target_modules=TARGETS, projection_prng_key=3)).save_pretrained(str(tmp_path))
    lorank.load(copy.deepcopy(base), tmp_path)
    tensors = load_file(file)
    tensors["base_model.vera_A"][0, 0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"random pair is not the one that the seed 3 gives"):
        lorank.load(base, tmp_path)


def test_settings_that_a_minimal_configuration_leaves_out_are_those_of_peft(tmp_path: Path) -> None:
    base, x = KINDS["linear"][0](), inputs("linear")
    defaults: dict[str, Any] = {
        "ADALORA": peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
        "LOHA": peft.LoHaConfig(target_modules=TARGETS),
        "LOKR": peft.LoKrConfig(target_modules=TARGETS),
        "VERA": peft.VeraConfig(target_modules=TARGETS),
    }
    for kind, config in defaults.items():
        theirs = wrapped(base, config)
        theirs.save_pretrained(str(tmp_path))
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "target_modules": TARGETS}))
        model = loaded(base, tmp_path)
        assert_near(model(x), theirs(x))


def test_lora_and_dora_of_one_file_are_told_apart(tmp_path: Path) -> None:
    base, x = KINDS["linear"][0](), inputs("linear")
    for use_dora, spec in ((False, LoRA), (True, DoRA)):
        theirs = wrapped(base, peft.LoraConfig(r=2, use_dora=use_dora, target_modules=TARGETS))
        theirs.save_pretrained(str(tmp_path))
        model = copy.deepcopy(base)
        assert type(lorank.load(model, tmp_path).spec) is spec
        assert_near(model(x), theirs(x))
