"""A policy goes on from a checkpoint: what of it depends on the objective, and whether it fits the one of now."""

from __future__ import annotations

from typing import Any

from llm_modules.objectives.policy import PolicyObjective


def described(objective: PolicyObjective) -> dict[str, Any]:
    """What a checkpoint says of an objective beside its state."""
    kind = type(objective)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "needs_reference": objective.needs_reference,
        "critics": list(objective.critics),
    }


def check_resume(saved: dict[str, Any], module: Any) -> bool:
    """Whether the state of the checkpoint's objective is that of the present one: it has the same class.

    Args:
        saved: the part of a ``PolicyModule`` in a checkpoint; an older one does not describe its objective, which is
            then taken to be of the same class.
        module: that goes on.

    Raises:
        ValueError: one line: other critics; or, inside of an iteration, whose answers have the advantages of the
            objective that prepared them, another objective, other steps, or a reference that was not asked.
    """
    now, inside = described(module.objective), saved["rollouts"] is not None
    before = saved.get("objective_is", now)
    if before["critics"] != now["critics"]:
        had, has = (", ".join(critics) or "none" for critics in (before["critics"], now["critics"]))
        raise ValueError(
            f"ckpt_path: made with model.objective {before['class']} (critics: {had}), now {now['class']} (critics: "
            f"{has}); go on with the same, or export the model and begin a new run from it"
        )
    if inside and before["class"] != now["class"]:
        raise ValueError(
            f"ckpt_path: made inside of an iteration of model.objective {before['class']}, now {now['class']}; go on "
            "with the same, or from a checkpoint between two iterations"
        )
    steps = [module.epochs, module.minibatches]
    if inside and (old := saved.get("steps", steps)) != steps:
        raise ValueError(
            f"ckpt_path: made inside of an iteration of model.epochs {old[0]} and minibatches {old[1]}, now "
            f"{steps[0]} and {steps[1]}; go on with the same, or from a checkpoint between two iterations"
        )
    if inside and now["needs_reference"] and saved["rollouts"].get("reference_logprobs") is None:
        raise ValueError(
            "ckpt_path: made inside of an iteration without a reference, which model.objective now compares with; set "
            "model.objective.kl to 0 as it was, or go on from a checkpoint between two iterations"
        )
    return bool(before["class"] == now["class"])
