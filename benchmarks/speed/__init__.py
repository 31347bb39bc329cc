"""Each loss beside its peers and the hardware, in one run."""
