# SPDX-License-Identifier: Apache-2.0
"""The architecture of DESIGN, enforced: who may import whom, how long a file may be, what no file may hold.

Everything is read with ``ast``, imports inside functions too; nothing of the package is imported.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nemo_rba"

WORDS, GROUND, ROOMS, LOOPS = range(4)
FLOORS = {
    **dict.fromkeys(("types", "protocols", "functional", "manifest", "memory", "stages", "language"), WORDS),
    "interruption": WORDS,
    **dict.fromkeys(("distributed", "conversion"), GROUND),
    **dict.fromkeys(("synthesis", "data", "rewards", "modules", "checkpoint", "benchmarks"), ROOMS),
    **dict.fromkeys(("algorithms", "evaluation", "models", "plan"), LOOPS),
}
# Upstream package -> the parts of ours that may import it, as prefixes of "room/module".
UPSTREAM = {
    "megatron": ("distributed/", "modules/", "models/", "checkpoint/", "algorithms/policy", "plan/shapes"),
    "nemo": (
        "data/",
        "modules/perception",
        "models/",
        "checkpoint/",
        "synthesis/tts",
        "synthesis/filters",
        "synthesis/quality",
        "plan/shapes",
        "__init__",
    ),
    "nemo.utils": ("algorithms/",),
    "transformers": ("synthesis/teacher", "synthesis/embedding", "synthesis/filters", "rewards/", "conversion/"),
    "hydra": (),
}
EVERYONE_MAY_IMPORT = {"nemo.utils.logging"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 75
SPDX = "# SPDX-License-Identifier: Apache-2.0"

Sources = dict[str, str]  # path below the repository, with "/" -> text


def imported_names(tree: ast.Module) -> set[tuple[str, int]]:
    """Full dotted names a module imports, with their lines; ``from a import b`` is ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {(f"{module}.{alias.name}", node.lineno) for alias in node.names}
    return names


def part_of(path: str) -> str:
    """ "nemo_rba/data/loader.py" -> "data/loader"."""
    return path.removeprefix(f"{PACKAGE}/").removesuffix(".py")


def room_of(part: str) -> str:
    """The room, "" for the package's own ``__init__``; words are one room."""
    first = part.split("/")[0]
    return "" if first == "__init__" else "words" if FLOORS.get(first) == WORDS else first


def layer_violations(sources: Sources) -> list[str]:
    """Imports that point up, sideways or to unknown places, and rooms without a floor."""
    found = []
    for path, text in sources.items():
        part = part_of(path)
        first = part.split("/")[0]
        if first == "__init__":
            continue
        if first not in FLOORS:
            found.append(f"{path}: '{first}' has no floor; give it one in DESIGN and in tests/test_layers.py")
            continue
        for name, line in sorted(imported_names(ast.parse(text))):
            if name.startswith("."):
                found.append(f"{path}:{line}: relative import '{name}'; imports are absolute")
            if not name.startswith(f"{PACKAGE}."):
                continue
            target = name.split(".")[1]
            if target not in FLOORS:
                continue  # an attribute of the package itself, e.g. its version
            if room_of(target) != room_of(part) and FLOORS[target] >= FLOORS[first]:
                found.append(f"{path}:{line}: '{first}' (floor {FLOORS[first]}) may not import '{name}'")
    return found


def upstream_violations(sources: Sources) -> list[str]:
    """Imports of NeMo, megatron-core, transformers or hydra where they have no business."""
    found = []
    for path, text in sources.items():
        part = part_of(path)
        for name, line in sorted(imported_names(ast.parse(text))):
            owners = [up for up in UPSTREAM if name == up or name.startswith(f"{up}.")]
            if not owners or name in EVERYONE_MAY_IMPORT:
                continue
            if not any(part.startswith(home) for up in owners for home in UPSTREAM[up]):
                found.append(f"{path}:{line}: may not import '{name}'")
    return found


