"""Reward models and preference tuning on hh-rlhf, from a model that has seen nothing else, measured on held-out rows.

``LITRECIPES_DATA=... python -m benchmarks.preference [--seeds 1 2 3] [--variants dpo ipo ...] [--work FOLDER]``

For each seed the helpful pairs of ``hh_rlhf`` are dealt to two parts by how their dialogues begin. On the first are
trained a tokenizer, a small model (on both dialogues of each pair), from it a reward model, and from it again a policy
by each variant; every training is a `recipes fit` in a process of its own, and what is finished is not done again. On
the second part is measured how often the reward model is right; by how much a variant has moved log p(chosen) - log
p(rejected) away from the base's, in nats (the margin; read off the exported folders with transformers alone); and how
often the reward model prefers a sampled answer of the policy to one of the base, a tie being a half. It likes length:
the win rate is also given at equal length.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = ("helpful-base", "helpful-rejection-sampled")
HELD_OUT, CHARACTERS = 0.35, 800
"""Share of the dialogues that is held out; characters that a dialogue has at most (about 270 tokens)."""
LENGTH, VOCABULARY, ANSWER = 512, 2048, 64
"""Tokens: of a dialogue at most, of the tokenizer, of a sampled answer at most."""
STEPS, BATCH = 120, 8
"""Of each variant; of labelled answers, a batch has twice as many."""
LLAMA = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "dpo": ("DPO", {"beta": 0.1}, 5e-4),
    "cdpo": ("DPO", {"beta": 0.1, "label_smoothing": 0.1}, 5e-4),
    "robust": ("DPO", {"beta": 0.1, "label_smoothing": 0.1, "robust": True}, 5e-4),
    "dpo-by-token": ("DPO", {"beta": 2.0, "length_normalized": True}, 1.5e-4),
    "ipo": ("IPO", {"beta": 0.1}, 1e-4),
    "hinge": ("Hinge", {"beta": 0.1}, 5e-4),
    "sppo": ("SPPO", {"beta": 0.1}, 5e-4),
    "apo-zero": ("APO", {"beta": 0.1, "kind": "zero"}, 5e-4),
    "apo-down": ("APO", {"beta": 2.0, "kind": "down"}, 1e-4),
    "simpo": ("SimPO", {"beta": 2.0, "gamma": 1.0}, 1e-4),
    "cpo": ("CPO", {"beta": 0.1}, 5e-4),
    "orpo": ("ORPO", {"beta": 0.25}, 5e-4),
    "kto": ("KTO", {"beta": 0.1}, 5e-4),
    "bco": ("BCO", {"beta": 0.1}, 5e-4),
}
"""Objective, its arguments, learning rate."""
LABELLED = ("KTO", "BCO")
ADAM, REWARD_RATE = "torch.optim.AdamW", 5e-4
Row = dict[str, Any]
Estimate = tuple[float, float]
"""A mean and its standard error."""


# --- arithmetic


def estimate(values: Sequence[float]) -> Estimate:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def wins(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """1 where the own score is higher, a half where both are the same."""
    return [0.5 if a == b else float(a > b) for a, b in zip(own, other, strict=True)]


def at_equal_length(won: Sequence[float], longer: Sequence[float]) -> Estimate:
    """Where the straight line (least squares) through wins over differences in length meets a difference of zero."""
    count, mean = len(won), statistics.mean(longer)
    spread = sum((x - mean) ** 2 for x in longer)
    if not spread:
        return estimate(won)
    slope, intercept = statistics.linear_regression(longer, won)
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(longer, won, strict=True)) / (count - 2)
    return intercept, (left * (1 / count + mean**2 / spread)) ** 0.5


def over_seeds(found: Sequence[Estimate]) -> Estimate:
    """The mean of seeds, with the error that those of the rows give it, as if seeds had no rows in common."""
    return statistics.mean(mean for mean, _ in found), sum(error**2 for _, error in found) ** 0.5 / len(found)


# --- data


def deal(data: Path, folder: Path, seed: int) -> None:
    """Writes the pairs of both parts, the dialogues of the first, the prompts and the answers of the second."""
    from llm_modules.data.preferences import NoPair, preference_pair
    from llm_modules.data.readers import read_file

    parts: dict[str, list[Row]] = {name: [] for name in ("train", "dialogues", "held_out", "prompts", "answers")}
    openings: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for row in (row for name in FILES for row in read_file(data / "hh_rlhf" / f"{name}.jsonl", "jsonl", None)):
        try:
            pair = preference_pair(row)
        except NoPair:
            continue
        before = sum(len(message["content"]) for message in pair.prompt)
        answers = [pair.chosen["content"], pair.rejected["content"]]
        if before + max(map(len, answers)) > CHARACTERS:
            continue
        opening = pair.prompt[0]["content"]
        drawn = int(hashlib.sha256(f"{seed} {opening}".encode()).hexdigest()[:8], 16) / 16**8
        part = "held_out" if drawn < HELD_OUT else "train"
        openings[part].add(opening)
        parts[part].append({"messages": pair.prompt, "chosen": answers[0], "rejected": answers[1]})
        if part == "train":
            # Both: a model that knew the chosen ones only would be told them apart by what it has seen.
            parts["dialogues"] += [{"messages": [*pair.prompt, answer]} for answer in (pair.chosen, pair.rejected)]
        else:
            parts["prompts"].append({"prompt": pair.prompt})
            parts["answers"] += [{"prompt": pair.prompt, "completion": text} for text in answers]
    assert not openings["train"] & openings["held_out"]
    for name, rows in parts.items():
        write(folder / f"{name}.jsonl", rows)


def write(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- training


def recipes(folder: Path, *words: str) -> None:
    """`recipes WORDS` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "recipes", *words]
    with (folder / "log").open("a") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"benchmarks: recipes {' '.join(words)} failed (log {folder / 'log'})")


