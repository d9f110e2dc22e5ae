"""Singular bases and the gate arithmetic, against an fp64 singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_svf.spectral import (
    delta_weight,
    effective_weight,
    fingerprint,
    fingerprint_difference,
    gate,
    gate_correction,
    gate_side,
    singular_basis,
)

SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (24, 24), "row": (1, 9), "column": (9, 1), "scalar": (1, 1)}


def reference_weight(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`U diag(σ ⊙ z) Vᵀ` by an fp64 SVD; singular values beyond `len(delta)` keep z = 1."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    z = torch.ones_like(S)
    z[: len(delta)] += delta.double()
    return U @ torch.diag(S * z) @ Vh


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def assert_matches_reference(weight: torch.Tensor, r: int | None = None) -> None:
    """All four functions against the reference, for a random δ."""
    out_features, in_features = weight.shape
    basis = singular_basis(weight, r).vectors
    delta = torch.randn(basis.shape[1])
    expected = reference_weight(weight, delta)
    x = torch.randn(5, in_features)

    # W + ΔW is rounded relative to W: where z is next to 0 all over, W(z) is what is left of a cancellation
    allowed = 1e-5 * max(expected.abs().max(), weight.abs().max().double())
    for found in (effective_weight(weight, basis, delta), weight.double() + delta_weight(weight, basis, delta)):
        assert (found - expected).abs().max() <= allowed
    if out_features <= in_features:
        h = x @ weight.T
        y, by_parts = gate(h, basis, delta), h + gate_correction(h, basis, delta)
    else:
        y, by_parts = gate(x, basis, delta) @ weight.T, (x + gate_correction(x, basis, delta)) @ weight.T
    # the errors of the activations are those of fp32 products with W, which cancellation in W(z) x can magnify
    scale = weight.double().abs().max() * (1 + delta.abs().max()) * x.abs().sum(1).max()
    for found in (y, by_parts):
        assert (found.double() - x.double() @ expected.T).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("r", [None, 1, 5, 1000])
def test_agrees_with_the_fp64_svd(shape: tuple[int, int], r: int | None) -> None:
    assert_matches_reference(torch.randn(shape), r)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (30, 30)])
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_agrees_for_rank_deficient_weights(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    if rank:
        assert_matches_reference(weight)
    else:
        assert torch.equal(effective_weight(weight, singular_basis(weight).vectors, torch.randn(30)), weight)


@settings(max_examples=60, deadline=None, derandomize=True)
@example(out_features=1, in_features=11, r=None, decay=0.0, scale=1.0, seed=372136)  # z = 1e-3
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    r=st.none() | st.integers(1, 30),
    decay=st.floats(0, 0.5),
    scale=st.floats(1e-4, 1e4),
    seed=st.integers(0, 10**6),
)
def test_agrees_for_any_shape_and_spectrum(
    out_features: int, in_features: int, r: int | None, decay: float, scale: float, seed: int
) -> None:
    """With r < k the columns are only defined where singular values differ, hence the geometric spectrum."""
    torch.manual_seed(seed)
    k = min(out_features, in_features)
    U, V = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (out_features, in_features))
    spectrum = scale * torch.exp(-(0.1 + decay) * torch.arange(k, dtype=torch.float64))
    assert_matches_reference((U * spectrum @ V.T).float(), r)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=12, max_size=12),
    delta=st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3),
    x=st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4),
    tall=st.booleans(),
)
def test_gate_and_effective_weight_agree_for_any_values(
    values: list[float], delta: list[float], x: list[float], tall: bool
) -> None:
    """Also for zero and repeated singular values, where the basis is one of many."""
    weight, d = torch.tensor(values).reshape(3, 4), torch.tensor(delta)
    if tall:
        weight = weight.T
    h = torch.tensor(x)[: weight.shape[1]]
    basis = singular_basis(weight).vectors
    gated = weight @ gate(h, basis, d) if tall else gate(weight @ h, basis, d)
    folded = effective_weight(weight, basis, d) @ h
    assert (gated - folded).abs().max() <= 1e-5 * (1 + weight.norm() * h.norm() * (1 + d.abs().max()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_zero_delta_changes_no_bit(shape: tuple[int, int]) -> None:
    weight, h = torch.randn(shape), torch.randn(3, min(shape))
    basis = singular_basis(weight).vectors
    zero = torch.zeros(min(shape))
    assert torch.equal(effective_weight(weight, basis, zero), weight)
    assert torch.equal(gate(h, basis, zero), h)


@pytest.mark.parametrize(
    ("shape", "side"),
    [((3, 4), "output"), ((4, 4), "output"), ((4, 3), "input"), ((1, 9), "output"), ((9, 1), "input")],
)
def test_the_gate_stands_on_the_smaller_side(shape: tuple[int, int], side: str) -> None:
    assert gate_side(*shape) == side
    assert singular_basis(torch.randn(shape)).vectors.shape == (min(shape), min(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_form_of_the_basis(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Descending spectrum, orthonormal columns, canonical signs, contiguous, in the weight's dtype."""
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    found = singular_basis(weight)
    Q = found.vectors.double()
    k = min(shape)

    expected = torch.linalg.svdvals(weight.double())
    assert found.spectrum.dtype == torch.float64
    assert found.spectrum.shape == (k,)
    assert (found.spectrum - expected).abs().max() <= 1e-7 * expected[0]
    assert (found.spectrum.diff() <= 0).all()

    assert found.vectors.dtype == dtype
    assert found.vectors.is_contiguous()
    assert (Q.T @ Q - torch.eye(k)).abs().max() <= (1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)
    assert (Q.gather(0, Q.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("r", [1, 7, 20, 99])
def test_r_keeps_the_leading_columns(shape: tuple[int, int], r: int) -> None:
    weight = torch.randn(shape)
    full, narrow = singular_basis(weight), singular_basis(weight, r)
    assert torch.equal(narrow.vectors, full.vectors[:, :r])
    assert torch.equal(narrow.spectrum, full.spectrum)
    for basis in (narrow, full.leading(r)):
        assert basis.vectors.is_contiguous()
        assert torch.equal(basis.vectors, narrow.vectors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (130, 129), (150, 260)])
def test_the_basis_does_not_depend_on_the_memory_layout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    strided = torch.zeros(shape[0], 2 * shape[1], dtype=dtype)[:, ::2].copy_(weight)
    expected = singular_basis(weight).vectors
    layouts = {"transposed": weight.T.contiguous().T, "strided": strided}
    differences = {name: (singular_basis(w).vectors - expected).abs().max().item() for name, w in layouts.items()}
    assert differences == {"transposed": 0, "strided": 0}


def test_the_weight_is_left_as_it_was() -> None:
    weight = torch.randn(6, 9, dtype=torch.float64)
    before = weight.clone()
    singular_basis(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(160, 240), (240, 160)])
