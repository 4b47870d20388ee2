"""Train on every GPU of this machine, or with --nproc on CPU, or under torchrun; see `paligemma-vla train`."""

import sys

from paligemma_vla.cli.main import script

if __name__ == "__main__":
    sys.exit(script("train", entry="main_ddp"))
