"""The process that data workers are forked from; without torch, so that it can start before torch is here."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver


def start_server() -> None:
    """Start the clean process that workers are forked from, for this one may have threads and a GPU.

    It imports torch, once, while the caller goes on.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hitsr_fast.train.data"])
    forkserver.ensure_running()
