"""`paligemma-vla plan`: the memory that training with a configuration needs, and what each change would save.

It needs neither data nor weights, nor the GPU it plans for. Exits with 0 when the plan fits, 1 when it does not.
"""

from __future__ import annotations

import argparse
import sys

from paligemma_vla.cli.arguments import add_config_arguments, configured, positive
from paligemma_vla.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device to plan for (default: a GPU if --memory_gb is given)")
    parser.add_argument("--memory_gb", type=float, help="memory of that device (default: what is left on this machine's)")
    parser.add_argument("--nproc", type=positive, default=1, help="training processes of all machines, which share the batch")
    parser.add_argument("--nproc_per_machine", type=positive, help="of these on one machine (default: all, at most 8)")
    parser.add_argument("--model_path_override", help="backbone: hub id or folder")


def main(args: argparse.Namespace) -> int:
    config = configured(args, {"model.vlm_config.model_name_or_path": args.model_path_override})
    import torch

    from paligemma_vla.model.architectures import architecture_to_plan
    from paligemma_vla.model.memory_plan import device_memory, plan_memory, with_remedies
    from paligemma_vla.training.distributed import Distributed, choose_device
    from paligemma_vla.training.preflight import check_processes

    device = choose_device(None)
    if args.device or args.memory_gb:
        device = torch.device(args.device or "cuda")
    available = args.memory_gb * 1e9 if args.memory_gb else device_memory(device)
    architecture, published = architecture_to_plan(config.model.vlm_config)
    if published:
        name = config.model.vlm_config.model_name_or_path
        sys.stdout.write(f"{name} is not here; planned with its published sizes\n")
    on_machine = args.nproc_per_machine or min(args.nproc, 8)
    if args.nproc % on_machine:
        raise ConfigError(f"--nproc: got {args.nproc}, expected a multiple of --nproc_per_machine ({on_machine})")
    check_processes(config, Distributed(0, args.nproc, device, 0, on_machine))
    if args.memory_gb is not None and not 0 < args.memory_gb < 1e6:
        raise ConfigError(f"--memory_gb: got {args.memory_gb}, expected gigabytes, more than 0")
    plan = with_remedies(plan_memory(config, architecture, device, available, args.nproc, on_machine))
    sys.stdout.write(plan.table() + "\n")
    return 0 if plan.fits else 1
