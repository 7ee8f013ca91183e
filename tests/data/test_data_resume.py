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


def fit_rows(tmp_path, toy, path, sizes, start=None, stop=None, epochs=2, **settings):
    """Train 24 rows; return the rows in the order of optimizer steps, and the number of steps."""
    micro_batch_size, accumulate = sizes
    module = toy()
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        tmp_path, *([] if start else [save]), max_epochs=epochs, accumulate_grad_batches=accumulate,
        max_steps=stop or -1, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    given = DemonstrationDataModule(path, path, micro_batch_size=micro_batch_size, seed=1)
    run.fit(module, datamodule=given, ckpt_path=start)
    rows = [row for batch in module.trained for row in batch.input_ids[:, :2].tolist()]
    return rows, run.global_step, len(module.validated) * micro_batch_size


def test_other_sizes_in_the_middle_of_an_epoch_train_every_row_once(tmp_path, toy, write):
    path = write([{"prompt": f"{n:02d}", "completion": "c"} for n in range(24)])
    for before, step, after in (
        ((2, 1), 3, (3, 2)),
        ((2, 1), 4, (1, 2)),  # the same minibatch
        ((1, 2), 4, (2, 1)),
        ((3, 2), 1, (1, 3)),
        ((2, 3), 4, (4, 1)),  # at the end of the epoch
        ((4, 1), 6, (2, 3)),
        ((1, 2), 5, (5, 1)),  # 4 of 24 rows are left out
    ):
        folder = tmp_path / f"{before}-{step}"
        first, steps, _ = fit_rows(folder, toy, path, before, stop=step)
        assert steps == step
        rest, steps, validated = fit_rows(folder, toy, path, after, folder / "saved" / f"step={step}.ckpt")
        size, done = after[0] * after[1], len(first)
        left = (24 - done) // size if done < 24 else 0
        assert steps == step + left + 24 // size, (before, after)
        in_epoch = first + rest[: left * size]
        assert len({tuple(row) for row in in_epoch}) == len(in_epoch) == done + left * size
        assert len({tuple(row) for row in rest[left * size :]}) == 24 // size * size
        assert validated >= 24, "validated at the end of both epochs, or of the second"


def test_a_position_within_a_minibatch_is_refused_before_the_first_step(tmp_path, toy, write):
    path = write([{"prompt": f"{n:02d}", "completion": "c"} for n in range(24)])
    fit_rows(tmp_path, toy, path, (2, 1), stop=2)
    module = toy()
    given = DemonstrationDataModule(path, micro_batch_size=3, seed=1)
    with pytest.raises(UserError, match=r"after 4 rows of its epoch, .* take a minibatch of 1, 2, 4, or a checkpoint"):
        trainer(tmp_path).fit(module, datamodule=given, ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    assert not module.trained
    given = DemonstrationDataModule(path, micro_batch_size=4, seed=1)
    fit_rows(tmp_path / "other", toy, path, (2, 2), stop=5)
    with pytest.raises(UserError, match="the 4 rows that the checkpoint left of its epoch fill no minibatch of 20"):
        run = trainer(tmp_path, accumulate_grad_batches=5)
        run.fit(module, datamodule=given, ckpt_path=tmp_path / "other" / "saved" / "step=5.ckpt")
    assert not module.trained


def test_a_checkpoint_within_an_accumulation_repeats_its_minibatch(tmp_path, toy, data):
    uninterrupted = toy()
    trainer(tmp_path, max_epochs=1).fit(uninterrupted, datamodule=data())
    first = toy()
    run = trainer(tmp_path, StopAfter(5), max_epochs=1)
    with pytest.raises(SystemExit):
        run.fit(first, datamodule=data())
    run.save_checkpoint(tmp_path / "within.ckpt")
    second = toy()
    trainer(tmp_path, max_epochs=1).fit(second, datamodule=data(), ckpt_path=tmp_path / "within.ckpt")
    assert trained_batches(first)[:4] + trained_batches(second) == trained_batches(uninterrupted)


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
