# SPDX-License-Identifier: Apache-2.0
"""Install the plug-in in an NGC container, without touching what the container brings; then import it, with versions.

python examples/cluster/container.py --constraints constraints-2.7.3.txt

Run by the Dockerfile, and where there is no docker by a cluster's own container (docs/cluster.md). Only small packages
that the container lacks are installed, each in its pinned version and without dependencies: pip cannot replace torch.
"""

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = {  # module: package; what nemo_rba imports beside NeMo and torch, and what that imports
    "espeakng_loader": "espeakng-loader",
    "kaldialign": "kaldialign",
    "peft": "peft",
    "accelerate": "accelerate",  # peft
    "py3langid": "py3langid",
    "datasketch": "datasketch",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "sacrebleu": "sacrebleu",
    "portalocker": "portalocker",  # sacrebleu, as the next three
    "tabulate": "tabulate",
    "colorama": "colorama",
    "lxml": "lxml",
}
SHOWN = ("torch", "nemo", "megatron.core", "lightning", "transformers", "transformer_engine", "apex", "nemo_rba")
CHECK = f"""
import importlib, pkgutil, nemo_rba
found = [module.name for module in pkgutil.walk_packages(nemo_rba.__path__, "nemo_rba.")]
for name in [*found, *{tuple(SMALL)}, "nemo.collections.speechlm2.models", "nemo.collections.tts.models"]:
    importlib.import_module(name)
print(len(found), "modules of nemo_rba can be imported")
for name in {SHOWN}:
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "(no version)"))
    except ImportError as error:
        print(name, "is not there:", error)
"""


def pinned(package: str, constraints: str) -> str:
    """``package==version`` as a constraints file has it.

    Raises:
        ValueError: the file does not name the package.
    """
    found = re.search(rf"^{re.escape(package)}==\S+$", constraints, flags=re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise ValueError(f"{package} is in no line of the constraints file")
    return found.group()


def missing(modules: dict[str, str], constraints: str) -> list[str]:
    """Pinned requirements of the modules that are not there."""
    return [pinned(package, constraints) for name, package in modules.items() if not importlib.util.find_spec(name)]


def has_megatron() -> bool:
    """Whether megatron-core can be imported; NGC's NeMo containers have it on the path, without metadata."""
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None


def installer() -> list[str]:
    """pip, or uv where the container's environment has no pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-deps"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable, "--no-cache", "--no-deps"]
    raise SystemExit("this container has neither pip in its environment nor uv; install one of them first")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraints", required=True, help="a file of this repository with the pinned versions")
    parser.add_argument("--megatron-core", action="store_true", help="install it too where the container has none")
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed")
    arguments = parser.parse_args(argv)
    constraints = (ROOT / arguments.constraints).read_text(encoding="utf-8")
    wanted = missing(SMALL, constraints)
    if arguments.megatron_core and not has_megatron():
        wanted.append(pinned("megatron-core", constraints))
    print("lacking:", ", ".join(wanted) or "nothing", flush=True)
    if arguments.dry_run:
        return
    before = importlib.metadata.version("torch")
    if wanted:
        subprocess.run([*installer(), *wanted], check=True)
    subprocess.run([*installer(), "--editable", str(ROOT)], check=True)
    check()
    if (now := importlib.metadata.version("torch")) != before:
        raise SystemExit(f"torch was {before} and is {now}: the container's own was replaced")


def check() -> None:
    """Import everything in a fresh process, with versions; a failure ends the build."""
    subprocess.run([sys.executable, "-c", CHECK], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
