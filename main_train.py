"""Train on one device; see `paligemma-vla train`."""

import sys

from paligemma_vla.cli.main import script

if __name__ == "__main__":
    sys.exit(script("train"))
