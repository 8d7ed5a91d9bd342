"""The app of the cluster on a machine whose clocks are wrong, by CLOCK_AHEAD seconds: the calendar's, and the one that
counts from the machine's start. The event loop's clock is left as it is.
"""

import os
import time
from importlib import import_module

AHEAD = float(os.environ["CLOCK_AHEAD"])

# Before anything is imported that may take the functions themselves.
wall, wall_ns, clock_of = time.time, time.time_ns, time.clock_gettime
time.time = lambda: wall() + AHEAD
time.time_ns = lambda: wall_ns() + int(AHEAD * 1e9)
time.clock_gettime = lambda clock: clock_of(clock) + AHEAD

app = import_module("cluster_app").app
