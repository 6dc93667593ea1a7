# SPDX-License-Identifier: Apache-2.0
"""A helper process that ends with the one it helps, however that ends. It imports nothing heavy: helpers start here."""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Run in the helper: it exits as soon as its parent is gone, killed without a word included."""

    def wait() -> None:
        parent_process().join()
        os._exit(0)

    Thread(target=wait, daemon=True).start()
