"""Where methods start, what is dropped and how fast is learnt: as in PEFT, from the same weights and batches."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

import lorank
from lorank import EVA, AdaLoRA, AdapterError, DoRA, LoRA, LoRAFA, LoRAGA, OLoRA, PiSSA, VeRA
from lorank.tree import adapted_layers
from lorank.variants import VeRAAdapter
from lorank.variants.eva import PrincipalDirections

from .. import models
from .test_peft import output, pytestmark, read_by_peft
from .test_peft_methods import KINDS as ALL_KINDS, TARGETS, assert_near, inputs, loaded, wrapped

_OF_PEFT = [
    "PiSSA changes the base weights",
    ".*changes the base weight",
    "Full backward hook is firing",
    "lora with eva initialization used with low_cpu_mem_usage=False",
    "Adapter .default.. 2 LoRA tensor.s. have invalid shape",  # of a layer of which AdaLoRA keeps nothing
]
pytestmark = [*pytestmark, *(pytest.mark.filterwarnings(f"ignore:{text}") for text in _OF_PEFT)]
LLAMA = ["q_proj", "v_proj", "down_proj"]


def leaves(model: nn.Module) -> dict[str, Any]:
    """Return the only update of every adapted layer by its name."""
    return {name: layer.adapters["default"] for name, layer in adapted_layers(model).items()}


def theirs_by_name(model: Any) -> dict[str, Any]:
    """Return PEFT's layers by their names in the base."""
    found = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {name: module for name, module in found.items() if hasattr(module, "lora_A")}


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """Return A and B of one of PEFT's layers."""
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


STARTS: dict[str, Any] = {"pissa": PiSSA, "olora": OLoRA}


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("method, kind", [("pissa", "linear"), ("pissa", "conv1d-hf"), ("olora", "linear")])
def test_factors_of_the_weight_start_and_learn_as_in_peft(
    method: str, kind: str, stabilised: bool, tmp_path: Path
) -> None:
    base, x = ALL_KINDS[kind][0](), inputs(kind)
    spec = STARTS[method](rank=3, alpha=4, rank_stabilised=stabilised)
    targets = ["layer"] if kind == "conv1d-hf" else TARGETS  # PEFT warns of models with both kinds
    config = peft.LoraConfig(r=3, lora_alpha=4, use_rslora=stabilised, target_modules=targets)
    config.init_lora_weights = method  # pyright: ignore[reportAttributeAccessIssue]
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).train()  # pyright: ignore[reportArgumentType]
    ours: Any = copy.deepcopy(base).train()
    lorank.adapt(ours, spec, targets)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    other = theirs_by_name(theirs)
    for name, leaf in leaves(ours).items():
        A, B = factors(other[name])
        assert_near(leaf.B @ leaf.A, B @ A)
        assert torch.equal(leaf.A, leaf.A0) and torch.equal(leaf.B, leaf.B0)
        leaf.start_from(A, B)  # the signs of singular vectors may differ
    assert_near(ours(x), base(x))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = method
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        stepping = torch.optim.AdamW(trained, lr=0.02, eps=1e-3)
        for _ in range(3):
            stepping.zero_grad()
            model(x).square().sum().backward()
            stepping.step()
    for name, leaf in leaves(ours).items():
        A, B = factors(other[name])
        assert_near(leaf.A, A)
        assert_near(leaf.B, B)
    assert_near(ours(x), theirs(x))
    assert not torch.allclose(ours(x), base(x), atol=1e-2)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in before.items())
    goes_over_as_lora(base, ours, theirs, x, tmp_path)


def goes_over_as_lora(base: nn.Module, ours: Any, theirs: Any, x: Tensor, path: Path) -> None:
    """Write ours for PEFT and theirs for lorank, converted from the start in `path`; and theirs as it is, in vain."""
    y = ours.eval()(x)
    lorank.save(ours, path / "ours")
    again = read_by_peft(copy.deepcopy(base), path / "ours")
    assert_near(again(x), y)
    assert {layer.r["default"] for layer in theirs_by_name(again).values()} == {2 * leaves(ours)["layer"].spec.rank}
    unconverted = copy.deepcopy(theirs.peft_config["default"])
    theirs.save_pretrained(str(path / "as-it-is"))
    with pytest.raises(AdapterError, match=r"belongs to a base from which PEFT takes the adapter's start away"):
        lorank.load(copy.deepcopy(base), path / "as-it-is")
    theirs.peft_config["default"] = unconverted
    theirs.save_pretrained(str(path / "theirs"), path_initial_model_for_weight_conversion=str(path / "start"))
    model = loaded(base, path / "theirs").eval()
    assert {leaf.spec.rank for leaf in leaves(model).values()} == {2 * leaves(ours)["layer"].spec.rank}
    assert_near(model(x), y)
    lorank.merge(ours)
    assert_near(ours(x), y)


