"""`recipes score`: answers get a reward model's scores; kept are all, the best, pairs, or those good enough."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recipes.errors import UserError
from recipes.yaml_tree import display

if TYPE_CHECKING:
    from llm_modules.zoo.reward_model import RewardModel

Row = dict[str, Any]
Message = dict[str, Any]


class Talk(NamedTuple):
    """A prompt with an answer, and the functions that it offers."""

    messages: list[Message]
    tools: list[Any] | None


POSITIONS = 4096
"""Tokens scored at once, at least one answer."""

EPILOG = """examples:
  recipes generate -m MODEL --file prompts.jsonl --out answers.jsonl --strategy sample --samples 8
  recipes score -m runs/reward/hh/0 --file answers.jsonl --out scores.jsonl               every answer, its score
  recipes score -m runs/reward/hh/0 --file answers.jsonl --out best.jsonl --keep best     of 8 the best, to fine-tune on
  recipes score -m runs/reward/hh/0 --file answers.jsonl --out pairs.jsonl --keep pairs   best and worst, for DPO
  recipes score -m runs/reward/hh/0 --file answers.jsonl --out good.jsonl --keep above --above 1.0
  recipes score -m runs/reward/hh/0 --file answers.jsonl --out good.jsonl --keep better --over plain.jsonl
      (answers under a preprompt, and without it: where to distil the context, as in Llama 2)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("-m", "--model", required=True, metavar="FOLDER", help="a reward model's folder, or its run")
    parser.add_argument(
        "--file",
        required=True,
        type=Path,
        metavar="JSONL",
        help="rows with `prompt` (text or messages) and `completion`, and, if there are any, a `system` message and "
        "`tools`",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="JSONL", help="where the rows go; written whole")
    parser.add_argument(
        "--keep",
        choices=("all", "best", "pairs", "above", "better"),
        default="all",
        help="all: each row with its `score`; best: of the answers to a prompt, as `messages`; pairs: best and worst, "
        "as `chosen` and `rejected`; above: all above --above, as `messages`; better: all that score higher than every "
        "answer to the same prompt in --over, as `messages` (default: all)",
    )
    parser.add_argument("--above", type=float, metavar="SCORE", help="goes with --keep above")
    parser.add_argument("--over", type=Path, metavar="JSONL", help="goes with --keep better: rows as those of --file")
    parser.add_argument("--overwrite", action="store_true", help="write over --out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")


def run(args: argparse.Namespace) -> int:
    if (args.above is None) == (args.keep == "above"):
        raise UserError("--above SCORE goes with --keep above, and the other way round")
    if args.above is not None and not math.isfinite(args.above):
        raise UserError(f"--above {args.above}: no score can be compared with that; give a finite number")
    if (args.over is None) == (args.keep == "better"):
        raise UserError("--over FILE goes with --keep better, and the other way round")
    for flag, file in (("--file", args.file), ("--over", args.over)):
        if file is not None and not file.is_file():
            raise UserError(f"{flag} {file}: no such file")
    sources = [file for file in (args.file, args.over) if file is not None]
    if args.out.exists() and (not args.overwrite or any(map(args.out.samefile, sources))):
        raise UserError(
            f"--out {args.out}: is there; name another file, or --overwrite (never --file or --over itself)"
        )
    rows, talks = read_rows(args.file)
    others = read_rows(args.over, "--over") if args.over is not None else ([], [])
    folder = reward_folder(args.model)
    scores = Scorer(folder, args.device)([*talks, *others[1]], [*rows, *others[0]])
    scores, scores_over = scores[: len(talks)], scores[len(talks) :]
    scored = [row | {"score": score} for (_, row), score in zip(rows, scores, strict=True)]
    if args.over is None:
        kept, passed = select(scored, talks, args.keep, args.above)
    else:
        kept, passed = better(scored, talks, best_scores(others[1], scores_over), args.over), 0
    write(args.out, kept)
    mean, lost = sum(scores) / len(scores), sum("score" in row for _, row in rows) if args.keep == "all" else 0
    notes = [
        f"; {passed} prompts have no two answers of different scores" if passed else "",
        f"; none is above {args.above:g}, the highest is {max(scores):.3f}"
        if args.keep == "above" and not kept
        else "",
        f"; in {lost} rows `score` held something else, which is not kept" if lost else "",
    ]
    about = f"{len(kept)} rows of {len(rows)} answers, mean score {mean:.3f}"
    print(f"{display(args.out.absolute())}: {about}{''.join(notes)}", file=sys.stderr)
    return 0


