"""`paligemma-vla serve`: a policy for robots and benchmarks, over the field's network protocols."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from pathlib import Path

from paligemma_vla.cli.arguments import natural, positive

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from paligemma_vla.serving.keys import PRESETS

    text = "a .pth.tar of a training run, an exported folder, or org/name on the Hugging Face hub"
    parser.add_argument("--checkpoint_path", required=True, metavar="P", help=text)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    text = "on CUDA: no graphs; the port opens sooner, and answers take longer"
    parser.add_argument("--no_compile", action="store_true", help=text)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines (default: %(default)s)"
    )
    parser.add_argument("--port", type=natural, default=8000, help="0 takes a free one (default: %(default)s)")
    text = "port of GR00T's ZeroMQ protocol, 0 takes a free one (default: not spoken)"
    parser.add_argument("--zmq_port", type=natural, metavar="N", help=text)
    parser.add_argument("--api_key_env", metavar="NAME", help="environment variable that holds the key clients have to send")
    parser.add_argument("--max_clients", type=positive, default=32, metavar="N")
    parser.add_argument("--max_batch", type=positive, default=8, metavar="N", help="observations answered at once")
    parser.add_argument(
        "--batch_wait_ms", type=float, default=5.0, metavar="MS", help="what the first of them waits for others"
    )
    text = "[PROTOCOL:]image_1=NAME state=A+B ...: what the clients call cameras, state and prompt; - for no such camera"
    parser.add_argument("--keys", nargs="+", default=[], metavar="K", help=text)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="the names of a known robot or benchmark")
    parser.add_argument("--execute", type=positive, metavar="M", help="actions of each chunk that are sent")
    text = "vla-eval: give each action to N observations in a row, where a benchmark steps N times as fast as the policy's data"
    parser.add_argument("--action_repeat", type=positive, default=1, metavar="N", help=text)
    parser.add_argument("--seed", type=natural, help="of the noise of every answer (default: drawn afresh)")
    text = "actions are kept within the data's range; other limits: --set control.action_rate=[0.05,0.05,null] (see configs/)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    parser.add_argument("--no_limits", action="store_true", help="send what the policy predicts, without any limit")
    text = "folder for what clients show and do: episodes where they send every step, else a log"
    parser.add_argument("--record", type=Path, metavar="D", help=text)
    parser.add_argument("--certfile", type=Path, metavar="F", help="TLS certificate, PEM")
    parser.add_argument("--keyfile", type=Path, metavar="F", help="its key")


def main(args: argparse.Namespace) -> int:
    from paligemma_vla.errors import ConfigError
    from paligemma_vla.serving.access import address_for_clients, check_address, tls_context
    from paligemma_vla.serving.build import build_service
    from paligemma_vla.serving.protocols import groot
    from paligemma_vla.serving.server import PolicyServer, ServeSettings
    from paligemma_vla.training.distributed import choose_device

    api_key = None
    if args.api_key_env is not None and not (api_key := os.environ.get(args.api_key_env, "").strip()):
        raise ConfigError(f"--api_key_env {args.api_key_env}: no such environment variable, or an empty one; set it to the key")
    if args.zmq_port is not None:
        groot.require_zmq()
    settings = ServeSettings(
        host=args.host,
        port=args.port,
        api_key=api_key,
        max_clients=args.max_clients,
        max_batch=args.max_batch,
        batch_wait_s=args.batch_wait_ms / 1000,
        max_queue=args.max_clients,
        execute=args.execute,
        certfile=args.certfile,
        keyfile=args.keyfile,
        zmq_port=args.zmq_port,
        action_repeat=args.action_repeat,
    )
    check_address(settings.host, settings.port)  # both before a checkpoint is loaded for minutes
    tls_context(settings.certfile, settings.keyfile)
    device = choose_device(args.device)
    service = build_service(
        args.checkpoint_path,
        str(device),
        keys=args.keys,
        preset=args.preset,
        seed=args.seed,
        limited=not args.no_limits,
        assignments=args.set,
        record=args.record,
        graphs=args.max_batch if device.type == "cuda" and not args.no_compile else 0,
    )
    if (args.execute or 0) > (horizon := service.contract["horizon"]):
        raise ConfigError(f"--execute {args.execute}: this policy's chunks have {horizon} actions; take at most as many")

    async def run() -> None:
        server = PolicyServer(service, settings)
        scheme = "wss" if settings.certfile else "ws"

        def ready() -> None:
            host = address_for_clients(settings.host)
            place = f"{host}:{server.port}"
            logger.info("serving at %s://%s; open http%s://%s in a browser to watch", scheme, place, scheme[2:], place)
            if server.zmq_port is not None:
                logger.info("serving GR00T's protocol at tcp://%s:%d", host, server.zmq_port)

        await server.run(ready)

    asyncio.run(run())
    return 0
