"""The version of the package, and the releases of other packages in its test runs."""

__version__ = "0.1.0"

# Oldest and newest, run by hand before a release (CONTRIBUTING.md). The oldest is the least that
# pyproject.toml admits.
TESTED = {
    "torch": ("2.10.0", "2.14.1"),
    "triton": ("3.6.0", "3.9.0"),
    "transformers": ("5.6.0", "5.24.0"),
    "peft": ("0.20.0", "0.21.2"),
    "accelerate": ("1.4.0", "1.15.0"),
    "trl": ("1.0.0", "1.16.0"),
}
