from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from server.ray.merging import merge

ONE = """# HELP a_total Of a.
# TYPE a_total counter
a_total{model="x{y} z",le="1"} 1.0
a_total 2
# HELP b Of b.
# TYPE b gauge
b{} 3e5
"""


def test_samples_say_whose_they_are_and_families_are_told_once() -> None:
    merged = merge([("r1", ONE), ("r2", ONE.replace("3e5", "4"))])
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert list(families) == ["a", "b"] and merged.count("# TYPE a_total") == 1
    assert [(sample.labels, sample.value) for sample in families["a"].samples] == [
        ({"replica": name, **more}, value)
        for name in ("r1", "r2")
        for more, value in (({"model": "x{y} z", "le": "1"}, 1.0), ({}, 2.0))
    ]
    assert {sample.labels["replica"]: sample.value for sample in families["b"].samples} == {"r1": 3e5, "r2": 4.0}
