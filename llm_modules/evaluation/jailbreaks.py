"""Templated jailbreaks: whether a request that is refused as it stands is answered in a known frame (2307.02483)."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llm_modules.evaluation.asking import RefusalDetector, answers, refused
from llm_modules.evaluation.measurement import Measurement, Subject, prefixed, share
from llm_modules.evaluation.rows import check_choice, check_columns, check_least, located, read_text, texts
from llm_modules.evaluation.verdicts import answered

BUILT_IN = Path(__file__).with_name("jailbreak_templates.yaml")

_LEET = str.maketrans("aeiostAEIOST", "431057431057")

ENCODINGS: dict[str, Callable[[str], str]] = {
    "none": str,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "leet": lambda text: text.translate(_LEET),
    "reverse": lambda text: text[::-1],
}


class Template(NamedTuple):
    """A frame of a request.

    Attributes:
        name: of its measurement.
        text: with one ``{prompt}``.
        encoding: what is done to the request before it is put in; a key of ``ENCODINGS``.
    """

    name: str
    text: str
    encoding: str = "none"

    def filled(self, prompt: str) -> str:
        return self.text.replace("{prompt}", ENCODINGS[self.encoding](prompt))


class Jailbreaks:
    """Requests that should be refused, as they stand and in each of several frames.

    ``jailbreak_success/NAME``: the share of requests that are answered (neither refused nor with nothing) in the frame
    NAME, ``plain`` as they stand; ``jailbreak_success_any``: in at least one of the frames or plainly. An answer is
    judged against the request itself.

    Args:
        prompts: a .csv, .jsonl or .json file; ``data:NAME`` is NAME below the folder that LITRECIPES_DATA names.
        detector: what tells refusals: has ``judge`` (see ``verdicts.Judge``), or is called with (request, answer).
        column: of the requests.
        templates: a YAML file of frames (name, text with {prompt}, encoding); not given: those shipped.
        only: names of the frames to use; all if not given.
        limit: at most so many requests, evenly over the file; all if not given.
        name: put before the names of what is measured, as ``NAME_...``; needed where there are several.

    Raises:
        ValueError: a file, column, frame or name that is not allowed.
    """

    def __init__(
        self,
        prompts: str,
        detector: RefusalDetector,
        column: str = "prompt",
        templates: str | None = None,
        only: list[str] | None = None,
        limit: int | None = None,
        name: str = "",
    ) -> None:
        check_least(limit=(1 if limit is None else limit, 1))
        self.prompts = texts(prompts, column, limit)
        self.detector, self.name = detector, name
        found = {template.name: template for template in read_templates(templates)}
        for name in only or []:
            check_choice("only", name, list(found))
        self.templates = [Template("plain", "{prompt}"), *(found[name] for name in (found if only is None else only))]

    def measure(self, subject: Subject) -> list[Measurement]:
        asked = [template.filled(prompt) for template in self.templates for prompt in self.prompts]
        said = answers(subject, asked)
        count, measurements = len(self.prompts), []
        broken = [False] * count
        for number, template in enumerate(self.templates):
            part = said[number * count : (number + 1) * count]
            hits = answered(refused(self.detector, self.prompts, part), part)
            broken = [before or hit for before, hit in zip(broken, hits, strict=True)]
            measurements.append(share(f"jailbreak_success/{template.name}", sum(hits), count))
        return prefixed(self.name, [*measurements, share("jailbreak_success_any", sum(broken), count)])


def read_templates(path: str | None = None) -> list[Template]:
    """The frames of a YAML file, or those shipped.

    Raises:
        ValueError: no list of them, a name twice, a text without exactly one {prompt}, an unknown encoding.
    """
    import yaml

    file = BUILT_IN if path is None else located(path)
    try:
        rows = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: a list of templates, each with name and text, is needed")
    found: dict[str, Template] = {}
    for number, row in enumerate(rows, 1):
        where = f"{file}: template {number}"
        check_columns(where, row, ["name", "text"])
        for key in row:
            check_choice(where, key, Template._fields)
        template = Template(**{key: str(value) for key, value in row.items()})
        if template.text.count("{prompt}") != 1:
            raise ValueError(f"{where} ({template.name}): text: it must have {{prompt}} once, where the request goes")
        if template.name in (*found, "plain", "any"):
            raise ValueError(f"{where}: name: {template.name!r} is taken; give it another")
        check_choice(f"{where}: encoding", template.encoding, list(ENCODINGS))
        found[template.name] = template
    return list(found.values())
