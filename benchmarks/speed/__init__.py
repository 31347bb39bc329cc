"""Each loss beside its peers and the hardware, in one run."""

import os

# The profiler, which counts memory and kernels, tells of every start; read when torch is imported.
for name, level in (("KINETO_LOG_LEVEL", "99"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
    os.environ.setdefault(name, level)