def test_a_start_from_gradients_has_the_directions_of_peft(tmp_path: Path) -> None:
    base = ALL_KINDS["linear"][0]()
    batches = [inputs("linear") for _ in range(3)]
    x = batches[0]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x.flatten(1)[:, :5]).square().mean()

    settings: dict[str, Any] = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, **settings)
    prepared: Any = copy.deepcopy(base)

    def run() -> None:
        for x in batches:
            loss(prepared, x).backward()

    preprocess_loraga(prepared, config, run)
    theirs: Any = peft.get_peft_model(prepared, config)
    ours: Any = copy.deepcopy(base)
    lorank.adapt(ours, LoRAGA(rank=2, alpha=4), TARGETS)
    assert lorank.calibrate(ours, lambda x: loss(ours, x), batches) == {"layer": 2, "head": 2}
    assert_near(ours(x), base(x))
    assert_near(theirs(x), base(x))
    other = theirs_by_name(theirs)
    for name, leaf in leaves(ours).items():
        A, B = factors(other[name])
        size = leaf.B.shape[0] ** 0.25 / 16**0.5
        for found, expected in ((leaf.A, A), (leaf.B.T, B.T)):
            cosines = torch.cosine_similarity(found, expected)
            assert_near(cosines.abs(), torch.ones(2))
            assert_near(found @ found.T, size**2 * torch.eye(2))  # the paper's lengths, where PEFT has its own
        leaf.start_from(A, B)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = "lora_ga"
    for model in (ours.train(), theirs.train()):
        stepping = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        loss(model, x).backward()
        stepping.step()
    assert_near(ours(x), theirs(x))
    assert not torch.allclose(ours(x), base(x), atol=1e-3)
    goes_over_as_lora(base, ours, theirs, x, tmp_path)


