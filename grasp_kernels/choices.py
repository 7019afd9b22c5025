"""Words that the command line and the subspace share; needs nothing, so that `-h` is instant."""

SCOPES = ("shared", "layer")
