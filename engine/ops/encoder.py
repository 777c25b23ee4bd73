"""An encoder's layer over whole texts as one native call: products, attention, norms and residual sums.

Built by models/ at load time, called by the executor's thread through the packed attention backend. What a text gives
has the same bits whatever texts are beside it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.ops import native
from engine.ops.linear import Linear

# By the numbers of kernels_encoder.h.
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2}


class _Layer(ctypes.Structure):
    """EncoderLayer of kernels_encoder.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "output", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "output_bias", "up_bias", "down_bias")),
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias", "out_norm", "out_norm_bias")),
        *((name, ctypes.c_int64) for name in ("type", "width", "heads", "head_dim", "inner", "activation")),
        *((name, ctypes.c_float) for name in ("scale", "eps", "out_eps")),
    ]


class EncoderLayer:
    """x = norm(x + output(attention(qkv(x)))), then x = out_norm(x + down(activation(up(x)))).

    Every token of a text attends to all of it. qkv gives the queries of all heads, then their keys, then their values.
    products: qkv, output, up and down. norms: weight float32 [width], bias likewise or None, and epsilon, of the two.
    """

    def __init__(
        self,
        products: Sequence[Linear],
        norms: Sequence[tuple[Tensor, Tensor | None, float]],
        *,
        heads: int,
        head_dim: int,
        scale: float,
        activation: str,
    ) -> None:
        library, code = native.library(), native.type_code(products[0].dtype)
        assert library is not None and code is not None
        self._library, self._dtype = library, products[0].dtype
        self._kept = list(products), [(weight.contiguous(), bias) for weight, bias, _ in norms]
        weights, biases = zip(*(product.addresses for product in products), strict=True)
        self.width, inner = products[1].out_features, products[2].out_features
        self._work = self.width * (4 * heads * head_dim + 2 * inner) // 8
        of_norms = [part for norm in self._kept[1] for part in norm]
        self._layer = _Layer(
            *weights,
            *biases,
            *(None if part is None else part.data_ptr() for part in of_norms),
            *(code, self.width, heads, head_dim, inner, ACTIVATIONS[activation]),
            *(scale, *(eps for _, _, eps in norms)),
        )

    @staticmethod
    def takes(products: Sequence[Linear], head_dim: int, activation: str) -> bool:
        """These products, and heads of that size, can go into one."""
        library = native.library()
        plain = all(type(product) is Linear and product.kind == "native" for product in products)
        return plain and library is not None and head_dim % library.lanes == 0 and activation in ACTIVATIONS

    def __call__(self, x: Tensor, starts: np.ndarray) -> Tensor:
        """[T, width], written over. starts: int32 [texts + 1], the first row of each text, then T."""
        assert x.is_contiguous() and x.dtype == self._dtype and x.shape == (starts[-1], self.width)
        self._library.by_work(len(x) * self._work).ol_encode(
            ctypes.addressof(self._layer), x.data_ptr(), starts.ctypes.data, len(starts) - 1, torch.get_num_threads()
        )
        return x
