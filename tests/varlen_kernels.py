"""Variable-length attention kernels in plain torch, under the signatures of the packages that have them.

What they refuse is what flash_api.cpp and mask.h of flash-attn, also in torch's copy of them, refuse.
"""

import sys
import types

import torch

from dpo_scale.models import varlen_attention

WIDTHS = 256  # of heads, at most


def kernel(q, k, v, q_offsets, k_offsets, max_q, max_k, scale, window, softcap=None, *, width_step, at_end=True):
    """Causal attention of sequences [T, H, D], of q [T, H, D] and k, v [keys, K, D]; masks aligned at their ends."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in varlen_attention.DTYPES
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= WIDTHS and q.shape[-1] % width_step == 0
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for offsets, length in ((q_offsets, len(q)), (k_offsets, len(k))):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == q.device
        assert offsets[0] == 0 and offsets[-1] == length and len(offsets) == len(q_offsets)
    assert isinstance(max_q, int) and isinstance(max_k, int) and isinstance(window, tuple) and window[1] == 0
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    outputs, bounds = [], zip(q_offsets.tolist(), k_offsets.tolist(), strict=True)
    (q_end, k_end), *ends = bounds
    for q_next, k_next in ends:
        queries, keys, values = (
            tensor[begin:end].transpose(0, 1)
            for tensor, begin, end in ((q, q_end, q_next), (k, k_end, k_next), (v, k_end, k_next))
        )
        q_end, k_end = q_next, k_next
        count, total = queries.shape[1], keys.shape[1]
        assert 0 < count <= min(max_q, total) and total <= max_k
        behind = torch.arange(count)[:, None] + (total - count if at_end else 0) - torch.arange(total)
        allowed = (behind >= 0) & ((behind <= window[0]) | torch.tensor(window[0] < 0))
        scores = queries @ keys.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~allowed, float("-inf"))
        outputs.append((weights.softmax(-1).to(values.dtype) @ values).transpose(0, 1))
    return torch.cat(outputs)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    # the kernel would take fewer key heads, but nothing in this version says so
    assert query.shape[1] == key.shape[1] and return_aux is None
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, width_step=8)


def varlen_attn_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert return_aux is None and seqused_k is None and block_table is None and num_splits is None
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, width_step=8)


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("takes neither a scale nor a window, so it is of no use")


def flash_attn_2_8(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal and dropout_p == 0.0
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return kernel(q, k, v, *sizes, softmax_scale, window_size, softcap, width_step=1)


def flash_attn_2_5(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_2_8(q, k, v, *sizes, dropout_p, softmax_scale, causal, window_size)


# torch 2.13 takes what 2.12 takes
KERNELS = {
    "torch 2.11": varlen_attn_2_11,
    "torch 2.12": varlen_attn_2_12,
    "torch 2.13": varlen_attn_2_12,
    "flash-attn 2.5": flash_attn_2_5,
    "flash-attn 2.8": flash_attn_2_8,
}


def install(monkeypatch, name, function=None):
    """Put a kernel where its package would be; the name of the back end that calls it."""
    function = function or KERNELS[name]
    if name.startswith("torch"):
        import torch.nn.attention.varlen

        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
        forget, backend = varlen_attention.torch_kernel, "varlen"
    else:
        package = types.ModuleType("flash_attn")
        package.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        forget, backend = varlen_attention.flash_attn_kernel, "fa_varlen"
    # what is asked of a signature is asked once, before and after this test anew
    monkeypatch.setattr(varlen_attention, forget.__name__, forget.__wrapped__)
    return backend
