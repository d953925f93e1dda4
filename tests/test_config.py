from dataclasses import dataclass, field

import pytest

from moescope.config import IntList, build, read_yaml
from moescope.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Inner:
    length: int = 4


@dataclass(frozen=True, kw_only=True)
class Outer:
    source: int
    experts: IntList = ()
    inner: Inner = field(default_factory=Inner)


def test_builds_nested_dataclasses():
    built = build(Outer, {"source": 1, "experts": [0, 4], "inner": {"length": 8}}, "study")
    assert built == Outer(source=1, experts=(0, 4), inner=Inner(length=8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": 1, "expert": [0]}, "unknown key in study: 'expert'.*Did you mean 'experts'"),
        ({"source": 1, "inner": {"lenght": 8}}, "study.inner: 'lenght'.*'length'"),
        ({}, "study lacks source"),
        ({"source": "one"}, "study.source: .*integer.*'one'"),
        ([1], "study must hold keys and values"),
    ],
)
def test_refuses_what_does_not_fit(values, message):
    with pytest.raises(OptionError, match=message):
        build(Outer, values, "study")


def test_unreadable_yaml_is_one_clear_error(tmp_path):
    broken = tmp_path / "a.yaml"
    broken.write_text("a: [1")
    for path in (broken, tmp_path / "missing.yaml"):
        with pytest.raises(OptionError, match=f"cannot read .*{path.name}"):
            read_yaml(path)
