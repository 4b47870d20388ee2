"""Write a random tiny PaliGemma with its tokenizer, in Hugging Face format."""

from __future__ import annotations

import argparse
import logging

from paligemma_vla.cli.arguments import from_flags, natural, positive

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--image_size", type=positive, default=64, help="side of the images in pixels")
    parser.add_argument("--patch_size", type=positive, default=16, help="side of a patch; divides image_size")
    parser.add_argument("--width", type=positive, default=128, help="width of both towers")
    parser.add_argument("--vision_layers", type=positive, default=3)
    parser.add_argument("--text_layers", type=positive, default=2)
    parser.add_argument("--seed", type=natural, default=0)


def main(args: argparse.Namespace) -> int:
    from paligemma_vla.errors import ConfigError
    from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma

    if args.image_size % args.patch_size or args.width % 8:
        raise ConfigError(
            f"tiny: got --image_size {args.image_size} --patch_size {args.patch_size} --width {args.width}, expected a whole "
            f"number of patches and a width divisible by 8"
        )
    logger.info(
        "%s: written; use it with --model_path_override", write_tiny_paligemma(args.output_dir, from_flags(TinySpec, args))
    )
    return 0
