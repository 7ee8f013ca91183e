"""PEFT folders (`adapter_config.json`, `adapter_model.safetensors`): read as models, and written.

An adapter is merged into its base when it is loaded, so that a model from such a folder is one like any other. The
names, the files and the merge are peft's; what this module adds is that nothing is left out silently.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import POLICY
from lit_rlhf.models.model_files import find_file, holds_file, looks_local

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORE_CONFIG = "score_config.json"  # the centering constants of a reward model, which peft has no place for
FULL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREFIX = "base_model.model."  # of every name in a PEFT file


class PeftAdapter:
    """A PEFT folder, local or on the hub.

    Args:
        path: Folder or hub name.
        loading: How the model is loaded; its revision is the adapter's.
        config: Content of adapter_config.json.

    Raises:
        UserError: It names no base, one that is not there, or is of a kind that cannot be merged.
    """

    def __init__(self, path: str, loading: ModelLoadingConfig, config: dict[str, Any]) -> None:
        self.path, self.loading, self.config = path, loading, config
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base or base == path:
            raise UserError(f"model: {ADAPTER_CONFIG} of {path!r} names no base; set base_model_name_or_path in it")
        if looks_local(base) and not Path(base).is_dir():
            raise UserError(
                f"model: {path!r} is an adapter on {base!r}, and there is no such folder: put it back, or correct "
                f"base_model_name_or_path in {ADAPTER_CONFIG}"
            )
        if config.get("peft_type") not in ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "BOFT", "HRA"):
            raise UserError(f"model: {path!r} is a {config.get('peft_type')} adapter, which cannot be merged; use LoRA")
        self.base: str = base

    @property
    def base_loading(self) -> ModelLoadingConfig:
        """How the base is loaded: like the model, at the revision that the adapter names."""
        return replace(self.loading, revision=self.config.get("revision"))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights, by their names in the transformers model: of the adapter, and modules that are kept in full.

        Raises:
            UserError: There is no such file, or it is damaged.
        """
        from peft.utils import load_peft_weights

        revision = {} if self.loading.revision is None else {"revision": self.loading.revision}
        try:
            stored = load_peft_weights(self.path, device="cpu", **revision)
        except Exception as error:  # peft, the hub client and safetensors each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"model: cannot read the adapter's weights of {self.path!r}: {reason}") from error
        return {name.removeprefix(PREFIX): weight for name, weight in stored.items()}

    @property
    def full_modules(self) -> set[str]:
        """Names of weights that replace the base's, such as a score head."""
        modules = tuple(self.config.get("modules_to_save") or ())
        return {name for name in self.weights if any(f".{module}." in f".{name}" for module in modules)}

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding that the file holds in full, as peft writes one that had grown; 0 without any."""
        return max((len(w) for name, w in self.weights.items() if _is_embedding(name)), default=0)

    @property
    def is_scalar(self) -> bool:
        """Whether it is of a reward model."""
        return self.config.get("task_type") == "SEQ_CLS"

    def apply_to_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Turn the base's configuration into that of the merged model; changes it in place."""
        if self.is_scalar:
            if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
            heads = [self.weights[name] for name in sorted(self.full_modules) if not _is_embedding(name)]
            heads = [weight for weight in heads if weight.dim() == 2]
            if heads:
                config.num_labels = len(heads[-1])
        constants = find_file(self.path, SCORE_CONFIG, self.loading)
        for name, value in json.loads(Path(constants).read_text()).items() if constants else ():
            setattr(config, name, value)
        return config

    def merge_into(self, model: PreTrainedModel, unused: tuple[str, ...]) -> PreTrainedModel:
        """Merge the adapter into its base, in the base's precision; on the meta device only shapes change.

        Args:
            model: The base, changed in place.
            unused: Prefixes of weights that the model need not have a layer for, such as an output head.

        Raises:
            UserError: A weight of the adapter is missing, has another shape, or belongs to no layer of the base.
        """
        from peft import PeftConfig, PeftModel
        from peft.utils import set_peft_model_state_dict

        modules = dict(model.named_modules())
        weights = {
            name: weight
            for name, weight in self.weights.items()
            if not (unused and name.startswith(unused)) or _has_place(name, modules)
        }
        self._resize_embedding(model, weights)
        if next(model.parameters()).is_meta:
            return model
        config = PeftConfig.from_pretrained(self.path, revision=self.loading.revision)
        if config.modules_to_save:
            kept = [module for module in config.modules_to_save if any(f".{module}." in f".{name}" for name in weights)]
            config.modules_to_save = kept or None
        different = f"model: the adapter {self.path!r} does not fit its base {self.base!r}"
        try:
            adapted = PeftModel(model, config)
            result = set_peft_model_state_dict(adapted, {PREFIX + name: weight for name, weight in weights.items()})
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{different}: {' '.join(str(error).split())[:300]}") from error
        missing = {name for name in result.missing_keys if adapted.base_model.prefix in name}
        wrong = sorted({*result.unexpected_keys, *missing})
        if wrong:
            raise UserError(f"{different}: {wrong[0].removeprefix(PREFIX)!r} is in one of them alone")
        merged: PreTrainedModel = adapted.merge_and_unload()
        return merged.requires_grad_(True)

    def _resize_embedding(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
        """Give the model's embedding as many rows as a stored one has, which peft writes if it had grown."""
        embedding = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embedding)
        stored = weights.get(f"{name}.weight")
        if stored is not None and len(stored) != embedding.num_embeddings:
            model.resize_token_embeddings(len(stored), mean_resizing=False)


