"""Compute normalisation statistics; see `paligemma-vla stats`."""

import sys

from paligemma_vla.cli.main import script

if __name__ == "__main__":
    sys.exit(script("stats"))
