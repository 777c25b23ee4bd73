"""A matrix for every head: what latent attention multiplies queries and results by.

Built by models/ at load time, called by the executor's thread. On the CPU by our own kernel where it knows the dtype,
which gives a row the same bits in any batch; else by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import native


class HeadLinear:
    """y[t, h] = weight[h] x[t, h], with weight [heads, out_features, in_features], which it may take apart."""

    def __init__(self, weight: Tensor) -> None:
        self.heads, self.out_features, self.in_features = weight.shape
        self._dtype = weight.dtype
        self._library = native.library() if weight.is_cpu else None
        code = native.type_code(weight.dtype)
        if self._library is None or code is None:
            self._library = None
            self._weight = weight.contiguous()
            return
        self._code = code
        size = self._library.hold.ol_packed_size(code, self.out_features, self.in_features)
        self._weight = torch.empty((self.heads, size), dtype=weight.dtype)
        for packed, own in zip(self._weight, weight, strict=True):
            matrix = own.contiguous()
            self._library.release.ol_pack_weight(
                code, matrix.data_ptr(), *matrix.shape, packed.data_ptr(), torch.get_num_threads()
            )

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """x [T, heads, in_features] -> out [T, heads, out_features]; both may be parts of wider heads."""
        if self._library is None:
            out.copy_(torch.bmm(x.transpose(0, 1), self._weight.transpose(1, 2)).transpose(0, 1))
            return out
        assert x.dtype == out.dtype == self._dtype and x.shape[1:] == (self.heads, self.in_features)
        assert x.stride(2) == out.stride(2) == 1 and out.shape[1:] == (self.heads, self.out_features)
        rows = x.shape[0]
        handle = self._library.by_work(rows * self.heads * self.out_features * self.in_features // 8)
        handle.ol_linear_heads(
            self._code,
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            rows,
            self.in_features,
            self._weight.data_ptr(),
            self.out_features,
            self.heads,
            out.data_ptr(),
            out.stride(0),
            out.stride(1),
            torch.get_num_threads(),
        )
        return out