def fit(folder: Path, name: str, seed: int, recipe: str, model: Row, data: Row, trainer: Row) -> None:
    """Trains what a recipe describes but for what is given here, unless ``folder / name`` is there already."""
    if (folder / name).is_dir():
        return
    change = {"tokenizer": "tokenizer", "sequence_length": LENGTH, "model": model, "data": data, "trainer": trainer}
    (folder / f"{name}.yaml").write_text(json.dumps(change, indent=1))
    runs = f"runs-{name}-{time.time():.0f}"  # one that was broken off stays as it is
    recipes(folder, "fit", "-c", recipe, "-c", f"{name}.yaml", "--seed_everything", str(seed), "--runs_dir", runs)
    (export,) = (folder / runs).rglob("export")
    export.rename(folder / name)


def model_of(module: str, objective: str, arguments: Row, optimizer: str, rate: float, **more: Any) -> Row:
    return {
        "class_path": f"llm_modules.{module}",
        "init_args": {
            "objective": {"class_path": f"llm_modules.objectives.{objective}", "init_args": arguments},
            "optimizer": {"class_path": optimizer, "init_args": {"lr": rate}},
            **more,
        },
    }


def data_of(module: str, rows: str, batch: int, **more: Any) -> Row:
    common = {"sources": [{"path": rows}], "validation_fraction": 0.0, "batch_size": batch, "cache_dir": "cache"}
    return {"class_path": f"llm_modules.data.{module}", "init_args": common | more}


def make_base(folder: Path, data: Path, seed: int) -> None:
    if not (folder / "answers.jsonl").exists():
        deal(data, folder, seed)
    if not (folder / "tokenizer").is_dir():
        words = ("--source", "dialogues.jsonl", "--vocab_size", str(VOCABULARY), "--out", "tokenizer")
        recipes(folder, "prepare", "tokenizer", *words)
    muon = "llm_modules.optimizers.MuonAdamW"
    model = model_of("LanguageModelModule", "NextToken", {}, muon, 1e-2, backbone={"source": None, "config": LLAMA})
    rows = data_of("ConversationDataModule", "dialogues.jsonl", 2, train_on="all")
    fit(folder, "base", seed, "sft/oasst1", model, rows, {"max_epochs": 2})


