"""``python -m nnunet_dp`` is the command ``nnunet-dp``."""

import sys

from nnunet_dp.cli import main

sys.exit(main())
