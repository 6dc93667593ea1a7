# SPDX-License-Identifier: Apache-2.0
"""Reinforced Behavior Alignment (arXiv 2509.03526) for NVIDIA NeMo's speech language models.

Importing this package lets NeMo restore its ``.nemo`` files: NeMo instantiates only classes whose path starts with an
entry of an allow-list. NeMo itself takes 15 seconds to import, so if it is not there yet the entry is added the moment
it is.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

__version__ = "0.1.0"

_ALLOW_LIST_MODULE = "nemo.core.classes.common"
_PREFIX = "nemo_rba."


def _allow(module) -> None:
    if _PREFIX not in module.ALLOWED_TARGET_PREFIXES:
        module.ALLOWED_TARGET_PREFIXES.append(_PREFIX)


class _AllowOnImport(MetaPathFinder):
    """Adds the entry right after NeMo's module has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _ALLOW_LIST_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), _allow(module))
        return spec


if _ALLOW_LIST_MODULE in sys.modules:
    _allow(sys.modules[_ALLOW_LIST_MODULE])
else:
    sys.meta_path.insert(0, _AllowOnImport())
