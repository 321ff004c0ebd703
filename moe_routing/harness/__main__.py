"""`python -m moe_routing.harness ...` is lm-eval's command line with the model type `routed` registered."""

import sys

from moe_routing.harness.compare import main

sys.exit(main())