class Chain(nn.Module):
    """Layers of which each has inputs of its own, that vary in fewer and fewer directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.config = {"model_type": "chain"}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x * torch.arange(1, 17) ** -(0.5 + i)))
        return x


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_start_from_inputs_has_the_directions_and_ranks_of_peft(rho: float, masked: bool, tmp_path: Path) -> None:
    base, ids = Chain(), models.ids(16, 12)
    mask = torch.ones_like(ids)
    if masked:
        mask[:, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    targets = [f"layers.{i}" for i in range(3)]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho)
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    ours: Any = copy.deepcopy(base)
    lorank.adapt(ours, EVA(rank=3, alpha=6, rho=rho), targets)
    ranks = lorank.calibrate(ours, lambda batch: ours(**batch), [batch], mask=lambda batch: batch["attention_mask"])
    other = theirs_by_name(theirs)
    assert ranks == {name: layer.r["default"] for name, layer in other.items()}
    assert sum(ranks.values()) == 9 and (rho == 1 or len(set(ranks.values())) > 1)
    for name, leaf in leaves(ours).items():
        A, B = factors(other[name])
        assert not B.any() and not leaf.B.any()
        cosines = torch.cosine_similarity(leaf.A, A)
        torch.testing.assert_close(cosines.abs(), torch.ones(ranks[name]), rtol=0, atol=2e-3)
        assert leaf.scale == other[name].scaling["default"] == 2
    models.disturb(ours)
    lorank.save(ours, tmp_path / "ours")
    assert_near(read_by_peft(copy.deepcopy(base), tmp_path / "ours")(ids), ours(ids))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert {place.name: place.spec.rank for place in lorank.load(base, tmp_path / "theirs").places} == ranks


def test_directions_found_batch_by_batch_are_those_of_peft() -> None:
    shape = torch.randn(10, 10) * torch.linspace(3, 0.1, 10)
    batches = [torch.randn(rows, 10) @ shape + torch.randn(10) for rows in (30, 7, 12)]
    ours, theirs = PrincipalDirections(5), IncrementalPCA(n_components=5)
    for batch in batches:
        ours.add(batch)
        theirs.partial_fit(batch)
        torch.testing.assert_close(ours.shares, theirs.explained_variance_ratio_.float(), rtol=1e-4, atol=1e-5)
        cosines = torch.cosine_similarity(ours.directions, theirs.components_.float())
        torch.testing.assert_close(cosines.abs(), torch.ones(5), rtol=0, atol=1e-4)


def test_the_random_pair_is_that_of_peft_bit_for_bit() -> None:
    base = models.llama()
    for seed, rank in ((0, 256), (3, 7)):
        config = peft.VeraConfig(r=rank, projection_prng_key=seed, target_modules=LLAMA)
        theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
        ours = copy.deepcopy(base)
        lorank.adapt(ours, VeRA(rank=rank, seed=seed), LLAMA)
        leaf = leaves(ours)["model.layers.0.mlp.down_proj"]
        assert isinstance(leaf, VeRAAdapter) and leaf.spec.projection == (32, 48)
        A, B = leaf.spec.pair(*leaf.spec.projection)
        assert torch.equal(A, theirs.base_model.vera_A["default"])
        assert torch.equal(B, theirs.base_model.vera_B["default"])
        assert (
            leaf.d.unique().tolist()
            == theirs.base_model.model.model.layers[0].mlp.down_proj.vera_lambda_d["default"].unique().tolist()
        )
        assert not leaf.b.any()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_magnitudes_start_as_in_peft(kind: str) -> None:
    base = ALL_KINDS[kind][0]()
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)  # pyright: ignore[reportArgumentType]
    ours: Any = copy.deepcopy(base)
    lorank.adapt(ours, DoRA(rank=2), TARGETS)
    for name, leaf in leaves(ours).items():
        magnitude = theirs_by_name(theirs)[name].lora_magnitude_vector["default"].weight
        torch.testing.assert_close(leaf.magnitude, magnitude.flatten(), rtol=1e-6, atol=1e-6)


def budgeted(steps: int, interval: int) -> tuple[nn.Module, Any, Any, lorank.RankBudget]:
    """Return a base, theirs and ours of it with equal adapters and schedules, and the budget of ours."""
    base = models.llama()
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=6, deltaT=interval, total_step=steps, lora_alpha=8, target_modules=LLAMA
    )
    theirs = wrapped(base, config)
    ours: Any = copy.deepcopy(base)
    spec = AdaLoRA(rank=4, target_rank=2, alpha=8, warmup=2 / steps, settle=6 / steps, interval=interval)
    lorank.adapt(ours, spec, LLAMA)
    with torch.no_grad():
        for name, leaf in leaves(ours).items():
            layer = theirs.get_submodule(f"base_model.model.{name}")
            leaf.A.copy_(layer.lora_A["default"])
            leaf.B.copy_(layer.lora_B["default"])
            leaf.E.copy_(layer.lora_E["default"].flatten())
    return base, theirs, ours.train(), lorank.RankBudget(ours, steps)


@pytest.mark.parametrize("interval", [1, 3])
def test_the_budget_drops_the_triplets_that_peft_drops(interval: int, tmp_path: Path) -> None:
    base, theirs, ours, budget = budgeted(20, interval)
    steppers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2) for model in (theirs, ours)]
    left = []
    for index in range(1, 24):
        x = models.ids(4, 9)
        for stepper in steppers:
            stepper.zero_grad()
        loss = theirs.base_model(input_ids=x, labels=x).loss  # with PEFT's penalty
        own = ours(input_ids=x, labels=x).loss + budget.penalty()
        assert_near(own, loss)
        loss.backward()
        own.backward()
        for stepper in steppers:
            stepper.step()
        theirs.base_model.update_and_allocate(index)
        left.append(budget.update(index))
        for name, leaf in leaves(ours).items():
            layer = theirs.get_submodule(f"base_model.model.{name}")
            E = layer.lora_E["default"].flatten()
            assert torch.equal(leaf.E != 0, E != 0), (index, name)
            assert_near(leaf.E, E)
    assert left[:2] == [24, 24] and left[13:] == [12] * 10 and left[5] == 15
    x = models.ids()
    theirs.eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = loaded(base, tmp_path / "theirs").eval()
    assert_near(output(model, x), output(theirs, x))
    ranks = [leaf.spec.rank for leaf in leaves(model).values()]
    kept = [int(leaf.E.count_nonzero()) for leaf in leaves(ours).values()]
    assert ranks == [max(rank, 1) for rank in kept] and len(set(ranks)) > 1
    lorank.save(ours, tmp_path / "ours")
    assert_near(output(read_by_peft(copy.deepcopy(base), tmp_path / "ours"), x), output(theirs, x))


def test_a_layer_of_which_peft_kept_no_triplet_loads(tmp_path: Path) -> None:
    base, x = ALL_KINDS["linear"][0](), inputs("linear")
    theirs = wrapped(base, peft.AdaLoraConfig(init_r=3, total_step=8, lora_alpha=4, target_modules=TARGETS))
    kept = {"layer.lora_E.default": [False] * 3, "head.lora_E.default": [True, False, True]}
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, kept)
    theirs.peft_config["default"].rank_pattern = kept
    y = theirs(x)
    theirs.save_pretrained(str(tmp_path))
    model = loaded(base, tmp_path)
    assert {name: leaf.spec.rank for name, leaf in leaves(model).items()} == {"layer": 1, "head": 2}
    assert_near(model(x), y)
    lorank.merge(model)
    assert_near(model(x), y)


def test_rates_of_lora_plus_are_those_of_peft() -> None:
    """Where they differ on purpose: PEFT gives everything in an embedding 1e-6, and a magnitude the rate of B."""
    base = models.llama()
    for spec in (LoRA(rank=2), DoRA(rank=2)):
        config = peft.LoraConfig(r=2, target_modules=[*LLAMA, "embed_tokens"], use_dora=isinstance(spec, DoRA))
        theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
        optimiser = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
        names = {id(parameter): name for name, parameter in theirs.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in optimiser.param_groups for p in group["params"]}
        ours = copy.deepcopy(base)
        lorank.adapt(ours, spec, [*LLAMA, "embed_tokens"])
        own_names = {id(p): name for name, p in lorank.adapter_parameters(ours).items()}
        own = {own_names[id(p)]: g["lr"] for g in lorank.parameter_groups(ours, 1e-3, 8) for p in g["params"]}
        assert own.keys() == lorank.adapter_parameters(ours).keys()
        assert len(own) == len(rates)
        for name, rate in own.items():
            layer, _, kind = name.partition(".adapters.default.")
            end = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}.get(kind)
            if "embed_tokens" in name or end is None:
                assert rate == (8e-3 if kind == "B" else 1e-3)
            else:
                assert rate == rates[f"base_model.model.{layer}.{end}"]
        assert {rate for name, rate in rates.items() if "lora_embedding" in name} == {1e-6}


def test_steps_of_lora_fa_are_those_of_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With A of orthogonal rows of one length, on which PEFT's projection of B's gradient is a number."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would round that gradient to three digits
    base, x = ALL_KINDS["linear"][0](), inputs("linear")
    ours: Any = copy.deepcopy(base)
    lorank.adapt(ours, LoRAFA(rank=3, alpha=6), TARGETS)
    lorank.save(ours, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True)
    starts = {name: leaf.A.clone() for name, leaf in leaves(ours).items()}
    optimisers = [
        create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=0.01),
        torch.optim.AdamW(lorank.adapter_parameters(ours).values(), lr=0.01, weight_decay=0.0),
    ]
    for _ in range(4):
        for model, optimiser in zip((theirs.train(), ours.train()), optimisers, strict=True):
            optimiser.zero_grad()
            (1e4 * model(x).square().sum()).backward()  # beside which the two's unequal epsilons are nothing
            optimiser.step()
    for name, leaf in leaves(ours).items():
        A, B = factors(theirs_by_name(theirs)[name])
        assert torch.equal(leaf.A, starts[name]) and torch.equal(A, starts[name])
        torch.testing.assert_close(leaf.B, B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(x), base(x), atol=1e-3)
