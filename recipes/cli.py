"""RecipeCLI: LightningCLI fed with one merged config. It checks and builds; it writes nothing."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from argparse import ArgumentError
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment

import callbacks as ours
from recipes.compose import LINKED, Composed
from recipes.diagnose import Diagnosis, fields_of, find_class
from recipes.errors import UserError, one_line, raised_in, user_message
from recipes.hardware import check_gpus, check_strategy
from recipes.ranks import end_on_sigterm, under_srun
from recipes.redaction import redact_config
from recipes.run_folder import RunFolder
from recipes.yaml_tree import display

RUN_FOLDER = "{run_folder}"  # in a logger's arguments: stands for the run's folder, which is not yet made
DEFAULT_CALLBACKS = (
    "Throughput",
    "Memory",
    "SpikeGuard",
    "MaskAudit",
    "GracefulStop",
    "ExportFolder",
    "ScoreHistogram",
    "RunReport",
    "PredictionsWriter",
    "RecipeProgress",
)
TRAINER_DEFAULTS = {"use_distributed_sampler": False, "enable_model_summary": False, "log_every_n_steps": 10}


class RecipeCLI(LightningCLI):
    """Parses, then (`instantiate`) builds trainer, model and data of a merged config.

    Args:
        composed: the merged config.

    Raises:
        UserError: the config is wrong; one line a problem.
    """

    def __init__(self, composed: Composed) -> None:
        quiet()
        self.composed = composed
        self.folder: Path | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            seed_everything_default=1234,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"exit_on_error": False},
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--tokenizer", type=str | None, default=None, help="folder, hub id or builtin:bytes")
        parser.add_argument("--sequence_length", type=int | None, default=None, help="longest row in tokens")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder that runs are written below")
        names = "callbacks that are there by default and are not wanted: " + ", ".join(DEFAULT_CALLBACKS)
        parser.add_argument("--leave_out", type=list[Literal[DEFAULT_CALLBACKS]], default=[], help=names)  # type: ignore[valid-type]
        parser.add_lightning_class_args(ours.StepCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        values = self._values = deepcopy(self.composed.values)
        _place_loggers(values)
        _keep_seed_where_taken(values)
        _lengthen_rewards(values)
        try:
            self.config = parser.parse_object(deepcopy(values))  # it changes what it is given
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
        whole = self.config
        self.config = whole.clone()
        self.config.trainer.logger = None  # made when the run's folder is known, see `loggers`
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            # jsonargparse wraps what a class says of its arguments, and lets a few wrong types pass until here.
            own = _our_cause(error)
            if own is not None:
                raise own from None
            problems = Diagnosis(self.parser, self.composed, self._values).problems
            if problems:
                raise UserError("\n".join(problems)) from error
            raise
        finally:
            self.config = whole

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer without its loggers, which need the run's folder."""
        config = self.config_init["trainer"]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(ours.AtomicCheckpointIO())
        if under_srun() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            # Its requeueing saves from inside the signal handler, in the middle of a step; ours is in requeue.py.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        given = config.get("callbacks") or []
        config["callbacks"] = self._with_defaults(given if isinstance(given, list) else [given])
        check_gpus(self.composed, config.get("accelerator"), config.get("devices"))
        try:
            trainer = super().instantiate_trainer(plugins=plugins, logger=False, **kwargs)
        except TypeError as error:
            if "`devices`" not in str(error) or not raised_in(error.__traceback__, ("lightning",)):
                raise
            place = self.composed.origin(("trainer", "devices"))
            raise UserError(f"{place}: `trainer.devices` is {config.get('devices')!r}: {one_line(error)}") from error
        check_strategy(self.composed, trainer)
        end_on_sigterm(trainer)
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ours.StepCheckpoint)]
        self._place = _RunPlace(self)
        return super()._instantiate_trainer(config, [self._place, *callbacks])

    def _with_defaults(self, given: list[Callback]) -> list[Callback]:
        """The config's callbacks, and those of ours that it neither sets itself nor leaves out."""
        trainer = self.config_init["trainer"]
        left_out = set(self.config.leave_out)
        if trainer.get("enable_progress_bar") is False:
            left_out.add("RecipeProgress")
        if trainer.get("enable_checkpointing") is False:
            left_out |= {"GracefulStop", "ExportFolder"}  # what they do is done with a checkpoint
        if trainer.get("fast_dev_run"):
            left_out.add("MaskAudit")  # it would write; the data are audited before
        if not hasattr(self.model, "export"):
            left_out.add("ExportFolder")
        kinds = [getattr(ours, name) for name in DEFAULT_CALLBACKS if name not in left_out]
        return [*given, *(kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given))]

    @property
    def began(self) -> bool:
        """Whether the first training step was reached."""
        return self._place.began

    def came_to_its_end(self) -> bool:
        """Whether a fit ended because it was done, not because it was stopped, or had no more time."""
        timers = [callback for callback in self.trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        out_of_time = any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
        return self.trainer.state.status == "finished" and not self.trainer.received_sigterm and not out_of_time

    trains = True
    """Whether the metrics are those of a training."""

    def use_folder(self, folder: Path | None, owned: RunFolder | None) -> None:
        """Everything that writes, writes into the run's folder (None: rank 0 will say which)."""
        self.folder = folder
        if folder is not None:
            self.trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]
            self.trainer.loggers = self.loggers(folder)

    def loggers(self, folder: Path) -> list[Logger]:
        """Our metrics.csv, and the loggers of the config (default: TensorBoard); none for `logger: false`."""
        chosen = self.config.trainer.logger
        if chosen is False or not self.trains:
            return []  # what a validation of a run says is no point of its curve
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
        return yaml.safe_dump(redact_config(self.composed, values), sort_keys=False, allow_unicode=True, width=120)


