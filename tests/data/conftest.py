"""Tokenizers and a toy module for the data tests."""

import json
from pathlib import Path

import pytest
import torch
from lightning import LightningModule
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def byte_tokenizer(bos=False):
    """Build a tokenizer with one token per byte, so that lengths in tokens are lengths in ASCII characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, **{byte: 3 + index for index, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def make_tokenizer():
    """Builds a byte tokenizer, with a BOS token or without."""
    return byte_tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def bos_tokenizer():
    return byte_tokenizer(bos=True)


@pytest.fixture
def shared():
    """The folder of real data, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def gpt2():
    """The real GPT-2 tokenizer, with a separate pad token."""
    folder = SHARED / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip(f"the GPT-2 tokenizer is not at {folder}")
    bpe = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


class ToyModule(LightningModule):
    """Records its batches; its loss trains one parameter."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        return self.weight.sum() * batch.normalizer

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def toy(tokenizer):
    return lambda: ToyModule(tokenizer)


class FakeTrainer:
    """The attributes of a Trainer that a data module reads."""

    def __init__(self, module, world_size=1, global_rank=0, accumulate_grad_batches=1):
        self.lightning_module = module
        self.distributed_sampler_kwargs = {"num_replicas": world_size, "rank": global_rank} if world_size > 1 else None
        self.accumulate_grad_batches = accumulate_grad_batches
        self.num_training_batches = float("inf")
        self.callbacks = []


@pytest.fixture
def attach(tokenizer):
    """Sets a data module up under a fake trainer."""

    def attach(data, tokenizer=tokenizer, **sizes):
        data.trainer = FakeTrainer(ToyModule(tokenizer), **sizes)
        data.setup("fit")
        return data

    return attach


@pytest.fixture
def write(tmp_path):
    """Writes rows to a JSONL file and returns its path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
