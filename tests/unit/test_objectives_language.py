"""NextToken against torch's cross-entropy with label smoothing, and the z-loss by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_modules.batch import TokenScores
from llm_modules.objectives import NextToken


def scores() -> tuple[TokenScores, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 13, generator=generator)
    targets = torch.randint(13, (9,), generator=generator)
    logp = logits.log_softmax(-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    return TokenScores(picked, torch.arange(9), logits.logsumexp(-1), logp.mean(-1)), logits, targets


def test_is_the_sum_of_the_negative_log_likelihood() -> None:
    given, logits, targets = scores()
    output = NextToken()(given)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(output.terms["loss"].sum, expected)
    assert output.terms["loss"].count == "tokens"
    torch.testing.assert_close(output.metrics["nll"][0], expected)


def test_label_smoothing_is_torchs() -> None:
    given, logits, targets = scores()
    objective = NextToken(label_smoothing=0.2)
    assert objective.needs_statistics
    assert not objective.uniform
    output = objective(given)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(output.terms["loss"].sum, expected)
    torch.testing.assert_close(output.metrics["nll"][0], F.cross_entropy(logits, targets, reduction="sum"))


def test_z_loss_by_hand() -> None:
    given = TokenScores(torch.tensor([-1.0, -2.0]), torch.arange(2), torch.tensor([3.0, -4.0]), torch.zeros(2))
    term = NextToken(z_loss=0.5)(given).terms["z_loss"]
    assert term.sum.item() == 25.0
    assert term.weight == 0.5


@pytest.mark.parametrize(("key", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1.0)])
def test_values_outside_their_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"objective.{key}"):
        NextToken(**{key: value})
