"""A resumed run trains on the batches of the uninterrupted run, under a real Trainer."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_rlhf.data import DemonstrationDataModule, PromptDataModule
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.errors import UserError


class StopAfter(Callback):
    """Interrupts a run after a number of batches, like a killed one."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def trainer(tmp_path, *callbacks, **settings):
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2, **settings}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **settings,
    )


@pytest.fixture
def data(write):
    rows = [{"prompt": f"{n:02d}", "completion": "c" * (n % 4 + 1)} for n in range(27)]
    path = write(rows)
    return lambda **settings: DemonstrationDataModule(path, micro_batch_size=3, seed=1, **settings)


def trained_batches(module):
    return [(batch.input_ids[:, :2].tolist(), float(batch.normalizer)) for batch in module.trained]


# 27 rows, minibatches of 6 in 2 micro-batches: 4 steps, 8 batches per epoch
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("save", "limit"),
    [
        ({"every_n_train_steps": 6}, 1.0),  # mid-epoch, after 12 batches
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 1.0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 4),  # an epoch shorter than the loader
    ],
)
def test_a_resumed_run_trains_on_the_same_batches(tmp_path, toy, data, save, limit, validate):
    settings = {"limit_train_batches": limit}
    validation = {"validation_fraction": 0.1} if validate else {}
    uninterrupted = toy()
    trainer(tmp_path, **settings).fit(uninterrupted, datamodule=data(**validation))
    assert len(trained_batches(uninterrupted)) == 3 * (8 if limit == 1.0 else limit)

    first = toy()
    checkpoint = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{step}", **save)
    trainer(tmp_path, checkpoint, **settings, max_epochs=2).fit(first, datamodule=data(**validation))
    path = checkpoint.best_model_path
    steps = torch.load(path, weights_only=False)["global_step"]

    second = toy()
    trainer(tmp_path, **settings).fit(second, datamodule=data(**validation), ckpt_path=path)
    assert trained_batches(first)[: 2 * steps] + trained_batches(second) == trained_batches(uninterrupted)
    assert torch.equal(second.weight, uninterrupted.weight)


def test_a_second_fit_begins_at_the_first_epoch(tmp_path, toy, data):
    module = data()
    runs = []
    for _ in range(2):
        runs.append(toy())
        trainer(tmp_path, max_epochs=1).fit(runs[-1], datamodule=module)
    assert trained_batches(runs[0]) == trained_batches(runs[1])


def test_reloaded_loaders_continue(tmp_path, toy, data):
    one, two = toy(), toy()
    trainer(tmp_path).fit(one, datamodule=data())
    trainer(tmp_path, reload_dataloaders_every_n_epochs=1).fit(two, datamodule=data())
    assert trained_batches(one) == trained_batches(two)


def test_validation_yields_every_row_once(tmp_path, toy, data):
    module = toy()
    given = data(validation_fraction=0.3)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=given)
    assert sum(len(batch.input_ids) for batch in module.validated) == len(given.validation_rows) == 8
    assert sum(len(batch.input_ids) for batch in module.trained) == 18


@pytest.mark.filterwarnings("error:.*:UserWarning")
def test_no_validation_data_gives_no_warning(tmp_path, toy, data):
    module = toy()
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data())
    assert module.trained and not module.validated


def test_bad_data_stops_before_anything_else(tmp_path, toy):
    with pytest.raises(UserError, match="no data file"):
        trainer(tmp_path).fit(toy(), datamodule=DemonstrationDataModule(str(tmp_path / "absent.jsonl")))


def test_prompts_go_through_the_module(tmp_path, toy, write):
    path = write([{"prompt": f"p{n}"} for n in range(5)])

    class PromptModule(type(toy())):
        def experience_loader(self, prompts):
            collate_fn = lambda iterations, normalizer: prompts.get_batch(iterations[0], 2)  # noqa: E731
            return ResumableLoader(range(2), collate_fn, micro_batch_size=1, shuffle=False)

        def training_step(self, batch, batch_idx):
            self.trained.append(batch)
            return self.weight.sum()

    module = PromptModule(toy().tokenizer)
    given = PromptDataModule(path, validation_path=path, validation_batch_size=2, seed=1)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=given)
    assert [row for batch in module.trained for row in batch.rows] == [
        each.row for each in given.prompts.get_prompts(0, 4)
    ]
    assert [index for batch in module.validated for index in batch.index.tolist()] == [0, 1, 2, 3, 4]