def test_thread_counts_agree_on_the_effective_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).double()
    delta = torch.randn(160, dtype=torch.float64)
    expected = reference_weight(weight, delta)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found = effective_weight(weight, singular_basis(weight).vectors, delta)
            assert relative_error(found, expected) <= 1e-10, count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_mixtures_add_exactly(shape: tuple[int, int]) -> None:
    """ΔW of a weighted sum of δ is the weighted sum of the ΔW."""
    weight = torch.randn(shape, dtype=torch.float64)
    basis = singular_basis(weight).vectors
    deltas, alphas = torch.randn(3, 10, dtype=torch.float64), torch.tensor([0.3, -1.2, 2.0]).double()
    changes = torch.stack([delta_weight(weight, basis, delta) for delta in deltas])
    mixed = delta_weight(weight, basis, alphas @ deltas)
    assert relative_error(mixed, torch.einsum("k,kij->ij", alphas, changes)) <= 1e-14


def test_dtypes_of_the_results() -> None:
    """The change stays in fp32 (fp64 for fp64), and the effective weight is rounded once."""
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        weight = torch.randn(6, 8).to(dtype)
        basis, delta = singular_basis(weight).vectors, torch.randn(6)
        change = delta_weight(weight, basis, delta)
        assert change.dtype == wide
        assert torch.equal(effective_weight(weight, basis, delta), (weight.to(wide) + change).to(dtype))
        assert gate(torch.randn(2, 6).to(dtype), basis, delta).dtype == dtype


BAD_WEIGHTS = {
    "nan": (torch.tensor([[1.0, 2.0, float("nan")], [3.0, 4.0, 5.0]]), "1 NaN or Inf values out of 6"),
    "inf": (torch.tensor([[1.0, float("-inf")], [float("inf"), 4.0], [5.0, 6.0]]), "2 NaN or Inf values out of 6"),
    "bf16 nan": (torch.full((2, 2), float("nan"), dtype=torch.bfloat16), "4 NaN or Inf"),
    "vector": (torch.randn(5), r"shape \(5,\)"),
    "3-d": (torch.randn(2, 3, 4), r"shape \(2, 3, 4\)"),
    "int": (torch.ones(3, 3, dtype=torch.int64), "torch.int64"),
    "meta": (torch.empty(3, 3, device="meta"), "meta device"),
}


@pytest.mark.parametrize(("weight", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_named(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"layers.3.up_proj.*{message}"):
        singular_basis(weight, name="layers.3.up_proj")


def test_fingerprint_holds_the_spectrum_and_the_norm() -> None:
    weight = torch.randn(9, 15)
    S = torch.linalg.svdvals(weight.double())
    expected = [S[0], S[4], S[8], weight.double().norm()]
    assert fingerprint(singular_basis(weight).spectrum) == pytest.approx([float(x) for x in expected], rel=1e-7)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (1, 8)])
@pytest.mark.parametrize("rank", [None, 4], ids=["full rank", "rank 4"])  # of which σ_mid is 0 but for rounding
def test_fingerprint_tolerates_a_cast_and_another_driver(shape: tuple[int, int], rank: int | None) -> None:
    weight = torch.randn(shape) if rank is None else torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    known = fingerprint(singular_basis(weight).spectrum)
    others = {"fp64 SVD": torch.linalg.svdvals(weight.double())}
    others |= {str(dtype): singular_basis(weight.to(dtype)).spectrum for dtype in (torch.float16, torch.bfloat16)}
    differences = {name: fingerprint_difference(known, fingerprint(s), shape) for name, s in others.items()}
    assert differences == dict.fromkeys(others)


@pytest.mark.parametrize("position", range(4), ids=["σ_1", "σ_mid", "σ_k", "‖W‖_F"])
def test_fingerprint_difference_names_the_number_and_both_values(position: int) -> None:
    numbers = [4.0, 2.0, 1.0, 10.0]
    other = list(numbers)
    other[position] *= 1.05
    message = fingerprint_difference(numbers, other, (64, 96))
    assert message is not None
    assert ["σ_1", "σ_mid", "σ_k", "‖W‖_F"][position] in message
    assert f"{numbers[position]:g}" in message
    assert f"{other[position]:g}" in message


def test_fingerprint_tells_other_weights_apart() -> None:
    """Another random matrix of the same shape, and the same one with small noise, as after a fine-tuning."""
    weight = torch.randn(40, 64)
    known = fingerprint(singular_basis(weight).spectrum)
    for other in (torch.randn(40, 64), weight + 0.05 * torch.randn(40, 64)):
        assert fingerprint_difference(known, fingerprint(singular_basis(other).spectrum), (40, 64)) is not None
