"""A WandbLogger that keeps tables and images."""

from typing import Any

from lightning.pytorch.loggers import WandbLogger


class FakeWandbLogger(WandbLogger):
    """Stores the arguments of `log_table` and `log_image`; everything else is ignored."""

    name = version = save_dir = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.tables: list[tuple[str, list[str], list[list[Any]]]] = []
        self.images: dict[str, list[Any]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:  # type: ignore[override]
        self.tables.append((key, columns, data))

    def log_image(self, key: str, images: list[Any]) -> None:  # type: ignore[override]
        self.images[key] = images

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def after_save_checkpoint(self, *_: Any) -> None:
        pass

    def finalize(self, *_: Any) -> None:
        pass