def read_rows(file: Path, flag: str = "--file") -> tuple[list[tuple[str, Row]], list[Talk]]:
    """(place, row) of each answer, and the conversation that it ends.

    Raises:
        UserError: no prompt or no answer in a row.
    """
    from llm_modules.data.chat import tools_of, with_system
    from llm_modules.data.readers import read_file

    rows, talks = [], []
    for row in read_file(file, "jsonl", None):
        place, columns = f"{display(file)}:{row.number}", row.columns
        prompt, answer = columns.get("prompt"), columns.get("completion")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt or not isinstance(answer, str):
            there = ", ".join(map(str, columns)) or "none"
            raise UserError(
                f"{place}: a row needs `prompt` (text or messages) and `completion` (text); there are: {there}"
            )
        for message in prompt:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise UserError(f"{place}: a message of the prompt has no role or no content: {message!r:.80}")
        rows.append((place, columns))
        talks.append(Talk([*with_system(row, prompt), {"role": "assistant", "content": answer}], tools_of(row)))
    if not rows:
        raise UserError(f"{flag} {file}: the file is empty")
    return rows, talks


def reward_folder(name: str) -> Path:
    """The folder of a reward model.

    Raises:
        UserError: there is none, or it is of a language model.
    """
    from transformers import AutoConfig

    from llm_modules.zoo.reward_model import is_classifier
    from recipes.open_model import find_model

    found = find_model(name)
    if not isinstance(found, Path):
        raise UserError(f"-m {name}: name a folder")
    if not is_classifier(AutoConfig.from_pretrained(found)):
        raise UserError(
            f"-m {name}: a language model, no reward model; make one with: recipes fit -c reward/quickstart"
        )
    return found


def shown(talk: Talk) -> Row:
    """A conversation as columns of a row."""
    return {"messages": talk.messages} | ({} if talk.tools is None else {"tools": talk.tools})


