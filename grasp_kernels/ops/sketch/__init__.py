"""The Gaussian sketch of a matrix, whose test matrix is never stored: specification, backends."""
