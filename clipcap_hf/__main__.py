"""`python -m clipcap_hf` is the `clipcap` command."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