def make_reward(folder: Path, seed: int) -> None:
    arguments: Row = {"centering": 0.01}
    model = model_of("RewardModule", "BradleyTerry", arguments, ADAM, REWARD_RATE, backbone={"source": "base"})
    rows = data_of("PreferenceDataModule", "train.jsonl", 16)
    fit(folder, "reward", seed, "reward/hh", model, rows, {"max_epochs": 2})


def make_policy(folder: Path, name: str, seed: int) -> None:
    objective, arguments, rate = VARIANTS[name]
    labelled = objective in LABELLED
    module, batch = ("LabelledDataModule", 2 * BATCH) if labelled else ("PreferenceDataModule", BATCH)
    more: Row = {"backbone": {"source": "base"}, "reference": "copy" if labelled else "cached"}
    model = model_of("PreferenceModule", objective, arguments, ADAM, rate, **more)
    fit(folder, name, seed, "preference/hh", model, data_of(module, "train.jsonl", batch), {"max_steps": STEPS})


# --- measuring


def answered(folder: Path, name: str, seed: int) -> list[Row]:
    """Sampled answers of a model to the held-out prompts, each with its score and tokens."""
    from recipes.__main__ import main

    out, scored = folder / f"{name}-answers.jsonl", folder / f"{name}-scored.jsonl"
    if not scored.exists():
        words = ["generate", "-m", str(folder / name), "--file", str(folder / "prompts.jsonl"), "--out", str(out)]
        words += ["--strategy", "sample", "--temperature", "0.7", "--max_new_tokens", str(ANSWER), "--seed", str(seed)]
        assert main([*words, "--batch_size", "100", "--overwrite"]) == 0
        score(folder, out, scored)
    return read(scored)


def score(folder: Path, file: Path, out: Path) -> None:
    from recipes.__main__ import main

    assert main(["score", "-m", str(folder / "reward"), "--file", str(file), "--out", str(out)]) == 0