def cycles(sources: Sources) -> list[str]:
    """One line per import cycle between modules."""
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text for path, text in sources.items()
    }
    graph = {}
    for module, text in modules.items():
        names = {name for name, _ in imported_names(ast.parse(text))}
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = sorted((targets & set(modules)) - {module})
    found, finished = [], set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in finished:
            for target in graph[module]:
                visit(target, (*trail, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def style_violations(sources: Sources) -> list[str]:
    """Long files, long functions, missing licence lines, prints in the package, code in ``__init__``."""
    found = []
    for path, text in sources.items():
        lines = text.splitlines()
        if lines and lines[0] != SPDX:
            found.append(f"{path}:1: expected '{SPDX}'")
        if len(lines) > MAX_FILE_LINES:
            found.append(f"{path}: {len(lines)} lines, ceiling {MAX_FILE_LINES}")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, ceiling {MAX_FUNCTION_LINES}")
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if is_print and path.startswith(f"{PACKAGE}/"):
                found.append(f"{path}:{node.lineno}: print; use nemo.utils.logging")
        docstring = 0 if ast.get_docstring(tree) is None else 1
        is_room = path.startswith(f"{PACKAGE}/") and path.count("/") > 1
        if is_room and path.endswith("/__init__.py") and len(tree.body) > docstring:
            found.append(f"{path}: code in the __init__ of a room")
    return found


def read(*folders: str) -> Sources:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


# --- the repository ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [layer_violations, upstream_violations, cycles])
def test_the_package_keeps_its_architecture(check):
    assert "\n".join(check(read(PACKAGE))) == ""


def test_every_file_keeps_the_style():
    sources = read(PACKAGE, "examples", "tests") | {"setup.py": (ROOT / "setup.py").read_text(encoding="utf-8")}
    assert "\n".join(style_violations(sources)) == ""


def test_every_config_has_its_licence_line():
    missing = [path.name for path in (ROOT / "conf").rglob("*.yaml") if SPDX not in path.read_text().splitlines()[:1]]
    assert missing == []


# --- the checks themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nemo_rba/data/loader.py", "from nemo_rba.rewards.text import Exact"),  # sideways
        ("nemo_rba/data/loader.py", "import nemo_rba.models.rba_speech_lm"),  # up
        ("nemo_rba/data/loader.py", "from nemo_rba import algorithms"),
        ("nemo_rba/data/loader.py", "def f():\n    from nemo_rba.algorithms.policy import P"),  # hidden in a function
        ("nemo_rba/data/loader.py", "from .dataset import D"),
        ("nemo_rba/models/m.py", "from nemo_rba.algorithms.policy import P"),  # loops do not meet
        ("nemo_rba/evaluation/runner.py", "from nemo_rba.models.m import M"),
        ("nemo_rba/distributed/parallel.py", "from nemo_rba.conversion.hf import load"),
        ("nemo_rba/functional.py", "from nemo_rba.distributed.parallel import rank"),
        ("nemo_rba/attic/old.py", "x = 1"),  # a room without a floor
    ],
)
def test_an_import_that_does_not_point_down_is_found(path, line):
    assert len(layer_violations({path: line})) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nemo_rba/data/loader.py", "from nemo_rba.data.dataset import D"),
        ("nemo_rba/data/loader.py", "from nemo_rba.types import Rollout\nfrom nemo_rba import __version__"),
        (
            "nemo_rba/algorithms/policy.py",
            "from nemo_rba.modules import gpt\nimport nemo_rba.distributed.cpu",
        ),
        ("nemo_rba/protocols.py", "from nemo_rba.types import Rollout"),
        ("nemo_rba/__init__.py", "from nemo_rba.models.m import M"),
    ],
)
def test_an_import_that_points_down_is_allowed(path, line):
    assert layer_violations({path: line}) == []


@pytest.mark.parametrize(
    ("path", "line", "allowed"),
    [
        ("nemo_rba/modules/gpt.py", "import megatron.core", True),
        ("nemo_rba/algorithms/policy.py", "from megatron.core import parallel_state", True),
        ("nemo_rba/algorithms/rollout.py", "from megatron.core import parallel_state", False),
        ("nemo_rba/stages.py", "from nemo.utils import logging", True),
        ("nemo_rba/stages.py", "from nemo.utils import model_utils", False),
        ("nemo_rba/algorithms/alignment.py", "from nemo.utils import model_utils", True),
        ("nemo_rba/algorithms/alignment.py", "from nemo.core import ModelPT", False),
        ("nemo_rba/modules/perception.py", "from nemo.collections.asr import x", True),
        ("nemo_rba/modules/gpt.py", "def f():\n    import nemo.collections.asr", False),
        ("nemo_rba/rewards/reward_model.py", "import transformers", True),
        ("nemo_rba/data/prompt.py", "from transformers import AutoTokenizer", False),
        ("nemo_rba/data/prompt.py", "import transformers_extra", True),  # another package
        ("nemo_rba/models/m.py", "import hydra", False),
    ],
)
def test_upstream_imports(path, line, allowed):
    assert (upstream_violations({path: line}) == []) is allowed


def test_cycles_are_found():
    ring = {
        "nemo_rba/data/a.py": "from nemo_rba.data.b import x",
        "nemo_rba/data/b.py": "def f():\n    from nemo_rba.data import c",
        "nemo_rba/data/c.py": "import nemo_rba.data.a",
        "nemo_rba/data/d.py": "import nemo_rba.data.a",
    }
    assert cycles(ring) == ["nemo_rba.data.a -> nemo_rba.data.b -> nemo_rba.data.c -> nemo_rba.data.a"]
    del ring["nemo_rba/data/b.py"]
    assert cycles(ring) == []


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("nemo_rba/types.py", "x = 1", "SPDX"),
        ("nemo_rba/types.py", f"{SPDX}\n" + "x = 1\n" * MAX_FILE_LINES, "401 lines"),
        ("nemo_rba/types.py", f"{SPDX}\ndef f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f has 76 lines"),
        ("nemo_rba/types.py", f"{SPDX}\nprint(1)", "print"),
        ("nemo_rba/data/__init__.py", f"{SPDX}\nfrom nemo_rba.data.loader import L", "__init__"),
    ],
)
def test_style_violations_are_found(path, text, message):
    (found,) = style_violations({path: text})
    assert message in found


def test_good_style_passes():
    sources = {
        "nemo_rba/data/__init__.py": "",
        "nemo_rba/data/loader.py": f'{SPDX}\n"""Doc."""\n',
        "nemo_rba/__init__.py": f'{SPDX}\n__version__ = "0.1.0"',
        "examples/rba_chat.py": f"{SPDX}\nprint(1)",
    }
    assert style_violations(sources) == []
