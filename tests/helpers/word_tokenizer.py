"""A tokenizer of 32 words."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(28)]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", ":", *WORDS])}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return one with distinct padding, end and unknown tokens."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
