"""The directions of the residual stream that a retraining must not use, and their file.

Shapes: `D` width of the residual stream, `k` directions in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.files import open_tensors, read_all, whole_file
from grasp_kernels.inert import inert, shown
from grasp_kernels.models.architectures import Site
from grasp_kernels.models.tensors import refuse_nonfinite

_ORTHONORMAL_TOLERANCE = 1e-5
_FORMAT = "grasp_kernels.subspace"
_FORMAT_VERSION = 5
_BASIS, _GAIN = "basis", "gain."  # keys of the tensors


@dataclass(frozen=True)
class Subspace:
    """Directions of a fine-tune in the residual stream, one basis for all layers.

    Attributes:
        basis: `V[D,k]`, float32, orthonormal columns.
        gains: module name in the base model of the norm after a writer -> `γ[D]`. Such a writer
            moves the stream along `γ ⊙ y`, so the basis at its output differs (see `at`). A norm
            without an entry has `γ = 1`.
        notes: findings and assumptions of the identification, one sentence each.
        metadata: the origin of the directions (adapters, base_model, model_type, k,
            singular_values, n_blocks, versions). JSON can hold it.

    Raises:
        TypeError, ValueError: a basis that is not float32, finite and orthonormal (`orthonormal`
            makes one of independent directions), or a gain of another width.
    """

    basis: Tensor
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_basis(self.basis)
        for norm, gain in self.gains.items():
            if not isinstance(gain, Tensor) or not gain.is_floating_point():
                raise TypeError(
                    f"The gain of {shown(norm)} is no float tensor; give the norm's weight."
                )
            self._check_gain(norm, gain)
            refuse_nonfinite(f"the gain of {norm}", gain)

    @property
    def k(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    def at(self, site: Site, gain: Tensor | None = None) -> Tensor:
        """Return the basis `[D,k]`, float32, in the coordinates of a site's output.

        Args:
            gain: `γ[D]` of the norm after the site; None: the entry in `gains`.

        Raises:
            ValueError: a gain of another width.
        """
        gain = self.gains.get(site.norm or "") if gain is None else gain
        if gain is not None:
            self._check_gain(str(site.norm), gain)
        wide = self.basis.detach().cpu().double()
        directions = site.scaled(wide, gain)
        if directions is wide:  # no norm between site and stream
            return self.basis
        return orthonormal(f"{site.norm!r} (gain folded in)", directions)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, with notes and metadata as JSON in its header."""
        from safetensors.torch import save_file

        tensors = {_BASIS: self.basis} | {_GAIN + n: gain for n, gain in self.gains.items()}
        header = {"version": _FORMAT_VERSION, "notes": self.notes, "metadata": self.metadata}
        text = json.dumps(header, allow_nan=False)
        with whole_file(path) as temporary:
            stored = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(stored, temporary, metadata={_FORMAT: text})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Subspace:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a subspace file, or one of another format.
        """
        remedy = "make one with `grasp-kernels identify`"
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no subspace file {str(path)!r}; {remedy}.")
        with open_tensors(path, remedy) as file:
            text = (file.metadata() or {}).get(_FORMAT)
            tensors = read_all(file) if text else {}
        try:
            if text is None:
                raise ValueError("it has no header of one")
            notes, metadata = _fields(json.loads(text))
            basis = tensors.pop(_BASIS)
            if strange := sorted(key for key in tensors if not key.startswith(_GAIN)):
                raise ValueError(f"nothing refers to its tensor {shown(strange[0])}")
            gains = {key.removeprefix(_GAIN): gain for key, gain in tensors.items()}
            return cls(basis, gains, notes, metadata)
        except KeyError as error:
            wrong = f"it has no {shown(error.args[0])}"
        except (TypeError, ValueError, RecursionError) as error:
            wrong = str(error).partition(";")[0].rstrip(".")
        raise ValueError(f"{str(path)!r} does not hold a valid subspace ({wrong}); {remedy}.")

    def summary(self) -> str:
        """Return the number of directions and the notes, in plain text."""
        many = "1 direction" if self.k == 1 else f"{self.k} directions"
        head = f"{many} of a residual stream of width {len(self.basis)}."
        return "\n".join([head, *(f"- {inert(note)}" for note in self.notes)])

    def _check_gain(self, norm: str, gain: Tensor) -> None:
        if gain.shape != self.basis.shape[:1]:
            raise ValueError(
                f"The gain of {shown(norm)} has shape {tuple(gain.shape)}, but the directions have "
                f"width {len(self.basis)}; give gains and directions of the same model."
            )


def _fields(header: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return notes and metadata of a header, checked: the file may come from anywhere."""
    version = header.get("version") if isinstance(header, dict) else header
    if version != _FORMAT_VERSION or not isinstance(header, dict):
        raise ValueError(f"its format is {shown(version)}, this release reads {_FORMAT_VERSION}")
    notes, metadata = header["notes"], header["metadata"]
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"notes is {shown(notes)}")
    fits = isinstance(metadata, dict) and isinstance(metadata.get("model_type", ""), str | None)
    if not fits:
        raise ValueError(f"metadata is {shown(metadata)}")
    return tuple(notes), metadata