class Scorer:
    """A reward model with its tokenizer and chat template.

    Args:
        folder: as `recipes fit` of a ``RewardModule`` leaves it.
        device: as of ``open_model``.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from llm_modules.tokenizer import load_tokenizer
        from recipes.open_model import open_device

        self.device, self.folder = open_device(device), folder
        self.tokenizer = load_tokenizer(str(folder))
        if not self.tokenizer.is_fast:
            raise UserError(f"-m {display(folder)}: its tokenizer has no tokenizer.json, which is needed")
        if not self.tokenizer.chat_template:
            raise UserError(f"-m {display(folder)}: its tokenizer has no chat template, under which it was trained")

    def __call__(self, talks: Sequence[Talk], rows: Sequence[tuple[str, Row]]) -> list[float]:
        """The score of each conversation at its last token, in their order.

        Raises:
            UserError: one has tools that the template leaves out, or more tokens than the model has positions, or its
                score is not finite.
        """
        from llm_modules.data.masks import shows_tools
        from llm_modules.evaluation.plain_answers import encode_conversation
        from llm_modules.zoo import Backbone

        for (place, _), talk in zip(rows, talks, strict=True):
            if talk.tools and not shows_tools(self.tokenizer):
                raise UserError(
                    f"{place}: has tools, and the chat template of -m {display(self.folder)} leaves them out: the "
                    "reward model would not see them; train it with one that shows them, such as chatml"
                )
        ids = [encode_conversation(self.tokenizer, talk.messages, talk.tools) for talk in talks]
        longest = max(map(len, ids))
        backbone = Backbone(source=str(self.folder))
        config = backbone.model_config(vocabulary=len(self.tokenizer))
        positions = getattr(config.get_text_config(), "max_position_embeddings", longest)
        if longest > positions:
            place, _ = rows[next(i for i, tokens in enumerate(ids) if len(tokens) == longest)]
            raise UserError(f"{place}: {longest} tokens, more than the reward model's {positions} positions")
        model: Any = backbone.build(tokenizer=self.tokenizer, sequence_length=longest, seed=0, scalar=True)
        model.to(self.device).eval()
        scores: list[float] = []
        for part in _parts(ids, 1 if model.packing_problem else POSITIONS):
            scores += _scores(model, part, self.device)
        for (place, _), score in zip(rows, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(f"{place}: its score is {score}; -m {display(self.folder)}: are its weights finite?")
        return scores


def _parts(ids: Sequence[list[int]], positions: int) -> Iterator[list[list[int]]]:
    """Neighbours that together have at most so many tokens, or one that has more."""
    part: list[list[int]] = []
    for tokens in ids:
        if part and sum(map(len, part)) + len(tokens) > positions:
            yield part
            part = []
        part.append(tokens)
    yield part


def _scores(model: RewardModel, part: list[list[int]], device: Any) -> list[float]:
    import torch

    ends = torch.tensor([0, *map(len, part)]).cumsum(0)
    row = torch.tensor([token for tokens in part for token in tokens])[None]
    places = torch.cat([torch.arange(len(tokens)) for tokens in part])[None]
    offsets = None if model.packing_problem else ends.int().to(device)
    with torch.no_grad():
        found = model(row.to(device), places.to(device), ends[1:].to(device) - 1, offsets, max(map(len, part)))
    return [float(score) for score in found]


def select(scored: list[Row], talks: list[Talk], keep: str, above: float | None) -> tuple[list[Row], int]:
    """The rows to be written, and how many prompts have nothing to choose between (of which ``pairs`` has no row)."""
    if keep == "all":
        return scored, 0
    if above is not None:
        return [shown(talk) | {"score": row["score"]} for row, talk in zip(scored, talks, strict=True)
                if row["score"] > above], 0  # fmt: skip
    kept, passed = [], 0
    groups: dict[str, list[tuple[Row, Talk]]] = {}
    for row, talk in zip(scored, talks, strict=True):
        groups.setdefault(prompt_key(talk), []).append((row, talk))
    for group in groups.values():
        answers = sorted(group, key=lambda item: -item[0]["score"])  # the first of equals stays first
        (best, talk), (worst, other) = answers[0], answers[-1]
        same = best["score"] == worst["score"]
        passed += same
        if keep == "best":
            kept.append(shown(talk) | {"score": best["score"], "of": len(answers)})
        elif not same:
            texts = {"chosen": talk.messages[-1]["content"], "rejected": other.messages[-1]["content"]}
            kept.append(
                shown(talk._replace(messages=talk.messages[:-1])) | texts | {"scores": [best["score"], worst["score"]]}
            )
    return kept, passed


def prompt_key(talk: Talk) -> str:
    return json.dumps([talk.messages[:-1], talk.tools], sort_keys=True)


def best_scores(talks: list[Talk], scores: list[float]) -> dict[str, float]:
    """Of each prompt that of its best answer."""
    best: dict[str, float] = {}
    for talk, score in zip(talks, scores, strict=True):
        best[prompt_key(talk)] = max(score, best.get(prompt_key(talk), score))
    return best


def better(scored: list[Row], talks: list[Talk], over: dict[str, float], file: Path) -> list[Row]:
    """The answers that score higher than the best other one to their prompt.

    Raises:
        UserError: there is no other one.
    """
    kept = []
    for row, talk in zip(scored, talks, strict=True):
        if (other := over.get(prompt_key(talk))) is None:
            raise UserError(
                f"--over {file}: no answer to the prompt {display_prompt(talk)}; it needs one to each prompt"
            )
        if row["score"] > other:
            kept.append(shown(talk) | {"score": row["score"], "over": other})
    return kept


def display_prompt(talk: Talk) -> str:
    text = str(talk.messages[-2]["content"])
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def write(out: Path, rows: Iterable[Row]) -> None:
    """Whole, or not at all."""
    temporary = out.with_name(f".{out.name}-partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
