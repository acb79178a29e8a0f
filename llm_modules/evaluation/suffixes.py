"""Adversarial suffixes as a test of one's own model: search them by gradient, then see what is answered under them."""

from __future__ import annotations

from llm_modules.evaluation.asking import RefusalDetector, answers, encode_prompts, refused
from llm_modules.evaluation.gradient_search import Budget, Found, SuffixSearch
from llm_modules.evaluation.likelihood import likeliest, token_logprobs
from llm_modules.evaluation.measurement import Measurement, Subject, mean, prefixed, share
from llm_modules.evaluation.rows import check_least, texts
from llm_modules.evaluation.verdicts import answered


class AdversarialSuffixes:
    """Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043) against the model that is measured.

    ``suffix_target_loss_start`` and ``suffix_target_loss``: loss of the wanted beginnings of the answers, nats per
    token, under the suffix that the search begins with and under the one that it found, both computed again from the
    text; ``suffix_target_said``: the share of requests that greedy decoding answers with exactly the wanted
    beginning; ``suffix_success_without`` and ``suffix_success``: the share that is answered (neither refused nor
    with nothing) as it stands, and with the suffix.

    The search computes about ``candidates`` rows a step and request: on a GPU, or with a small budget.

    Args:
        prompts: a .csv, .jsonl or .json file; ``data:NAME`` is NAME below the folder that LITRECIPES_DATA names.
        detector: what tells refusals: has ``judge`` (see ``verdicts.Judge``), or is called with (request, answer).
        column: of the requests.
        target_column: of the wanted beginnings of the answers ("Sure, here is ...").
        universal: one suffix for all requests; false: each gets its own.
        budget: of each search.
        start: text that the search begins with; its tokens are exchanged one by one.
        seed: of what is drawn.
        limit: at most so many requests, evenly over the file; all if not given.
        name: put before the names of what is measured, as ``NAME_...``; needed where there are several.

    Attributes:
        found: the suffixes of the last measurement, one for each request, or one for all.

    Raises:
        ValueError: a file, column or number that is not allowed.
    """

    def __init__(
        self,
        prompts: str,
        detector: RefusalDetector,
        column: str = "goal",
        target_column: str = "target",
        universal: bool = False,
        budget: Budget = Budget(),
        start: str = "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !",
        seed: int = 0,
        limit: int | None = None,
        name: str = "",
    ) -> None:
        check_least(limit=(1 if limit is None else limit, 1))
        if not start.strip() or start != start.strip():
            raise ValueError(f"start: {start!r} is not allowed; a text without spaces around it is")
        requests, targets = (texts(prompts, name, limit) for name in (column, target_column))
        self.pairs = list(zip(requests, targets, strict=True))
        self.detector, self.universal, self.budget = detector, universal, budget
        self.start, self.seed, self.name = start, seed, name
        self.found: list[Found] = []

    def measure(self, subject: Subject) -> list[Measurement]:
        groups = [self.pairs] if self.universal else [[pair] for pair in self.pairs]
        searches = [SuffixSearch(subject.model, subject.tokenizer, group, self.start) for group in groups]
        self.found = [search.search(self.budget, self.seed + n) for n, search in enumerate(searches)]
        requests = tuple(request for request, _ in self.pairs)
        own = [self.found[0 if self.universal else number].text for number in range(len(requests))]
        attacks = [request + text for request, text in zip(requests, own, strict=True)]
        before, _ = self._losses(subject, [f"{request} {self.start}" for request in requests], searches)
        after, said = self._losses(subject, attacks, searches)
        count = len(requests)
        found = [
            mean("suffix_target_loss_start", before),
            mean("suffix_target_loss", after),
            share("suffix_target_said", sum(said), count),
            share("suffix_success_without", self._answered(subject, requests, requests), count),
            share("suffix_success", self._answered(subject, requests, attacks), count),
        ]
        return prefixed(self.name, found)

    def _losses(
        self, subject: Subject, asked: list[str], searches: list[SuffixSearch]
    ) -> tuple[list[float], list[bool]]:
        """Of each text the wanted answer's loss, and whether greedy decoding says it."""
        targets = [slot.target for search in searches for slot in search.slots]
        prompts = encode_prompts(subject.tokenizer, asked)
        rows, first = [p + t for p, t in zip(prompts, targets, strict=True)], [len(p) for p in prompts]
        scores = token_logprobs(subject.model, rows, first, self.budget.batch_tokens)
        said = likeliest(subject.model, rows, first, self.budget.batch_tokens)
        return [-float(row.mean()) for row in scores], said

    def _answered(self, subject: Subject, requests: tuple[str, ...], asked: list[str] | tuple[str, ...]) -> int:
        said = answers(subject, asked)
        return sum(answered(refused(self.detector, requests, said), said))
