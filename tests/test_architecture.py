"""The shape of the house: who may import whom, and how quick the front door is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moescope

ROOT = Path(moescope.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# A room may import itself and rooms further down.
ORDER = [
    {"__main__"},
    {"cli"},
    {"demo", "reproduction", "comparison"},
    {"scheduler"},
    {"reports", "analyses"},
    {"evaluate"},
    {"decoding"},
    {"alignment", "captures", "interventions", "surgery"},
    {"models", "corpora"},
    {"experts"},
    {"measures"},
    {"runs", "config", "progress"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
NO_TRANSFORMERS = {"measures", "experts", "alignment"}


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module):
    room = room_of(module)
    if room == "__init__":
        return
    for name in imports(module):
        top, _, rest = name.partition(".")
        if top == "transformers":
            assert room not in NO_TRANSFORMERS, f"{module} imports transformers"
        target = rest.partition(".")[0]
        if top != "moescope" or target == room or target == "__version__":
            continue
        assert LEVEL[target] > LEVEL[room], f"{module} ({room}) imports {name}"


def test_analyses_and_reports_do_not_know_each_other():
    for module in MODULES:
        for one, other in (("analyses", "reports"), ("reports", "analyses")):
            if room_of(module) == one:
                assert not any(n.startswith(f"moescope.{other}") for n in imports(module)), module


def test_every_room_has_its_place():
    rooms = {room_of(module) for module in MODULES} - {"__init__"}
    assert rooms <= set(LEVEL), rooms - set(LEVEL)


def test_import_is_light_and_quick():
    code = (
        "import sys, time; start = time.perf_counter(); import moescope; "
        "seconds = time.perf_counter() - start; "
        "heavy = {'torch', 'transformers', 'pandas', 'altair', 'numpy'} & set(sys.modules); "
        "print(seconds, *heavy)"
    )
    seconds, *heavy = min(
        (
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()
            for _ in range(3)
        ),
        key=lambda output: float(output[0]),
    )
    assert heavy == []
    assert float(seconds) < 0.2


def test_every_public_name_loads():
    for name in moescope.__all__:
        assert getattr(moescope, name) is not None
    assert set(moescope._HOMES) == set(moescope.__all__) - {"__version__"}


def test_no_module_hides_a_public_name():
    modules = {room_of(module) for module in MODULES}
    assert modules.isdisjoint(moescope.__all__)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        moescope.no_such_name  # noqa: B018
