"""RecipeCLI: LightningCLI fed with one merged config. It checks and builds; it writes nothing."""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

import callbacks as ours
from recipes.compose import LINKED, Composed
from recipes.diagnose import Diagnosis, fields_of, find_class
from recipes.errors import UserError, one_line
from recipes.run_folder import is_secret
from recipes.yaml_tree import display

RUN_FOLDER = "{run_folder}"  # in a logger's arguments: stands for the run's folder, which is not yet made
DEFAULT_CALLBACKS = ("Throughput",)


class RecipeCLI(LightningCLI):
    """Parses, then (`instantiate`) builds trainer, model and data of a merged config.

    Args:
        composed: the merged config.

    Raises:
        UserError: the config is wrong; one line a problem.
    """

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            seed_everything_default=1234,
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={"exit_on_error": False},
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--tokenizer", type=str | None, default=None, help="folder, hub id or builtin:bytes")
        parser.add_argument("--sequence_length", type=int | None, default=None, help="longest row in tokens")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder that runs are written below")
        parser.add_lightning_class_args(ours.StepCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        values = deepcopy(self.composed.values)
        _place_loggers(values)
        _keep_seed_where_taken(values)
        try:
            self.config = parser.parse_object(values)
        except (ArgumentError, TypeError, ValueError) as error:
            problems = Diagnosis(parser, self.composed, values).problems
            place = display(self.composed.files[0])
            raise UserError("\n".join(problems or [f"{place}: {one_line(error)}"])) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters override the config; the config is what is asked for."""

    def instantiate_classes(self) -> None:
        """Nothing yet: parsing comes first, `instantiate` when it is wanted."""

    def instantiate(self) -> None:
        """Builds the objects of the config (no weights yet: these come in the module's `configure_model`)."""
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer without its loggers, which need the run's folder."""
        config = self.config_init["trainer"]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(ours.AtomicCheckpointIO())
        given = config.get("callbacks") or []
        config["callbacks"] = with_defaults(given if isinstance(given, list) else [given])
        return super().instantiate_trainer(plugins=plugins, logger=False, **kwargs)

    def check_before_training(self) -> None:
        """Prepares and audits the data and checks the model against it, before anything of the run is written."""

    def loggers(self, folder: Path) -> list[Logger]:
        """Our metrics.csv, and the loggers of the config (TensorBoard where it names none; none for `logger: false`)."""
        chosen = self.config.trainer.logger
        if chosen is False:
            return []
        csv = ours.MetricsCSV(folder)
        if chosen is None or chosen is True:
            return [csv, TensorBoardLogger(str(folder), name="", version="tensorboard")]
        text = yaml.safe_load(self.parser.dump(self.config, skip_validation=True))["trainer"]["logger"]
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--logger", type=list[Logger])
        chosen = text if isinstance(text, list) else [text]
        config = parser.parse_object({"logger": _fill(chosen, str(folder))})
        return [csv, *parser.instantiate_classes(config).logger]

    def config_text(self) -> str:
        """The resolved config as YAML that runs again: with all defaults, without what is linked, without secrets."""
        values = yaml.safe_load(self.parser.dump(self.config, skip_validation=True, skip_none=False))
        for top, name in LINKED.items():
            for part in ("model", "data"):
                arguments = (values.get(part) or {}).get("init_args", {})
                if values.get(top) is not None and arguments.get(name) == values[top]:
                    del arguments[name]
        return yaml.safe_dump(_redact(values), sort_keys=False, allow_unicode=True, width=120)


def with_defaults(given: list[Callback]) -> list[Callback]:
    """The user's callbacks and those of ours that they did not set themselves."""
    added = [getattr(ours, name) for name in DEFAULT_CALLBACKS]
    return [*given, *(kind() for kind in added if not any(isinstance(callback, kind) for callback in given))]


def _keep_seed_where_taken(values: dict[str, Any]) -> None:
    """`seed_everything` seeds all; a class that has no `seed` of its own needs none."""
    for part in ("model", "data"):
        chosen = values.get(part)
        if not isinstance(chosen, dict) or "seed" not in (chosen.get("init_args") or {}):
            continue
        try:
            fields = fields_of(find_class(str(chosen["class_path"]), [LightningModule, LightningDataModule]))
        except UserError:
            continue  # said, with its place, when the whole is parsed
        if "seed" not in fields:
            del chosen["init_args"]["seed"]


def _place_loggers(values: dict[str, Any]) -> None:
    """Loggers that write files write them into the run's folder, where the config does not say otherwise."""
    import lightning.pytorch.loggers as known

    loggers = (values.get("trainer") or {}).get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(logger, dict) or "class_path" not in logger:
            continue
        kind = getattr(known, str(logger["class_path"]).rpartition(".")[2], None)
        if kind is not None and "save_dir" in inspect.signature(kind).parameters:
            logger["init_args"] = {"save_dir": RUN_FOLDER, **(logger.get("init_args") or {})}


def _fill(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, folder) for item in value]
    return value.replace(RUN_FOLDER, folder) if isinstance(value, str) else value


def _redact(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, key) for item in value]
    return "***" if value and isinstance(value, str) and is_secret(key) else value
