"""diff: all numbers are those of the dense updates; φ is the paper's."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank import AdapterError, arithmetic
from lorank.formats import read
from lorank.variants import LoRA

from .. import models
from .dense import adapter, content, deltas, random_content


def phi(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """Section 7.2, equation 4, from the right-singular vectors of two matrices."""
    U = torch.linalg.svd(first.double(), full_matrices=False).Vh[:i].T
    V = torch.linalg.svd(second.double(), full_matrices=False).Vh[:j].T
    return float((U.T @ V).norm() ** 2 / min(i, j))


def test_numbers_are_those_of_the_dense_updates() -> None:
    model = models.llama()
    a = adapter(model, ["q_proj", "down_proj"], LoRA(rank=3, alpha=5), "a", 1)
    b = adapter(model, ["q_proj", "up_proj"], LoRA(rank=4), "b", 2)
    found = arithmetic.diff(a, b)
    dense = deltas(a), deltas(b)
    assert {row.label for row in found.rows} == dense[0].keys() | dense[1].keys()
    zero = torch.zeros(())
    for row in found.rows:
        A, B = (side.get(row.label, zero) for side in dense)
        assert row.norms == pytest.approx((float(A.norm()), float(B.norm())))
        assert row.distance == pytest.approx(float((A - B).norm()))
        if row.label in dense[0] and row.label in dense[1]:
            assert row.cosine == pytest.approx(float((A * B).sum() / (A.norm() * B.norm())))
            factors = a.updates[row.label].pair()[0], b.updates[row.label].pair()[0]
            assert row.of_A == pytest.approx(phi(*factors, 3, 3))
            assert row.of_inputs == pytest.approx(phi(A, B, 3, 3))
            assert row.of_outputs == pytest.approx(phi(A.T, B.T, 3, 3))
        else:
            assert row.cosine is row.of_A is row.of_inputs is row.of_outputs is None
            assert None in row.ranks
    vectors = [torch.cat([side.get(row.label, zero).flatten() for row in found.rows]) for side in dense]
    assert found.norms == pytest.approx(tuple(float(v.norm()) for v in vectors))
    product = sum(float((dense[0][n] * dense[1][n]).sum()) for n in dense[0].keys() & dense[1].keys())
    assert found.cosine == pytest.approx(product / (found.norms[0] * found.norms[1]))
    assert not found.notes


def test_an_adapter_is_at_no_distance_from_itself() -> None:
    a = adapter(models.gpt2(), ["c_attn[q,v]", "c_fc"])
    resized, _ = arithmetic.resize(a, 4)  # other factors, the same updates
    for other, tolerance in ((a, 1e-12), (resized, 1e-6)):
        for row in arithmetic.diff(a, other).rows:
            assert row.distance < tolerance * row.norms[0]
            assert row.cosine == pytest.approx(1, abs=1e-6)
            for similarity in (row.of_A, row.of_inputs, row.of_outputs):
                assert similarity == pytest.approx(1, abs=1e-6)
    opposite = arithmetic.diff(a, arithmetic.negate(a))
    assert opposite.cosine == pytest.approx(-1)
    assert opposite.distance == pytest.approx(2 * opposite.norms[0])


def test_phi_is_the_papers() -> None:
    first, second = torch.randn(4, 30), torch.randn(6, 30)
    grid = arithmetic.subspace_similarity(first, second)
    assert grid.shape == (4, 6)
    for i in range(4):
        for j in range(6):
            assert float(grid[i, j]) == pytest.approx(phi(first, second, i + 1, j + 1), abs=1e-9)
    same = arithmetic.subspace_similarity(first, torch.randn(4, 4) @ first)
    assert float(same[-1, -1]) == pytest.approx(1, abs=1e-5)
    orthogonal = torch.eye(30)[:5], torch.eye(30)[10:14]
    assert not arithmetic.subspace_similarity(*orthogonal).any()
    lower = torch.cat([first[:2], first[:2]])  # of rank 2: the other directions would be rounding
    assert arithmetic.subspace_similarity(lower, second).shape == (2, 6)


def test_directions_that_are_none_are_left_out() -> None:
    a, b = random_content({"x": (20, 30)}, 3, 1), random_content({"x": (20, 30)}, 3, 2)
    A, B = a.updates["x"].pair()
    untrained = content({"x": (A, torch.zeros_like(B))})
    row = arithmetic.diff(untrained, b).rows[0]
    assert row.cosine is row.of_inputs is row.of_outputs is None and row.of_A is not None
    lower = content({"x": (torch.cat([A[:2], A[:1]]), B)})  # ΔW of rank 2 in factors of rank 3
    row = arithmetic.diff(lower, b).rows[0]
    W, V = deltas(lower)["x"], deltas(b)["x"]
    assert row.of_inputs == pytest.approx(phi(W, V, 2, 2)) and row.of_outputs == pytest.approx(phi(W.T, V.T, 2, 2))


def test_a_stack_is_measured_as_a_whole() -> None:
    A, B = torch.randn(3, 2, 6).double(), torch.randn(3, 8, 2).double()
    C, D = torch.randn(3, 2, 6).double(), torch.randn(3, 8, 2).double()
    row = arithmetic.diff(content({"x": (A, B)}), content({"x": (C, D)})).rows[0]
    assert row.norms[0] == pytest.approx(float((B @ A).norm()))
    assert row.distance == pytest.approx(float((B @ A - D @ C).norm()))
    mean = sum(phi(B[e] @ A[e], D[e] @ C[e], 2, 2) for e in range(3)) / 3
    assert row.of_inputs == pytest.approx(mean)


def test_what_was_trained_whole_is_compared() -> None:
    model = models.bert()
    a = adapter(model, ["query"], name="a", seed=1, train_also=["classifier"], bias="adapted")
    b = adapter(model, ["query"], name="b", seed=2, train_also=["classifier"])
    found = arithmetic.diff(a, b)
    gap = max(float((a.copies["classifier"][k] - b.copies["classifier"][k]).abs().max()) for k in ("weight", "bias"))
    assert found.whole["classifier"] == pytest.approx(gap)
    assert found.whole["bert.encoder.layer.0.attention.self.query.bias"] is None
    assert not arithmetic.diff(a, a).whole
    json.dumps(found.to_json())


def test_other_bases_are_a_note_and_other_shapes_an_error() -> None:
    a, b = adapter(models.llama(), ["q_proj"]), adapter(models.llama(), ["q_proj"])
    (note,) = arithmetic.diff(a, b).notes
    assert "trained on different bases" in note and "allow_other_base" not in note
    with pytest.raises(AdapterError, match=r"x: ΔW is \(4, 4\) in one adapter, and \(4, 5\) in the other"):
        arithmetic.diff(random_content({"x": (4, 4)}, 2, 1), random_content({"x": (4, 5)}, 2, 1))
    dora = adapter(models.llama(), ["q_proj"], lorank.DoRA(rank=2))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: DoRA"):
        arithmetic.diff(dora, dora)


def test_parts_and_the_whole_of_a_layer_are_compared_as_wholes() -> None:
    model = models.gpt2()
    spec: Any
    for spec in (LoRA(rank=3, alpha=5), lorank.VeRA(rank=6), lorank.PiSSA(rank=3)):
        parts = adapter(model, ["c_attn[q,v]"], spec, "parts", 1)
        whole = adapter(model, ["c_attn"], LoRA(rank=4), "whole", 2)
        merged = copy.deepcopy(model)
        lorank.activate(merged, "parts")
        lorank.merge(merged, "parts")
        for found in (arithmetic.diff(parts, whole), arithmetic.diff(whole, parts)):
            assert [row.label for row in found.rows] == [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
        for row in arithmetic.diff(parts, whole).rows:
            layer = merged.get_submodule(row.label)
            W = (layer.weight - model.get_submodule(row.label).weight).T.double()  # of the parts
            V = deltas(whole)[row.label]
            assert row.norms == pytest.approx((float(W.norm()), float(V.norm())), rel=1e-4)
            assert row.distance == pytest.approx(float((W - V).norm()), rel=1e-4)
            assert row.cosine == pytest.approx(float((W * V).sum() / (W.norm() * V.norm())), abs=1e-4)
        lorank.remove(model, "parts")
        lorank.remove(model, "whole")


def test_parts_of_which_the_rows_are_not_known_are_not_compared_with_the_whole(tmp_path: Path) -> None:
    model = models.gpt2()
    adapter(model, ["c_attn[q,v]"], name="a", seed=1)
    whole = adapter(model, ["c_attn"], name="b", seed=2)
    lorank.save(model, tmp_path, "a")
    with pytest.raises(AdapterError, match=r"c_attn: the first adapts q, v of it, and another adapter all of it"):
        arithmetic.diff(read(tmp_path, model), whole)
