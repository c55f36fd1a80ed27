"""TIES and DARE as their papers have them, on ΔW: against a plain rewriting of each, and in their properties."""

import pytest
import torch
from torch import Tensor

import lorank
from lorank import AdapterError, arithmetic
from lorank.arithmetic import sparse

from .. import models
from .dense import adapter, close, content, deltas, nearest, random_content


def ties_of_the_paper(updates: list[Tensor], density: float) -> Tensor:
    """Algorithm 1 of Yadav et al. number by number, with λ = 1."""
    trimmed = []
    for W in updates:
        smallest = W.abs().flatten().sort(descending=True).values[round(density * W.numel()) - 1]
        trimmed.append(W * (W.abs() >= smallest))
    merged = torch.zeros_like(updates[0])
    for place in torch.cartesian_prod(*map(torch.arange, merged.shape)).tolist():
        values = [float(W[tuple(place)]) for W in trimmed]
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [value for value in values if value * sign > 0]
        merged[tuple(place)] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
def test_ties_is_the_papers(density: float) -> None:
    named = {name: random_content({"x": (9, 7)}, 2, seed) for seed, name in enumerate("abc")}
    dense = [deltas(adapter)["x"] for adapter in named.values()]
    expected = ties_of_the_paper(dense, density)
    found = sparse.combined_dense(dense, "ties", density, 0, "x")
    torch.testing.assert_close(found, expected)
    made, report = arithmetic.combine({n: (c, 1) for n, c in named.items()}, method="ties", density=density, rank=7)
    assert close(deltas(made), {"x": expected}, 1e-6)  # of full rank
    assert report.error < 1e-6
    made, report = arithmetic.combine({n: (c, 1) for n, c in named.items()}, method="ties", density=density)
    best, error = nearest(expected, 2)  # the largest rank of the three
    assert close(deltas(made), {"x": best}, 1e-5) and report.rows[0].error == pytest.approx(error, rel=1e-5)


def test_negative_weights_vote_for_the_opposite_sign() -> None:
    a = random_content({"x": (6, 6)}, 3, 1)
    made, report = arithmetic.combine({"a": (a, 1), "b": (a, -1)}, method="ties", density=0.5)
    assert not deltas(made)["x"].any() and report.rows[0].norm == 0 and report.error == 0
    made, _ = arithmetic.combine({"a": (a, 3), "b": (a, -1)}, method="ties", density=1, rank=6)
    assert close(deltas(made), {"x": 3 * deltas(a)["x"]}, 1e-6)  # the losing sign is left out of the mean


def test_dare_keeps_a_share_and_the_expectation() -> None:
    W = torch.randn(200, 300).double()
    kept = [sparse.dropped(W, 0.3, seed, "x") for seed in range(60)]
    for found in kept[:3]:
        assert float((found != 0).double().mean()) == pytest.approx(0.3, abs=0.01)
        torch.testing.assert_close(found[found != 0], W[found != 0] / 0.3)
    mean = torch.stack(kept).mean(dim=0)
    # each number has a variance of W² · 0.7 / 0.3 / 60
    assert float((mean - W).norm() / W.norm()) == pytest.approx((0.7 / 0.3 / 60) ** 0.5, rel=0.05)


def test_dare_depends_on_its_seed_and_on_nothing_else() -> None:
    a, b = random_content({"x": (8, 8), "y": (8, 8)}, 2, 1), random_content({"x": (8, 8), "z": (8, 8)}, 2, 2)

    def dare(seed: int, **contents: object) -> dict[str, Tensor]:
        named = {name: (found, 0.5) for name, found in contents.items()}
        return deltas(arithmetic.combine(named, method="dare", density=0.5, seed=seed, rank=8)[0])  # pyright: ignore[reportArgumentType]

    both = dare(0, a=a, b=b)
    assert close(both, dare(0, a=a, b=b), 0)
    assert not close(both, dare(1, a=a, b=b), 1e-3)
    assert close({"y": both["y"]}, {"y": dare(0, a=content({"y": a.updates["y"].pair()}))["y"]}, 0)
    mask = (both["y"].abs() > 1e-6).double()
    assert close({"y": both["y"]}, {"y": deltas(a)["y"] * mask}, 1e-5)  # 0.5 · ΔW / 0.5 where it was kept


def test_dare_ties_drops_and_then_elects() -> None:
    a, b = random_content({"x": (8, 6)}, 2, 1), random_content({"x": (8, 6)}, 2, 2)
    dense = [deltas(a)["x"].float(), deltas(b)["x"].float()]
    expected = sparse.elected([sparse.dropped(W, 0.6, 4, f"x/{i}") for i, W in enumerate(dense)])
    named = {"a": (a, 1.0), "b": (b, 1.0)}
    made, _ = arithmetic.combine(named, method="dare-ties", density=0.6, seed=4, rank=6)
    assert close(deltas(made), {"x": expected.double()}, 1e-5)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_they_need_a_density(method: str) -> None:
    a = random_content({"x": (8, 6)}, 2, 1)
    for density in (None, 0.0, 1.5):
        with pytest.raises(AdapterError, match=f"{method} needs the share of numbers to keep"):
            arithmetic.combine({"a": (a, 1)}, method=method, density=density)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:rank .* holds:lorank.AdapterWarning")
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_on_a_model_with_layers_of_several_kinds(method: str) -> None:
    model = models.gpt2()
    adapter(model, ["c_attn[q,v]", "wpe"], name="a", seed=1)
    adapter(model, ["c_attn[q]", "c_fc"], name="b", seed=2)
    report = lorank.combine(model, {"a": 1, "b": 1}, into="ab", method=method, density=0.3, rank=16)  # pyright: ignore[reportArgumentType]
    assert {row.label.rpartition(".")[2] for row in report.rows} == {"c_attn[q]", "c_attn[v]", "c_fc", "wpe"}
    with torch.no_grad():
        assert torch.isfinite(model(models.ids()).logits).all()


def test_the_largest_numbers_of_a_stack_are_those_of_each_matrix() -> None:
    W = torch.randn(3, 8, 6) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    found = sparse.trimmed(W, 0.25)
    assert found.count_nonzero(dim=(1, 2)).tolist() == [12, 12, 12]
    for matrix, expected in zip(found, W, strict=True):
        assert torch.equal(matrix, sparse.trimmed(expected, 0.25))
