"""`python -m grasp_kernels` is `grasp-kernels`."""

import sys

from grasp_kernels.cli import main

sys.exit(main())
