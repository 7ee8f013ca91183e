"""Word-level tokenizer over the closed vocabulary, loadable by plain `transformers`."""

from collections.abc import Sequence
from typing import Any

from lit_rlhf.synthetic.knowledge import build_vocabulary

PAD, EOS, NEWLINE, UNK = "<pad>", "<eos>", "<nl>", "<unk>"
MAX_POSITIONS = 160


def build_tokenizer(vocabulary: Sequence[str] | None = None, max_positions: int = MAX_POSITIONS) -> Any:
    """Build a `PreTrainedTokenizerFast`: one token per word, `<nl>` for a newline, no BOS or EOS added.

    Decoding joins the words with single spaces and restores newlines, so encoding and decoding is the identity.

    Args:
        vocabulary: the words; None for those of the quickstart.
        max_positions: longest sequence of the models, in tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, EOS, NEWLINE, UNK, *(build_vocabulary() if vocabulary is None else vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Replace(Regex(r" *\n *"), f" {NEWLINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # each token gets a leading space; then the first token loses it, and newlines lose the spaces on both sides
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
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
        padding_side="left",
    )
