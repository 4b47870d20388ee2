"""Processes that load: torch's DataLoader with workers that start safely and end with the training process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from paligemma_vla.config import VLAConfig
from paligemma_vla.workers import end_with


def start_loader(
    dataset: Dataset[Any], sampler: Iterable[Any], config: VLAConfig, collate: Callable[[Any], Any], pin_memory: bool
) -> DataLoader[Any]:
    """A torch DataLoader over whatever `sampler` has for `dataset.__getitems__`.

    Workers start through forkserver: forking a process that has run OpenMP, CUDA or gloo threads can hang.
    """
    workers = config.data.num_workers
    if workers:
        _start_forkserver()
    return DataLoader(
        dataset,
        batch_sampler=_AsSampler(sampler),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory and config.data.pin_memory,
        prefetch_factor=config.data.prefetch_factor if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=partial(_prepare_worker, os.getpid()),
        # Of its own, or starting a loader would draw from the global one and a resume could not restore it.
        generator=torch.Generator(),
    )


class _AsSampler(Sampler[Any]):
    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


def _start_forkserver() -> None:
    """Start the process that workers are forked from, deaf to SIGTERM (to SIGINT it is anyway): were it gone, its workers
    would be taken for dead. It ends with this process."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may change what a signal does; started from here, it is as torch leaves it
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a program that is started inherits
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare_worker(trainer: int, worker: int) -> None:
    torch.set_num_threads(1)
    # A signal to the whole group reaches the workers too, but the trainer finishes its step and stops them itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(trainer)  # torch watches the parent of a worker, but that is only what workers are forked from
