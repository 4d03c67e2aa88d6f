"""A plain stand-in for torch's `varlen_attn`, which needs a GPU: its signatures, its conditions, its results."""

from inspect import signature

import torch

from trl_apa.models import packing, varlen


class StandIn:
    """Masked softmax, sequence by sequence, in float32 or more.

    Args:
        torch_version: whose signature it has: "2.10", "2.11", or "2.12", which later ones have too.
        dtypes: that it takes; the kernel has half precision alone.
    """

    def __init__(self, torch_version="2.12", dtypes=(torch.float16, torch.bfloat16)):
        self.dtypes, self.calls = dtypes, []
        kernels = {"2.10": self._of_2_10, "2.11": self._of_2_11, "2.12": self._of_2_12}
        self.kernel = kernels[torch_version]

    def _of_2_10(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        window = (-1, 0) if is_causal else (-1, -1)
        return self._attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, window, False)

    def _of_2_11(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return self._attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, False)

    def _of_2_12(
        self,
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
        return self._attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa)

    def _attend(self, query, key, value, query_ends, key_ends, most_queries, most_keys, scale, window, grouped):
        self._check(query, key, value, query_ends, key_ends, most_queries, most_keys, grouped)
        self.calls.append({"shape": tuple(query.shape), "keys": len(key), "window": window, "grouped": grouped})
        pieces = (
            states.tensor_split(ends[1:-1].long())
            for states, ends in ((query, query_ends), (key, key_ends), (value, key_ends))
        )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.cat([attended(*sequence, scale, window) for sequence in zip(*pieces, strict=True)])

    def _check(self, query, key, value, query_ends, key_ends, most_queries, most_keys, grouped):
        """What the kernel would refuse, or read wrongly."""
        assert query.dtype == key.dtype == value.dtype and query.dtype in self.dtypes
        assert query.dim() == 3 and key.shape == value.shape and query.shape[2] == key.shape[2]
        assert query.shape[2] % 8 == 0 and query.shape[2] <= 256
        assert query.shape[1] % key.shape[1] == 0 and (grouped or query.shape[1] == key.shape[1])
        assert all(states.stride(-1) == 1 for states in (query, key, value))
        for ends, states, most in ((query_ends, query, most_queries), (key_ends, key, most_keys)):
            assert ends.dtype == torch.int32 and ends.dim() == 1 and ends.is_contiguous()
            assert type(most) is int and ends[0] == 0 and ends[-1] == len(states)
            assert int(ends.diff().max()) == most and int(ends.diff().min()) > 0


def attended(query, key, value, scale, window):
    """One sequence, `(tokens, heads, width)`; its last query is where its last key is."""
    group, (left, right) = query.shape[1] // key.shape[1], window
    parts = (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))
    q_HQD, k_HKD, v_HKD = (part.to(torch.promote_types(part.dtype, torch.float32)).transpose(0, 1) for part in parts)
    behind = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    hidden = ((behind > left) & (left >= 0)) | ((-behind > right) & (right >= 0))
    weights = (scale * q_HQD @ k_HKD.mT).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v_HKD).transpose(0, 1).to(query.dtype)


def as_if_on_a_gpu(monkeypatch, torch_version="2.12", dtypes=(torch.float16, torch.bfloat16)):
    """Have packed rows attend by the stand-in, and return it."""
    stand_in = StandIn(torch_version, dtypes)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in.kernel)
    monkeypatch.setattr(varlen, "is_for_flash", lambda *states: True)
    monkeypatch.setattr(varlen, "KERNEL_TYPES", dtypes)
    return stand_in


def parameters(function):
    """Names, kinds and defaults of what a function takes."""
    return [(p.name, p.kind, p.default) for p in signature(function).parameters.values()]


def sdpa_calls(monkeypatch):
    """Notes the calls of SDPA for sequences of packed rows."""
    calls, attend = [], packing.sdpa_attention_forward

    def noted(module, query, *args, **kwargs):
        calls.append(tuple(query.shape))
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(packing, "sdpa_attention_forward", noted)
    return calls
