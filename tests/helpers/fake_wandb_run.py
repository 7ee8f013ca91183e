"""A run of Weights & Biases in this process: its artifacts are W&B's own, the server's answers are scripted."""

from typing import Any

import wandb


class Registry:
    """What a server would hold: the versions by "entity/project/name:alias", and the edges between runs and them."""

    def __init__(self) -> None:
        self.versions: dict[str, wandb.Artifact] = {}
        self.used: dict[str, list[str]] = {}  # run -> names of the artifacts it used
        self.logged: dict[str, list[str]] = {}  # run -> names of the artifacts it logged
        self.links: list[tuple[str, str]] = []

    def edges(self) -> set[tuple[str, str]]:
        """Return which artifact was made from which: pairs of names."""
        return {(source, made) for run, names in self.logged.items() for made in names for source in self.used[run]}


class FakeRun:
    """Has what the mirror calls of a `wandb.Run`."""

    disabled = False
    not_found: type[Exception] = wandb.errors.CommError  # what `use_artifact` raises of a name that is not there

    def __init__(self, registry: Registry, run_id: str, group: str = "demo", offline: bool = False) -> None:
        self.registry, self.id, self.group, self.offline = registry, run_id, group, offline
        self.project, self.entity, self.url = "project", "entity", f"https://wandb.ai/entity/project/runs/{run_id}"
        registry.used.setdefault(run_id, [])
        registry.logged.setdefault(run_id, [])

    def use_artifact(self, artifact: Any) -> Any:
        if self.offline:
            raise TypeError("Cannot use artifact when in offline mode.")
        if isinstance(artifact, str):
            if artifact not in self.registry.versions:
                raise self.not_found(f"artifact membership {artifact!r} not found")
            artifact = self.registry.versions[artifact]
        self.registry.used[self.id].append(artifact.name.split(":")[0])
        return artifact

    def log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> wandb.Artifact:
        for alias in aliases:
            self.registry.versions[f"{self.entity}/{self.project}/{artifact.name.split(':')[0]}:{alias}"] = artifact
        self.registry.logged[self.id].append(artifact.name.split(":")[0])
        return artifact

    def link_artifact(self, artifact: wandb.Artifact, target: str) -> None:
        self.registry.links.append((artifact.name.split(":")[0], target))

    def define_metric(self, name: str, **_: Any) -> None:
        """Axes and summaries are tested elsewhere."""

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_: object) -> None:
        pass
