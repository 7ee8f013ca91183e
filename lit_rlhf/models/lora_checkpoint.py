"""A reward model's adapter, from a Lightning checkpoint or in memory, attached to another model with the same base."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.checkpoint_files import read_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.models.export import CHECKPOINT_KEY, read_base, select_weights
from lit_rlhf.models.fingerprint import model_fingerprint
from lit_rlhf.models.given import model_name
from lit_rlhf.models.loading import check_same_token_ids, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import POLICY, adapter_state_dict, add_lora, has_adapter
from lit_rlhf.models.pretrained import check_weight_values
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource
from lit_rlhf.models.shared_backbone import ScalarHead
from lit_rlhf.models.tokenizer_files import write_tokenizer_files

TRAINING_HINT = "train the reward model with -c adapter/lora, from the folder that the policy starts from"


AdapterSource: TypeAlias = str | ScalarModel
"""The checkpoint of a `RewardModule` that was trained with an adapter, or its `model`."""


class ScalarAdapter(NamedTuple):
    """A reward model that was trained with an adapter, as its checkpoint holds it."""

    path: str  # what an object is called
    lora: LoRA
    weights: dict[str, Tensor]  # by name in the transformers model: adapter, head, and the base's if that was an object
    settings: dict[str, Any]  # of config.json
    tokenizer: dict[str, str]  # file contents by name; none of an object, whose base is compared weight by weight
    quantized: bool  # whether the base was in 4 bits
    base: str | None  # folder or hub name of a base that is not in the checkpoint
    base_fingerprint: str | None

    @property
    def is_centered(self) -> bool:
        """Whether the centering constants were set."""
        return "score_shift" in self.settings


def resolve_adapter(given: Any, setting: str) -> AdapterSource:
    """Return what an adapter is read from.

    Raises:
        UserError: It is neither a path nor a reward model.
    """
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    if not isinstance(given, ScalarModel):
        raise UserError(
            f"{setting}: a {type(given).__name__} is neither a checkpoint nor a reward model; give the checkpoint of a "
            "RewardModule that was trained with an adapter, or its `model`"
        )
    return given


def holds_adapter(source: ScalarSource | None) -> bool:
    """Whether a source of scalar weights is an adapter: a checkpoint file, or an object that was trained with one."""
    return Path(source).is_file() if isinstance(source, str) else source is not None and has_adapter(source)


def read_scalar_adapter(source: AdapterSource) -> ScalarAdapter:
    """Read adapter and head from a reward model's checkpoint, whose weights are memory-mapped, or from an object.

    Raises:
        UserError: No such file, not a reward model's checkpoint, or one that was trained without an adapter.
    """
    if isinstance(source, ScalarModel):
        return _describe_adapter(source)
    path, content = source, read_checkpoint(Path(source))
    about = content.get(CHECKPOINT_KEY, {})
    if about.get("module") != "RewardModule":
        raise UserError(f"{path!r} is a checkpoint of {about.get('module', 'another program')}, not of RewardModule")
    if about["adapter"] is None:
        raise UserError(f"{path!r} is of a reward model without an adapter, which shares no base; {TRAINING_HINT}")
    prefix, base = about["prefix"], read_base(about)
    state = select_weights(content, None, Path(path))  # the average if there is one, as an export has
    weights = {name[len(prefix) :]: weight for name, weight in state.items() if name.startswith(prefix)}
    lora, settings = LoRA(**about["adapter"]), json.loads(about["config"])
    fingerprint = about.get("fingerprints", {}).get("base")
    quantized = base is not None and base[1].quantization is not None
    name = None if base is None else base[0]
    return ScalarAdapter(path, lora, weights, settings, about["tokenizer"], quantized, name, fingerprint)


def _describe_adapter(model: ScalarModel) -> ScalarAdapter:
    """Return the adapter and head of a reward model in memory, with the base that they were trained on."""
    name, inner = model_name(model), model.model
    if not has_adapter(inner):
        raise UserError(f"{name!r} is of a reward model without an adapter, which shares no base; {TRAINING_HINT}")
    config = inner.peft_config[POLICY]
    # the layers that have it: of a head, peft's own list of targets knows nothing
    layers = sorted({key.rpartition(".lora_")[0] for key in adapter_state_dict(inner, POLICY)})
    lora = LoRA(config.r, config.lora_alpha, config.lora_dropout, layers)
    weights: dict[str, Tensor] = dict(inner.named_parameters())
    settings, quantized = json.loads(inner.config.to_json_string()), getattr(inner, "is_quantized", False)
    return ScalarAdapter(name, lora, weights, settings, {}, quantized, None, None)


def check_same_vocabulary(adapter: ScalarAdapter, tokenizer: Tokenizer, loading: ModelLoadingConfig) -> None:
    """Refuse an adapter that was trained on other token ids."""
    if not adapter.tokenizer:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_files(adapter.tokenizer, Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps(adapter.settings))  # AutoTokenizer needs config.json
        own = load_tokenizer(folder, loading)
    check_same_token_ids(tokenizer, own, repr(adapter.path))


def attach_adapter(adapter: ScalarAdapter, model: PreTrainedModel, model_path: str, name: str) -> ScalarHead:
    """Attach the adapter to `model`, trainable, and return the reward model's head.

    Args:
        adapter: Of a reward model.
        model: A causal language model with an adapter of its own.
        model_path: Folder or hub name of its base.
        name: Name of the adapter in `model`.

    Raises:
        UserError: The model has no adapter of its own, its base is not the one that the adapter was trained on, or the
            adapter's weights are no numbers.
    """
    if not has_adapter(model):
        raise UserError(f"{adapter.path!r} shares the policy's frozen base: set model.adapter (-c adapter/lora)")
    _check_same_base(adapter, model, model_path)
    add_lora(model, adapter.lora, name)
    stored = {key.removesuffix(f".{POLICY}.weight"): w for key, w in adapter.weights.items() if "lora_" in key}
    own = adapter_state_dict(model, name)
    if own.keys() != stored.keys():
        layer = min(own.keys() ^ stored.keys())
        raise UserError(f"{adapter.path!r}: its adapter and the policy's model disagree about the layer {layer!r}")
    head = adapter.weights["score.weight"]
    check_weight_values("reward", repr(adapter.path), {**stored, "score.weight": head}.items())
    with torch.no_grad():
        for key, weight in own.items():
            weight.copy_(stored[key])
    bias, settings = adapter.weights.get("score.bias"), adapter.settings
    bias = bias if bias is None else bias.float()
    return ScalarHead(head.float(), bias, settings.get("score_shift", 0.0), settings.get("score_scale", 1.0))


def _check_same_base(adapter: ScalarAdapter, model: PreTrainedModel, model_path: str) -> None:
    """Refuse an adapter that was trained on another base."""
    different = f"{adapter.path!r} was trained on another base than {model_path!r}"
    if getattr(model, "is_quantized", False) != adapter.quantized:
        raise UserError(f"{different}: one is in 4 bits, the other is not; give both the same loading.quantization")
    own = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    if any(parameter.is_meta for parameter in own.values()):
        return  # rank zero has the weights and compares
    if adapter.base is not None:
        commit = getattr(model.config, "_commit_hash", None)
        loading = ModelLoadingConfig(revision=None if Path(model_path).is_dir() else commit)
        if model_fingerprint(model_path, loading) != adapter.base_fingerprint:
            raise UserError(f"{different}, on {adapter.base!r}; {TRAINING_HINT}")
    for name, weight in adapter.weights.items():
        plain = name.replace(".base_layer", "")
        if "lora_" in name or plain.startswith("score."):
            continue
        parameter = own.get(plain)
        same = parameter is not None and parameter.shape == weight.shape
        if parameter is None or not same or not torch.equal(parameter.cpu(), weight.to("cpu", parameter.dtype)):
            raise UserError(f"{different} (its weight {plain!r} differs); {TRAINING_HINT}")
