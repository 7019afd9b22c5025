"""What setup.py needs to compile the native parts; no part of the installed package."""


class LeftOut(Exception):
    """The CUDA kernels cannot be built: why, and what would change that."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