def find_adapter(model: str, loading: ModelLoadingConfig) -> PeftAdapter | None:
    """Return the adapter of a PEFT folder or hub repository; None for a model of full weights.

    Raises:
        UserError: Full weights and an adapter beside them, which transformers would apply; see `PeftAdapter`.
    """
    if looks_local(model) and not Path(model).is_dir():
        return None
    try:
        path = find_file(model, ADAPTER_CONFIG, loading)
    except (OSError, ValueError):  # no such repository: loading says so
        return None
    if path is None:
        return None
    if any(holds_file(model, name, loading) for name in FULL_WEIGHTS):
        raise UserError(
            f"model: {model!r} holds an adapter ({ADAPTER_CONFIG}) beside its weights: merge it into them first "
            "(peft's merge_and_unload), or remove its files to start from the weights alone"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"model: {ADAPTER_CONFIG} of {model!r} is no JSON object; repair it or save it again")
    return PeftAdapter(model, loading, config)


def write_adapter(
    folder: Path,
    weights: dict[str, Tensor],
    lora: LoRA,
    base: tuple[str, ModelLoadingConfig],
    constants: dict[str, float] | None = None,
) -> None:
    """Write a PEFT folder, without tokenizer files.

    Args:
        folder: An existing folder.
        weights: By name in the transformers model; the adapter `POLICY` and a `score` head are written.
        lora: Settings of the adapter.
        base: Folder or hub name of the base, and how it was loaded.
        constants: Centering constants of a reward model.

    Raises:
        UserError: The score head has a bias, which a sequence classifier of transformers cannot load.
    """
    from peft import LoraConfig

    if "score.bias" in weights:
        raise UserError(f"{str(folder)!r}: the score head has a bias, for which PEFT folders have no place; merge it")
    path, loading = base
    suffix = f".{POLICY}.weight"
    adapter = {name.removesuffix(suffix): w for name, w in weights.items() if ".lora_" in name and suffix in name}
    stored = {f"{PREFIX}{name}.weight": weight for name, weight in adapter.items()}
    is_scalar = "score.weight" in weights
    if is_scalar:
        stored[f"{PREFIX}score.weight"] = weights["score.weight"]
    targets = lora.target_modules
    config = LoraConfig(
        task_type="SEQ_CLS" if is_scalar else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_layer_names(adapter) if isinstance(targets, str) else targets,
        modules_to_save=["score"] if is_scalar else None,
        base_model_name_or_path=path,
        revision=loading.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    contiguous = {name: weight.detach().cpu().contiguous() for name, weight in stored.items()}
    save_file(contiguous, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    if constants:
        (folder / SCORE_CONFIG).write_text(json.dumps(constants, indent=1) + "\n")


def _has_place(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a weight of a PEFT file is of a layer, or of an adapter of a layer, that a model has."""
    layer = name
    while layer and layer not in modules:
        layer = layer.rpartition(".")[0]
    own = name[len(layer) + 1 :]
    if own in ("weight", "bias"):
        return getattr(modules[layer], own, None) is not None
    return bool(layer) and not any(modules[layer].children())


def _is_embedding(name: str) -> bool:
    return name.endswith((".embed_tokens.weight", ".wte.weight", ".embed_in.weight", ".word_embeddings.weight"))


def _layer_names(adapter: Iterable[str]) -> list[str]:
    """Return the last parts of the names of layers, of names such as `model.layers.0.mlp.up_proj.lora_A`."""
    return sorted({name.rsplit(".", 2)[-2] for name in adapter})
