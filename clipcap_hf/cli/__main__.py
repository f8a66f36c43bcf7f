"""`python -m clipcap_hf.cli` is the `clipcap` command, for `torchrun -m`."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
