"""GGUF files (llama.cpp's format) as transformers folders: weights in full precision, tokenizer and chat template."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from lit_rlhf.errors import UserError
from lit_rlhf.models.export import check_exportable, export_weights
from lit_rlhf.models.pretrained import quiet_transformers
from lit_rlhf.progress import without_progress_bar


def convert_gguf(file: Path, directory: Path) -> None:
    """Write the model in a GGUF file as a folder that transformers, and so every command here, loads and trains.

    Quantized weights are dequantized to float32 exactly; what quantization had lost stays lost. transformers reads such
    a file, but refuses to save the model.

    Args:
        file: Of one causal language model of an architecture that transformers reads from GGUF (Llama, Qwen2, Mistral,
            Gemma and others).
        directory: The folder to write.

    Raises:
        UserError: No GGUF file, a damaged one, one of several parts, an architecture that transformers does not read,
            weights that are missing or left over, no tokenizer, or a folder that cannot be written.
        ModuleNotFoundError: The package gguf is not installed.
    """
    import gguf

    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r}")
    check_exportable(directory)
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, LookupError, OverflowError, OSError, UnicodeError) as error:
        raise UserError(
            f"{str(file)!r} is no GGUF file, or a damaged one ({error}); copy or download it again"
        ) from error
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise UserError(f"{str(file)!r} is one of {parts.contents()} parts: join them first (llama-gguf-split --merge)")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        with quiet_transformers(), without_progress_bar(modeling_gguf_pytorch_utils):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model, report = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # what transformers meets in a file of another kind: errors of every class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{str(file)!r}: transformers cannot read it as a causal language model: {reason}") from error
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, report[f"{what}_keys"])):
            raise UserError(f"{str(file)!r} is no whole model of its architecture: {what} weight {names[0]}")
    export_weights(model, model.state_dict(), None, tokenizer, directory)
