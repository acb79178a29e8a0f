"""Settings of a policy that do not go together."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

from llm_modules.evaluation.rewards import Answer, Reward, RowError
from llm_modules.generation import Generator
from llm_modules.objectives.policy import PolicyObjective
from llm_modules.zoo import Backbone
from llm_modules.zoo.adapter_config import adapter_config, unmergeable

Reference = Literal["auto", "base", "copy"]

LOGGED = {
    "loss", "reward", "cost", "reward_std", "tokens", "finished", "constant_groups", "prompts", "kept", "entropy",
    "kl_weight", "multiplier", "over_limit", "explained_reward", "explained_cost",
}  # fmt: skip
"""What is logged beside the rewards, under ``rollout/`` or ``val/``."""
UNREAD = {
    "seed": "a policy samples by model.seed (seed_everything)",
    "logprobs": "a policy always has the log-probabilities of its answers",
    "too_long": "data.longest_prompt keeps prompts short enough",
}
"""Settings of a generator that are not read in training, only by ``predict``."""
NARROWING = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Settings by which tokens are drawn from another distribution than the one that is trained."""


def check_settings(module: Any, critic: Backbone | None, cost_critic: Backbone | None) -> None:
    """Raises a ValueError, of all of them. Arguments: a ``PolicyModule``, and the critics that it was given."""
    check_objective(module.objective)
    least = {"group_size": module.objective.least_group, "epochs": 1, "minibatches": 1, "dynamic_sampling": 1}
    problems = [
        f"model.{name}: {getattr(module, name)} is below {bound}"
        for name, bound in least.items()
        if getattr(module, name) < bound
    ]
    names, rewards, costs = module._respondent.names, module._respondent.rewards, module._respondent.costs
    needed, kind, strategy = module.objective.critics, type(module.objective).__name__, module.generator.strategy
    checks = (
        (
            not any(reward.weight for reward in rewards),
            "model.rewards: none that counts; give at least one of a weight that is not 0",
        ),
        (len({*names}) < len(names), f"model.rewards: two have one name ({', '.join(names)}); set their `name`"),
        (
            "cost" in needed and not any(cost.weight for cost in costs),
            f"model.costs: {kind} holds a cost under a limit; give at least one of a weight that is not 0",
        ),
        (
            bool(taken := sorted(LOGGED & {*names})),
            f"model.rewards: {', '.join(taken)} is logged besides; set another `name`",
        ),
        ("cost" not in needed and bool(costs), f"model.costs: {kind} does not read them; use SafePPO"),
        (
            "cost" in needed and module.dynamic_sampling > 1,
            f"model.dynamic_sampling: {kind} holds the mean cost of all answers; set it to 1",
        ),
        (not needed and critic is not None, f"model.critic: {kind} has no critic; leave it out"),
        ("cost" not in needed and cost_critic is not None, f"model.cost_critic: {kind} has none"),
        (module.generator.strategy != "sample", f"model.generator: strategy {strategy} does not sample; use sample"),
        (
            module.drop_unfinished and module.objective.whole_groups,
            f"model.drop_unfinished: {kind} compares answers, and needs both; leave it out",
        ),
    )
    problems += [problem for holds, problem in checks if holds]
    problems += [f"model.engine: {problem}" for problem in _engine_problems(module)]
    if module.reference not in get_args(Reference):
        problems.append(f"model.reference: {module.reference!r} is not one of {', '.join(get_args(Reference))}")
    elif module.reference != "auto" and not module.objective.needs_reference:
        problems.append(
            f"model.reference: {module.reference}, but {kind} compares with no reference (kl is 0); leave it out, or "
            "set model.objective.kl"
        )
    if problems:
        raise ValueError("; ".join(problems))


def check_objective(objective: PolicyObjective) -> None:
    """Raises a ValueError for the base class, and for a subclass that lacks what it must have."""
    kind = type(objective)
    lacking = [name for name in ("prepare", "terms") if getattr(kind, name) is getattr(PolicyObjective, name)]
    if kind is PolicyObjective:
        raise ValueError(
            "model.objective: PolicyObjective is what objectives are made of, and none itself (settings below "
            "model.objective are its own where no class is named); name one: --model.objective GRPO"
        )
    if lacking:
        raise ValueError(f"model.objective: {kind.__name__} has no {' and no '.join(lacking)} of its own")


def _engine_problems(module: Any) -> list[str]:
    engine, backbone = module.engine, module.backbone
    if engine is None:
        return []
    found = []
    if backbone.quantization is not None:
        found.append("a quantized model has no weights to hand over; leave out backbone.quantization, or the engine")
    if backbone.adapter is not None and (reason := unmergeable(adapter_config(backbone.adapter))):
        found.append(f"the adapter is merged into what it takes, and this one cannot be: {reason}; use LoRA")
    if (problem := engine.problem(module.generator)) is not None:
        found.append(problem)
    return found


def check_start(module: Any, data: Any) -> None:
    """Raises a ValueError for data that the policy cannot learn from as it is set; says what is to be known of it."""
    taken = data.batch_size // module.dynamic_sampling
    checks = (
        (
            data.batch_size % module.dynamic_sampling > 0,
            f"data.batch_size: {data.batch_size} is no multiple of model.dynamic_sampling {module.dynamic_sampling}",
        ),
        (
            module.minibatches > taken,
            f"model.minibatches: {module.minibatches} optimizer steps of {taken} prompts; each needs one at least",
        ),
    )
    problems = [problem for holds, problem in checks if holds]
    problems += [
        f"model.generator.{name}: {getattr(module.generator, name)}, but {why}; leave it out"
        for name, why in UNREAD.items()
        if getattr(module.generator, name) != getattr(Generator, name)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    check_rows(data, module.all_rewards)
    narrowing = [name for name in NARROWING if getattr(module.generator, name) != getattr(Generator, name)]
    if narrowing and module.trainer.is_global_zero:
        warnings.warn(
            f"model.generator.{', '.join(narrowing)}: answers are drawn from fewer or other tokens than the "
            "probabilities that are trained are of: ratios and divergences are not those of what is drawn",
            stacklevel=2,
        )


def check_rows(data: Any, rewards: list[Reward]) -> None:
    """Raises a ValueError, which names file and row, for a row of the data of which a reward can score no answer."""
    asking = [reward for reward in rewards if type(reward).check is not Reward.check]
    if not asking:
        return
    for origin, row, record in data.asked():
        for reward in asking:
            try:
                reward.check(Answer(row=row, text="", **record))
            except RowError as error:
                raise ValueError(f"{origin}: reward {reward.name}: {error.problem}") from error
