"""The load-balancing loss of a mixture of experts.

Shape legend: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_modules.batch import Term


class LoadBalance:
    """``E * sum over experts of f_e * P_e`` (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is the share of the tokens that visit expert e (they add up to the experts a token visits), P_e the router's mean
    probability of it; f has no gradient. As transformers does, and other than the paper, tokens of all layers are put
    together before the product. The mean P is linear, and so exact over any cut of the window; f is taken over all ranks
    and the window's micro-batches so far (as arXiv 2501.11873, section 3, does), because the gradient of a micro-batch
    is made before the later ones have been routed.

    Attributes:
        micro_batch_dependent: why the gradient depends on the number of micro-batches of a window (not on that of ranks).
        load_LE: tokens that visited each expert, over all ranks and the window so far.
    """

    micro_batch_dependent = "the share of tokens of each expert is that of the window's micro-batches so far"

    def __init__(self) -> None:
        self.load_LE = torch.zeros(())

    def add(self, load_LE: Tensor, *, first: bool) -> None:
        """One more micro-batch, summed over all ranks; ``first``: of a new window."""
        self.load_LE = load_LE if first else self.load_LE + load_LE

    def term(self, probability_E: Tensor, top_k: int, coefficient: float) -> Term:
        """The loss of this rank's micro-batch: a sum, of which the mean over positions is taken.

        Args:
            probability_E: the router's probabilities, summed over this micro-batch's positions and layers.
            top_k: experts that a token visits.
            coefficient: of the loss in the total.
        """
        layers, experts = self.load_LE.shape
        share_E = top_k * self.load_LE.sum(0) / self.load_LE.sum().clamp(min=1)
        return Term(experts * (share_E @ probability_E) / layers, "positions", weight=coefficient)

    def busiest(self) -> Tensor:
        """() tokens of a layer's busiest expert over those of its mean expert (1: balanced), the mean over layers."""
        return (self.load_LE.amax(1) / self.load_LE.mean(1).clamp(min=1e-9)).mean()
