"""A WandbLogger that keeps what it gets."""

from typing import Any

from lightning.pytorch.loggers import WandbLogger


class FakeRun:
    """Stores the definitions of metrics."""

    def __init__(self) -> None:
        self.defined: dict[str, dict[str, Any]] = {}

    def define_metric(self, name: str, **settings: Any) -> None:
        self.defined[name] = settings


class FakeWandbLogger(WandbLogger):
    """Stores what `log_image` and `log_metrics` get; everything else is ignored."""

    name = version = save_dir = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.run: Any = FakeRun()
        self.images: dict[str, list[Any]] = {}
        self.rows: list[dict[str, Any]] = []

    @property
    def experiment(self) -> Any:
        return self.run

    def log_image(self, key: str, images: list[Any], **_: Any) -> None:  # type: ignore[override]
        self.images[key] = images

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append({**metrics, "trainer/global_step": step})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def after_save_checkpoint(self, *_: Any) -> None:
        pass

    def finalize(self, *_: Any) -> None:
        pass