def check_subspace(value: Any) -> None:
    """Raise unless the value is a `Subspace` or None; the path of a file is neither."""
    if not isinstance(value, Subspace | None):
        raise TypeError(
            f"The subspace is a {type(value).__name__}; give a Subspace, as of Subspace.load."
        )


def is_subspace(path: str | PathLike[str]) -> bool:
    """Say whether `path` is a file of `Subspace.save`; adapters are folders or other files.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a safetensors file that is not whole.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no {path}: give an adapter folder or a subspace file.")
    if Path(path).is_dir():
        return False
    try:
        with open_tensors(path, "give a complete file") as file:
            return any(key.startswith("grasp_kernels") for key in file.metadata() or {})
    except ValueError:
        if Path(path).suffix == ".safetensors":
            raise
        return False  # a pickle, or an index of shards


def _check_basis(basis: Tensor) -> None:
    """Raise unless `basis` is a float32 `[D,k]` tensor with k ≥ 1 finite orthonormal columns."""
    if not isinstance(basis, Tensor) or basis.dtype != torch.float32:
        kind = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
        raise TypeError(f"The basis is {kind}; convert it to a float32 tensor.")
    if basis.ndim != 2 or not 0 < basis.shape[1] <= basis.shape[0]:
        raise ValueError(
            f"The basis has shape {tuple(basis.shape)}; it must be [width, directions] with at "
            "least one direction and no more than the width."
        )
    if not torch.isfinite(basis).all():
        raise ValueError("The basis has non-finite values; identify it again from finite weights.")
    wide = basis.double()
    error = float((wide.mT @ wide - torch.eye(basis.shape[1], device=basis.device)).norm())
    if error > _ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"The basis is not orthonormal (‖VᵀV − I‖ = {error:.2g}, allowed "
            f"{_ORTHONORMAL_TOLERANCE:g}); use grasp_kernels.subspace.orthonormal on its columns."
        )


def orthonormal(name: str, directions: Tensor) -> Tensor:
    """Return orthonormal float32 columns with the span of `directions` `[D,k]` (or `[D]`).

    Each column keeps its sign.

    Raises:
        ValueError: the columns are not finite or not independent.
    """
    columns = directions.detach().cpu().double()
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or columns.shape[1] == 0 or columns.shape[1] > columns.shape[0]:
        raise ValueError(
            f"The directions of {name} have shape {tuple(directions.shape)}; give [width, "
            "directions]."
        )
    lengths = columns.norm(dim=0)
    if not torch.isfinite(columns).all() or bool((lengths == 0).any()):
        raise ValueError(f"The directions of {name} have zero or non-finite columns; remove those.")
    q, r = torch.linalg.qr(columns / lengths)
    pivots = r.diagonal()
    if bool((pivots.abs() < 1e-6).any()):
        raise ValueError(f"The directions of {name} are dependent; give independent columns.")
    return (q * pivots.sign()).float()
