"""Trains as a rank of many does, DDP and NCCL included, alone: torchrun ... -m benchmarks.gpu.one_rank CONFIG DEVICE."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from paligemma_vla.config import load_config
from paligemma_vla.training.distributed import Distributed, init_single_process_group
from paligemma_vla.training.run import begin_run, end_run
from paligemma_vla.training.trainer import Trainer


def main(config_path: str, device: str) -> None:
    config, alone = load_config(config_path, {}), Distributed(0, 1, torch.device(device, 0))
    init_single_process_group(alone)
    trainer = Trainer(config, alone)
    # A process alone needs no DDP. Its reducer and the collectives work with a group of one.
    trainer.parallel.distributed = replace(alone, world_size=2)
    lock = begin_run(config, trainer.data, alone, trainer.step, None)
    trainer.run()
    end_run(lock)
    alone.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
