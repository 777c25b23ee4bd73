"""Names of pages are chains: a page's depends on all before it, and on whose it is."""

from __future__ import annotations

import hashlib

import numpy as np

from engine.page_names import page_names, root_name

DATA = np.arange(40, dtype=np.int32).tobytes()


def test_a_chain_may_be_taken_up_anywhere() -> None:
    root = root_name("layout", "tenant")
    names = page_names(root, DATA, 8, 0, 5)
    assert len(set(names)) == 5 and all(len(name) == 32 for name in names)
    assert names[0] == hashlib.sha256(root + DATA[:32]).digest()
    assert page_names(names[1], DATA, 8, 2, 5) == names[2:]


def test_whose_and_what_came_before_are_in_a_name() -> None:
    last = page_names(root_name("layout", ""), DATA, 8, 0, 5)[-1]
    other = np.array([7, *range(1, 40)], np.int32).tobytes()
    for root, data in (
        (root_name("layout", "tenant"), DATA),
        (root_name("layou", "t"), DATA),
        (root_name("other", ""), DATA),
        (root_name("layout"), DATA),
        (root_name("layout", ""), other),
    ):
        assert page_names(root, data, 8, 0, 5)[-1] != last
