"""PyTorch's variable-length kernel needs a GPU: a reference computes what it documents, sequence by sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlhf.packing import packed_batch, rankings, varlen_attention, varlen_unsupported_reason


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Attend over (T, H, d) and (K, H_kv, d); the diagonal of the causal mask ends at the last query and last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
    assert (cu_seq_q[0], cu_seq_q[-1], cu_seq_k[0], cu_seq_k[-1]) == (0, len(query), 0, len(key))
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    parts, attend = [], torch.nn.functional.scaled_dot_product_attention
    for where in zip(*(offsets.unfold(0, 2, 1).tolist() for offsets in (cu_seq_q, cu_seq_k)), strict=True):
        ranges = slice(*where[0]), slice(*where[1]), slice(*where[1])
        part = [states[each].transpose(0, 1) for states, each in zip((query, key, value), ranges)]
        shape = part[0].shape[1], part[1].shape[1]
        assert 0 < shape[0] <= shape[1], "a sequence without queries, or with fewer keys"
        mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
        parts.append(attend(*part, attn_mask=mask, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(parts)


def use_reference_kernel(monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> None:
    """Pack for the kernel on any device, and compute with the reference, whose result is multiplied by `scale`."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")  # of torch 2.10 and later

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return varlen_attn(*args, **kwargs) * scale

    def can_use(model: Any, device: torch.device) -> bool:
        return varlen_unsupported_reason(model.config, 0) is None

    for module in (packed_batch, rankings, varlen_attention):
        monkeypatch.setattr(module, "can_use_varlen_kernel", can_use)
    monkeypatch.setattr(varlen, "varlen_attn", attend)