class _RunPlace(Callback):
    """Tells all ranks the run's folder before any other callback asks for it, and notes that training began."""

    def __init__(self, cli: RecipeCLI) -> None:
        self._cli = cli
        self.began = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(str(self._cli.folder))
        if self._cli.folder is None and folder != "None":
            self._cli.use_folder(Path(folder), None)

    def on_train_batch_end(self, *args: Any) -> None:
        self.began = True

    def on_predict_batch_end(self, *args: Any) -> None:
        self.began = True


def _our_cause(error: BaseException | None) -> BaseException | None:
    """The mistake of the user's behind an error, as our code said it."""
    while error is not None and user_message(error) is None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # Of a union jsonargparse makes one text of what its members said, and keeps the errors in a local.
            if frame.f_code.co_name == "raise_union_unexpected_value":
                found = [_our_cause(member) for member in frame.f_locals["exceptions"]]
                return next((member for member in found if member is not None), None)
        error = error.__cause__ or error.__context__
    return error


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


def _lengthen_rewards(values: dict[str, Any]) -> None:
    """Our rewards go by their bare names, as other classes do, though they are imported only when asked for."""
    from llm_modules.evaluation import __all__ as known

    arguments = (values.get("model") or {}).get("init_args") or {}
    for key in ("rewards", "costs"):
        items: Any = arguments.get(key)
        for place, item in enumerate(items if isinstance(items, list) else []):
            if isinstance(item, str) and item in known:
                items[place] = {"class_path": f"llm_modules.evaluation.{item}"}
            elif isinstance(item, dict) and item.get("class_path") in known:
                item["class_path"] = f"llm_modules.evaluation.{item['class_path']}"


def _place_loggers(values: dict[str, Any]) -> None:
    """Loggers that write files write them into the run's folder, where the config does not say otherwise."""
    loggers = (values.get("trainer") or {}).get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(logger, dict) or "class_path" not in logger:
            continue
        name, given = str(logger["class_path"]).rpartition(".")[2], logger.get("init_args") or {}
        if name == "MLFlowLogger" and "tracking_uri" not in given and "MLFLOW_TRACKING_URI" not in os.environ:
            # Its own default, a folder of files, is refused by newer versions of MLflow.
            place = {"tracking_uri": f"sqlite:///{RUN_FOLDER}/mlflow.db", "artifact_location": f"{RUN_FOLDER}/mlflow"}
        elif name in ("WandbLogger", "TensorBoardLogger", "CSVLogger"):
            place = {"save_dir": RUN_FOLDER}
        else:
            continue
        logger["init_args"] = {**place, **given}


def _fill(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, folder) for item in value]
    return value.replace(RUN_FOLDER, folder) if isinstance(value, str) else value


def quiet() -> None:
    """Leaves out what Lightning says at each start; what matters of it, we say ourselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*in a single process.*")  # a checkpoint in shards, of one process
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a first try on a login node
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
