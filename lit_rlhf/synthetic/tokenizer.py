"""A word-level tokenizer over the closed vocabulary of the world, as plain ``transformers`` loads it."""

from pathlib import Path
from typing import Any

from lit_rlhf.synthetic.knowledge import vocabulary

PAD, EOS, NEWLINE, UNKNOWN = "<pad>", "<eos>", "<nl>", "<unk>"
CONTEXT = 160


def build_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast``: one token a word, ``<nl>`` for a newline, nothing added at the start or the end.

    Decoding gives the words joined with single spaces, newlines included as newlines, so that text comes back as it
    went in.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, EOS, NEWLINE, UNKNOWN, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(Regex(r" *\n *"), f" {NEWLINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # tokens arrive one by one: each gets a space before it, the first loses its own, newlines lose both
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(f" *{NEWLINE} *"), "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
    )


def write_tokenizer(folder: Path) -> None:
    """Save the tokenizer where ``AutoTokenizer.from_pretrained(folder)`` finds it."""
    build_tokenizer().save_pretrained(folder)
