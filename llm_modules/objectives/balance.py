"""The load-balancing loss of a mixture of experts.

Shape legend: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_modules.batch import Term


class LoadBalance:
    """``E * sum over experts of f_e * P_e`` (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is the share of the tokens that visit expert e (shares add up to the experts that a token visits), P_e the
    router's mean probability of it; f has no gradient. As transformers does, and other than the paper, tokens of all
    layers are put together before the product. f is taken over the micro-batches of all ranks at a time (as in arXiv
    2501.11873), so that the gradient does not depend on the number of ranks; that of a window is the mean over its
    micro-batches, each by its positions.

    Attributes:
        micro_batch_dependent: why the gradient depends on how many micro-batches a window is cut into.
        load_LE: tokens that visited each expert, over all ranks and the window so far.
    """

    micro_batch_dependent = (
        "shares of tokens are those of a micro-batch: its gradient is made before the window's others have been routed"
    )

    def __init__(self) -> None:
        self.load_LE = torch.zeros(())

    def term(self, load_LE: Tensor, probability_E: Tensor, top_k: int, coefficient: float, *, first: bool) -> Term:
        """The loss of a micro-batch: a sum, of which the mean over positions is taken.

        Args:
            load_LE: tokens that visited each expert, over all ranks.
            probability_E: the router's probabilities, summed over this rank's positions and all layers.
            top_k: experts that a token visits.
            coefficient: of the loss in the total.
            first: of the window's micro-batches.
        """
        self.load_LE = load_LE if first else self.load_LE + load_LE
        layers, experts = load_LE.shape
        share_E = top_k * load_LE.sum(0) / load_LE.sum().clamp(min=1)
        return Term(experts * (share_E @ probability_E) / layers, "positions", weight=coefficient)

    def busiest(self) -> Tensor:
        """() the window's tokens of a layer's busiest expert over those of its mean expert (1: balanced), the mean over
        layers."""
        return (self.load_LE.amax(1) / self.load_LE.mean(1).clamp(min=1e-9)).mean()
