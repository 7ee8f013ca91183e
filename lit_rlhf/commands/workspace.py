"""`lit-rlhf workspace`: save a view of a Weights & Biases project that serves all three stages."""

from typing import Any, NamedTuple

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.library_errors import find_library
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import ITERATION

PROJECT = "lit-rlhf"  # of the shipped recipes
STEP = "trainer/global_step"


class Plot(NamedTuple):
    """Lines in one panel.

    Attributes:
        metrics: on the y-axis.
        x: the metric on the x-axis.
    """

    metrics: tuple[str, ...]
    x: str = ITERATION


class TablePanel(NamedTuple):
    """A table that runs have logged."""

    name: str


# section -> its panels. Sections without data, such as those of PPO in a project of SFT runs, are empty
SECTIONS: dict[str, tuple[Plot | TablePanel, ...]] = {
    "Reward": (
        Plot(("reward/score", "reward/score_min", "reward/score_max")),
        Plot(("reward/kl",)),
        Plot(("reward/kl_penalized_score",)),
        Plot(("reward/score",), x="reward/kl"),  # what a nat buys
        Plot(("validation/score", "validation/kl")),
    ),
    "Samples": (TablePanel("samples"), TablePanel("validation_samples")),
    "Responses": (
        Plot(("response/length", "response/length_max")),
        Plot(("response/eos_fraction",)),
        Plot(("response/repeated_trigram_fraction",)),
    ),
    "PPO update": (
        Plot(("policy/approx_kl",)),
        Plot(("policy/clip_fraction", "value/clip_fraction")),
        Plot(("policy/entropy_estimate",)),
        Plot(("value/explained_variance",)),
        Plot(("advantage/min", "advantage/max")),
        Plot(("pretraining/loss",)),
    ),
    "Histograms": tuple(Plot((f"histogram/{name}",)) for name in ("scores", "advantages", "ratios")),
    "SFT and reward model": (
        Plot(("train/loss", "validation/loss"), x=STEP),
        Plot(("train/accuracy", "validation/accuracy"), x=STEP),
        Plot(("validation/reward_score",), x=STEP),
    ),
    "Optimizer": (
        Plot(("lr/model", "lr/policy", "lr/critic"), x=STEP),
        Plot(("grad_norm/model", "grad_norm/policy", "grad_norm/critic"), x=STEP),
    ),
    "Throughput": (
        Plot(("throughput/device_tokens_per_sec",), x=STEP),
        Plot(("time/generate", "time/score", "time/update")),
        Plot(("memory/peak_gib",), x=STEP),
    ),
}


def run(command: str, args: list[str]) -> int:
    """Save the view, and print its address."""
    parser = Parser(
        prog="lit-rlhf workspace",
        description="save a view of a Weights & Biases project: the panels of all three stages, runs grouped by "
        "experiment and stage; needs a login (wandb login) and pip install 'lit-rlhf[workspace]'",
    )
    parser.add_argument("--project", type=str, default=PROJECT, help=f"default: {PROJECT}, that of the shipped recipes")
    parser.add_argument("--entity", type=str, default="", help="user or team; default: that of the login")
    parser.add_argument("--name", type=str, default="RLHF", help="of the view; default: RLHF")
    parsed = parser.parse(args)
    install_log_filters()
    import wandb

    view = build_workspace(parsed.entity, parsed.project, parsed.name)
    try:
        view.entity = parsed.entity or wandb.Api().default_entity
        address = view.save().url
    except Exception as problem:
        if find_library(problem) != "wandb":
            raise
        raise UserError(f"workspace: {problem}; correct --entity or --project, or log in: wandb login") from None
    print(f"saved: {address}")
    return 0


def build_workspace(entity: str, project: str, name: str) -> Any:
    """Return the view as a `wandb_workspaces.workspaces.Workspace`, which is not saved.

    Args:
        entity: user or team.
        project: of the runs.
        name: of the view.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces import expr

    def build_panel(panel: Plot | TablePanel) -> Any:
        if isinstance(panel, TablePanel):
            return panels.WeavePanelSummaryTable(table_name=panel.name)
        return panels.LinePlot(x=panel.x, y=list(panel.metrics))

    sections = [
        workspaces.Section(name=title, panels=[build_panel(each) for each in content], is_open=True)
        for title, content in SECTIONS.items()
    ]
    runs = workspaces.RunsetSettings(groupby=[expr.Metric("Group"), expr.Metric("JobType")])
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=runs)