def log_probabilities(model: Path, pairs: Sequence[Row]) -> list[list[float]]:
    """log p(chosen | prompt), log p(rejected | prompt), and the tokens of both, of each pair."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    rows = []
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["messages"], add_generation_prompt=True, tokenize=False)
        for side in ("chosen", "rejected"):
            answer = [*pair["messages"], {"role": "assistant", "content": pair[side]}]
            whole = tokenizer.apply_chat_template(answer, tokenize=False)
            assert whole.startswith(prompt)
            # As the recipes do: what is predicted ends with the mark that ends a turn.
            parts = prompt, whole.removeprefix(prompt).rstrip("\n")
            rows.append([tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts])
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    sums = [0.0] * len(rows)
    for places in (order[i : i + 16] for i in range(0, len(order), 16)):
        ids = [torch.tensor(rows[i][0] + rows[i][1]) for i in places]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        with torch.no_grad():
            logits = network(padded).logits[:, :-1]  # what is behind an answer cannot be seen from it
        found = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
        for place, row in zip(places, found, strict=True):
            before, answer = map(len, rows[place])
            sums[place] = float(row[before - 1 : before + answer - 1].double().sum())
    lengths = [float(len(answer)) for _, answer in rows]
    return [[*sums[i : i + 2], *lengths[i : i + 2]] for i in range(0, len(rows), 2)]


def log_probabilities_of(folder: Path, name: str) -> list[list[float]]:
    kept = folder / f"{name}-logprobs.json"
    if not kept.exists():
        kept.write_text(json.dumps(log_probabilities(folder / name, read(folder / "held_out.jsonl"))))
    found: list[list[float]] = json.loads(kept.read_text())
    return found


def measured_reward(folder: Path) -> dict[str, Estimate]:
    """Of the held-out pairs: how often the chosen answer has the higher score, how often it is the longer one, and how
    often the longer one has the higher score."""
    if not (folder / "answers-scored.jsonl").exists():
        score(folder, folder / "answers.jsonl", folder / "answers-scored.jsonl")
    rows = read(folder / "answers-scored.jsonl")
    chosen, rejected = ([row["score"] for row in rows[side::2]] for side in (0, 1))
    lengths = [[float(len(row["completion"])) for row in rows[side::2]] for side in (0, 1)]
    right, longer = wins(chosen, rejected), wins(*lengths)
    follows = [1 - abs(a - b) for a, b in zip(right, longer, strict=True)]
    return {"accuracy": estimate(right), "longer": estimate(longer), "follows": estimate(follows)}


def measured(folder: Path, name: str, seed: int) -> dict[str, Estimate]:
    """Of one variant, against the base; margins in nats, lengths in tokens."""
    before, after = log_probabilities_of(folder, "base"), log_probabilities_of(folder, name)
    moved = [(a[0] - b[0], a[1] - b[1], a[2], a[3]) for a, b in zip(after, before, strict=True)]
    own, base = answered(folder, name, seed), answered(folder, "base", seed)
    won = wins([row["score"] for row in own], [row["score"] for row in base])
    longer = [float(a["completion_tokens"] - b["completion_tokens"]) for a, b in zip(own, base, strict=True)]
    return {
        "margin": estimate([chosen - rejected for chosen, rejected, _, _ in moved]),
        "margin_by_token": estimate([chosen / c - rejected / r for chosen, rejected, c, r in moved]),
        "chosen": estimate([chosen for chosen, *_ in moved]),
        "win_rate": estimate(won),
        "win_rate_equal_length": at_equal_length(won, longer),
        "tokens": estimate([float(row["completion_tokens"]) for row in own]),
        "tokens_base": estimate([float(row["completion_tokens"]) for row in base]),
    }


def table(found: dict[str, dict[int, dict[str, Estimate]]], columns: dict[str, tuple[str, float]]) -> str:
    """Markdown: for each variant the mean over seeds with its standard error, and the smallest and the largest seed."""
    lines = [f"| | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in found.items():
        cells = []
        for key, factor in columns.values():
            values = [seed[key] for seed in seeds.values()]
            mean, error = over_seeds(values)
            least, most = (f"{extreme(value for value, _ in values) * factor:.1f}" for extreme in (min, max))
            cells.append(f"{mean * factor:.1f} ± {error * factor:.1f} ({least} to {most})")
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


OF_REWARD = {
    "right, %": ("accuracy", 100),
    "the longer is chosen, %": ("longer", 100),
    "the longer is preferred, %": ("follows", 100),
}
OF_VARIANTS = {
    "margin, nats": ("margin", 1),
    "margin by token, nats per 100": ("margin_by_token", 100),
    "log p(chosen)": ("chosen", 1),
    "win rate, %": ("win_rate", 100),
    "at equal length, %": ("win_rate_equal_length", 100),
    "tokens": ("tokens", 1),
    "tokens of the base": ("tokens_base", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/results/preference")
    options = parser.parse_args()
    if "LITRECIPES_DATA" not in os.environ:
        parser.error("LITRECIPES_DATA: not set; the folder that holds hh_rlhf/")
    data = Path(os.environ["LITRECIPES_DATA"]).absolute()
    rewards: dict[str, dict[int, dict[str, Estimate]]] = {"reward model": {}}
    variants: dict[str, dict[int, dict[str, Estimate]]] = {name: {} for name in options.variants}
    for seed in options.seeds:
        folder = options.work.absolute() / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        make_base(folder, data, seed)
        make_reward(folder, seed)
        rewards["reward model"][seed] = measured_reward(folder)
        say(seed, "reward model", rewards["reward model"][seed])
        for name in options.variants:
            make_policy(folder, name, seed)
            variants[name][seed] = measured(folder, name, seed)
            say(seed, name, variants[name][seed])
    print(f"\n{table(rewards, OF_REWARD)}\n\n{table(variants, OF_VARIANTS)}")


def say(seed: int, name: str, found: dict[str, Estimate]) -> None:
    print(f"seed {seed} {name}: {', '.join(f'{k} {m:.3f} ± {e:.3f}' for k, (m, e) in found.items())}", flush=True)


if __name__ == "__main__":
    main()
