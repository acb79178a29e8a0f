"""Log-probabilities against torch's own log-softmax and cross-entropy, in fp64 and through autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_modules.batch import IGNORE_INDEX
from llm_modules.logprobs import HeadTransform, linear_entropies, linear_logprobs, masked_sum, next_token_targets

TRANSFORMS = {
    "plain": HeadTransform(),
    "scale": HeadTransform(scale=0.37),
    "softcap": HeadTransform(softcap=2.0),
    "both": HeadTransform(scale=1.7, softcap=3.0),
}


def test_targets_are_the_next_labels() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 5, 6, 7]])
    targets = next_token_targets(labels, torch.arange(4)[None])
    assert targets.tolist() == [[5, 6, 7, IGNORE_INDEX]]


def test_last_token_of_a_packed_document_predicts_nothing() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert next_token_targets(labels, positions).tolist() == [[2, 3, IGNORE_INDEX, 5, IGNORE_INDEX]]


def test_masked_sum_keeps_nan_outside() -> None:
    assert masked_sum(torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([1, 0, 1])).item() == 3.0


@pytest.fixture
def compiling() -> Iterator[None]:
    """Nothing falls back to what is not compiled because other tests have compiled much."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def inputs(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, dtype=dtype, requires_grad=True)
    offset = torch.randn(31, generator=generator, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, torch.randint(31, (23,), generator=generator), offset


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("upstream", ["uniform", "uniform-unexpected", "per-token", "wrongly-uniform"])
def test_equals_log_softmax(name: str, bias: bool, upstream: str) -> None:
    assert_equals_log_softmax(name, bias, upstream, fused=False)


@pytest.mark.parametrize(
    ("name", "bias", "upstream"),
    [("plain", False, "uniform"), ("plain", True, "per-token"), ("both", True, "wrongly-uniform")],
)
def test_so_does_the_compiled_head(name: str, bias: bool, upstream: str, compiling: None) -> None:
    assert_equals_log_softmax(name, bias, upstream, fused=True)


def assert_equals_log_softmax(name: str, bias: bool, upstream: str, fused: bool) -> None:
    transform = TRANSFORMS[name]
    hidden, weight, targets, offset = inputs(bias)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    factors = torch.full((23,), 0.3) if upstream.startswith("uniform") else torch.linspace(-1, 1, 23)
    expected_logits = transform(F.linear(hidden, weight, offset))
    expected = expected_logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    expected_gradients = torch.autograd.grad((expected * factors).sum(), leaves)
    uniform = upstream in ("uniform", "wrongly-uniform")
    actual, normalizer, mean = linear_logprobs(
        hidden, weight, targets, offset, transform=transform, uniform=uniform, chunk=7, fused=fused
    )
    assert normalizer is None
    assert mean is None
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad((actual * factors).sum(), leaves), expected_gradients, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-6


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_entropies_are_those_of_torchs_categorical(name: str, bias: bool) -> None:
    hidden, weight, _, offset = inputs(bias)
    logits = TRANSFORMS[name](F.linear(hidden, weight, offset))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    found = linear_entropies(hidden, weight, offset, transform=TRANSFORMS[name], chunk=7)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    assert linear_entropies(hidden[:0], weight, offset).shape == (0,)


@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in TRANSFORMS), ("both", True)])
def test_statistics_and_their_gradients(name: str, fused: bool, compiling: None) -> None:
    transform = TRANSFORMS[name]
    hidden, weight, targets, offset = inputs(bias=True)
    assert offset is not None
    leaves = [hidden, weight, offset]
    logits = transform(F.linear(hidden, weight, offset))
    a, b, c = (torch.linspace(low, 1, 23) for low in (-1, 0.1, -0.3))
    logp = logits.log_softmax(-1)
    total = (logp.gather(-1, targets[:, None])[:, 0] * a + logits.logsumexp(-1) * b + logp.mean(-1) * c).sum()
    expected = torch.autograd.grad(total, leaves)
    scores, normalizer, mean = linear_logprobs(
        hidden, weight, targets, offset, transform=transform, statistics=True, uniform=True, chunk=5, fused=fused
    )
    assert normalizer is not None
    assert mean is not None
    torch.testing.assert_close(mean, logp.mean(-1).float(), rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad((scores * a + normalizer * b + mean * c).sum(), leaves)
    for got, want in zip(actual, expected, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-6


def test_second_backward_is_not_scaled_twice() -> None:
    hidden, weight, targets, _ = inputs(bias=False)
    total = linear_logprobs(hidden, weight, targets, uniform=True)[0].mean()
    first = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(total, [hidden, weight])
    for got, want in zip(second, kept, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_no_targets_give_zero_gradients() -> None:
    hidden, weight, _, _ = inputs(bias=False)
    logprobs, _, _ = linear_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.long), uniform=True)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients() -> None:
    hidden, weight, targets, _ = inputs(bias=False, dtype=torch.float32)
    exact = torch.autograd.grad(-F.cross_entropy(hidden @ weight.T, targets), [hidden, weight])
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _, _ = linear_logprobs(hidden, weight, targets, uniform=True)
    assert logprobs.dtype == torch.float32
    for got, want in zip(torch.autograd.grad(logprobs.mean(), [hidden, weight]), exact, strict=True):
        assert got.dtype == torch.float32
        assert 1e-6 < ((got - want).norm() / want.norm()).item() < 2e-2


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tiles_under_autocast_give_what_one_piece_gives(name: str) -> None:
    """More targets than a tile holds, and a last tile that is not full."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 8, generator=generator, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, requires_grad=True)
    targets = torch.randint(31, (300,), generator=generator)
    results = []
    for uniform in (True, False):  # the second makes its gradient in the backward pass, without tiles
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, _, _ = linear_logprobs(
                hidden, weight, targets, transform=TRANSFORMS[name], uniform=uniform, chunk=290
            )
        results.append((logprobs.detach(), *torch.autograd.grad(logprobs.sum(), [hidden, weight])))
    for tiled, whole in zip(*results, strict=True):
        assert ((tiled - whole).norm() / whole.norm()).item() < 2e-3
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
