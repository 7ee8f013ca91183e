"""The LightningCLI behind `fit`, `validate` and `test`: recipes in, one clear line out where a recipe is wrong."""

import pickle
import shlex
from argparse import ArgumentError
from contextlib import contextmanager
from collections.abc import Iterator
from pathlib import Path
import os
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rlhf.callbacks import StopOnNonFinite
from lit_rlhf.commands.fit import check_writable, without_checkpoint, without_secrets
from lit_rlhf.commands.places import Places
from lit_rlhf.commands.problems import explain, import_quietly
from lit_rlhf.commands.suggestions import pip_command
from lit_rlhf.commands.wandb_login import prepare_wandb
from lit_rlhf.errors import UserError

CHECKPOINT_WORDS = ("best", "last", "hpc")


class RecipeCLI(LightningCLI):
    """Any LightningModule and LightningDataModule by `class_path`, for one subcommand.

    Only the subcommand asked for gets a parser: the other ones would triple the time of `--help`.
    """

    command: str
    places: Places

    @classmethod
    def start(cls, command: str, args: list[str], places: Places) -> int:
        """Parse, instantiate and run; return the exit code.

        Raises:
            UserError: the recipe, the arguments or the data are wrong.
        """
        arguments = super().subcommands()[command]
        chosen = type(cls.__name__, (cls,), {
            "command": command, "places": places, "subcommands": staticmethod(lambda: {command: arguments}),
        })
        settings = {"exit_on_error": False, "allow_abbrev": False}
        cli = chosen(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 1, "callbacks": [StopOnNonFinite()]},
            seed_everything_default=0,
            parser_kwargs={"prog": "lit-rlhf", **settings, command: settings},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
        )
        return cli.exit_code

    exit_code = 0

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what jsonargparse refuses becomes one line."""
        self.args = args
        try:
            self.config = parser.parse_args([self.command, *args])
        except ArgumentError as problem:
            options = [action.dest for action in self._parser(self.command)._actions]
            raise UserError(explain(str(problem), options, self.places)) from None
