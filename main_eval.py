"""Compare a policy's actions with recorded episodes; see `paligemma-vla evaluate`."""

import sys

from paligemma_vla.cli.main import script

if __name__ == "__main__":
    sys.exit(script("evaluate"))
