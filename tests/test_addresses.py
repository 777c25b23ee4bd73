"""Whose connection it is."""

from __future__ import annotations

import pytest

from engine.addresses import household


@pytest.mark.parametrize(
    ("host", "counts_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::%eth0/64"),
        ("::1", "::1"),
        ("no address", "no address"),
    ],
)
def test_who_has_one_address_of_a_network_has_all_of_it(host: str, counts_as: str) -> None:
    assert household(host) == counts_as


def test_networks_are_told_apart() -> None:
    assert household("2001:db8:1:2::1") == household("2001:db8:1:2:ffff::9") != household("2001:db8:1:3::1")
