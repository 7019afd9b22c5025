"""The subspace that a retrain must not rely on: bases by module name, and why to trust them.

Shapes: `D` width of the residual stream, `k` directions in it, `N` outputs of a linear layer, `Q`
columns of its basis.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_kernels.files import open_tensors, read_all, whole_file
from grasp_kernels.models.architectures import Site
from grasp_kernels.subspace.header import current, header_fault

_ORTHONORMAL_TOLERANCE = 1e-5
_FORMAT = "grasp_kernels.subspace.basis"
_FORMAT_VERSION = 4  # see `header.current`


@dataclass(frozen=True)
class Subspace:
    """Bases of the directions along which a fine-tune moved, by module name in the base model.

    Attributes:
        bases: module that writes to the stream -> `V[N,Q]`, float32, orthonormal columns, in the
            coordinates of its own output: those of the stream, unless a norm stands between (then
            its gain is folded in).
        stream: `[D,k]`, the basis in the stream, one for all layers; None without one.
        k: number of directions.
        reasons: what was measured and what each test gave, in sentences.
        evidence: JSON-able; "spectra" is a list of records, one per basis that was looked for, with
            the keys k, singular_values, null (95 % quantile by index) and gap; "agreement" is a
            list of records with the keys layers (ids), values (cosines), chance. The sources of
            subspaces add keys of their own.
        metadata: JSON-able; where the bases come from (source, base_model, model_type, options,
            versions).

    Raises:
        TypeError, ValueError: a basis is not float32, finite and orthonormal, or a field
            contradicts another.
    """

    bases: dict[str, Tensor]
    stream: Tensor | None
    k: int
    reasons: tuple[str, ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked: set[int] = set()
        for name, basis in self._named():
            if id(basis) not in checked:
                check_basis(name, basis)
                checked.add(id(basis))
        widest = max((basis.shape[1] for _, basis in self._named()), default=0)
        if self.k != widest:
            raise ValueError(
                f"k is {self.k}, but the widest basis has {widest} columns; give k={widest}."
            )

    @classmethod
    def empty(cls, reasons: Iterable[str], **fields: Any) -> Subspace:
        """The subspace without a direction, and why it has none."""
        return cls({}, None, 0, tuple(reasons), **fields)

    @classmethod
    def from_stream(
        cls,
        basis: Tensor,
        sites: Iterable[Site],
        *,
        gains: Mapping[str, Tensor] | None = None,
        reasons: Iterable[str] = (),
        evidence: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Subspace:
        """A subspace from directions of the residual stream, whatever their source.

        Args:
            basis: `[D,k]` (or `[D]`). Columns need not be orthonormal, but must be independent.
            sites: of the model, see `model_sites`; those that write to the stream get a basis.
            gains: norm -> `γ[D]`, see `model_gains`. A writer before a norm moves the stream along
                `γ ⊙ y`, so its basis is `orth(γ ⊙ u)` (see `Site`); a norm without an entry has
                `γ = 1`.

        Raises:
            ValueError: a width that does not fit, or dependent columns.
        """
        stream = orthonormal("the stream", basis)
        bases: dict[str, Tensor] = {}
        folded: dict[str | None, Tensor] = {}
        for site in sites:
            if site.role != "write":
                continue
            if site.norm not in folded:
                gain = (gains or {}).get(site.norm) if site.norm else None
                folded[site.norm] = basis_at(site, stream, gain)
            bases[site.name] = folded[site.norm]
        if not bases:
            raise ValueError("None of the sites writes to the stream; check `sites`.")
        return cls(
            bases,
            stream,
            stream.shape[1],
            tuple(reasons),
            evidence or {},
            metadata or {},
        )

    @property
    def is_empty(self) -> bool:
        return not self.bases and self.stream is None

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file: each basis once, the rest as JSON in its metadata."""
        from safetensors.torch import save_file

        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        for _, basis in self._named():
            if id(basis) not in keys:
                keys[id(basis)] = f"basis.{len(keys)}"
                tensors[keys[id(basis)]] = basis.cpu().contiguous()
        header = {
            "version": _FORMAT_VERSION,
            "bases": {name: keys[id(basis)] for name, basis in self.bases.items()},
            "stream": None if self.stream is None else keys[id(self.stream)],
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
        }
        text = json.dumps(header, allow_nan=False)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={_FORMAT: text})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Subspace:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a subspace file, or one of a newer format, or of an older one with a
                side or a scope.
        """
        remedy = "make one with `grasp-kernels identify`"
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no subspace file {str(path)!r}; {remedy}.")
        with open_tensors(path, remedy) as file:
            text = (file.metadata() or {}).get(_FORMAT)
            tensors = read_all(file) if text else {}
        if text is None:
            raise ValueError(
                f"{str(path)!r} is a safetensors file but holds no subspace; {remedy}."
            )
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        version = header.get("version") if isinstance(header, dict) else None
        if isinstance(version, int) and version > _FORMAT_VERSION:
            raise ValueError(
                f"{str(path)!r} has subspace format {version}, this version reads up to "
                f"{_FORMAT_VERSION}; upgrade grasp_kernels."
            )
        header = current(header, path)
        wrong = header_fault(header, tensors)
        if wrong:
            raise ValueError(
                f"{str(path)!r} holds no subspace that Subspace.save wrote ({wrong}); {remedy}."
            )
        fields = {name: header[name] for name in _PLAIN_FIELDS}
        try:
            return cls(
                bases={name: tensors[key] for name, key in header["bases"].items()},
                stream=None if header["stream"] is None else tensors[header["stream"]],
                **{**fields, "reasons": tuple(fields["reasons"])},
            )
        except (TypeError, ValueError) as error:
            wrong = str(error).partition(";")[0]
            raise ValueError(f"{str(path)!r} holds no subspace ({wrong}); {remedy}.") from None

    def summary(self) -> str:
        """A short table in plain text: number of directions, bases, spectra, reasons."""
        from grasp_kernels.subspace.report import summary

        return summary(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Save a PNG: spectrum with the chosen k and its null, and the agreement across layers."""
        from grasp_kernels.subspace.report import plot

        plot(self, path)

    def _named(self) -> list[tuple[str, Tensor]]:
        stream = [] if self.stream is None else [("the residual stream", self.stream)]
        return [*self.bases.items(), *stream]


_PLAIN_FIELDS = ("k", "reasons", "evidence", "metadata")


def check_subspace(value: Any) -> None:
    """Raise for anything but a subspace or None, such as the path of one."""
    if not isinstance(value, Subspace | None):
        raise TypeError(
            f"The subspace is a {type(value).__name__}; give a Subspace, as Subspace.load and "
            "identify return it."
        )


def is_subspace(path: str | PathLike[str]) -> bool:
    """Whether a file is one that `Subspace.save` wrote; adapters are folders or other files.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a safetensors file that is not whole.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no {path}: give an adapter folder or a subspace file.")
    if Path(path).is_dir():
        return False
    try:
        with open_tensors(path, "give a file that is whole") as file:
            return any(key.startswith("grasp_kernels") for key in file.metadata() or {})
    except ValueError:
        if Path(path).suffix == ".safetensors":
            raise
        return False  # a pickle, or an index of shards


def check_basis(name: str, basis: Tensor) -> None:
    """Raise unless `basis` is a float32 `[D,k]` tensor with k ≥ 1 finite orthonormal columns."""
    if not isinstance(basis, Tensor) or basis.dtype != torch.float32:
        kind = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
        raise TypeError(f"The basis of {name!r} is {kind}; convert it to a float32 tensor.")
    if basis.ndim != 2 or not 0 < basis.shape[1] <= basis.shape[0]:
        raise ValueError(
            f"The basis of {name!r} has shape {tuple(basis.shape)}; it must be [width, directions] "
            "with at least one direction and no more than the width."
        )
    if not torch.isfinite(basis).all():
        raise ValueError(
            f"The basis of {name!r} has non-finite values; identify it again from finite weights."
        )
    wide = basis.double()
    error = float((wide.mT @ wide - torch.eye(basis.shape[1], device=basis.device)).norm())
    if error > _ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"The basis of {name!r} is not orthonormal (‖VᵀV − I‖ = {error:.2g}, allowed "
            f"{_ORTHONORMAL_TOLERANCE:g}); orthonormalise its columns, for example with "
            "Subspace.from_stream."
        )


def orthonormal(name: str, directions: Tensor) -> Tensor:
    """Orthonormal float32 columns that span those of `[D,k]` (or `[D]`), each with the sign it had.

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
        raise ValueError(
            f"The directions of {name} hold zero or non-finite columns; leave those out."
        )
    q, r = torch.linalg.qr(columns / lengths)
    pivots = r.diagonal()
    if bool((pivots.abs() < 1e-6).any()):
        raise ValueError(
            f"The directions of {name} are linearly dependent; give independent columns."
        )
    return (q * pivots.sign()).float()


def basis_at(site: Site, stream: Tensor, gain: Tensor | None) -> Tensor:
    """The basis of a site for orthonormal directions `[D,k]` of the stream and the gain `γ[D]`.

    Raises:
        ValueError: a gain of another width.
    """
    if gain is not None and gain.shape != stream.shape[:1]:
        raise ValueError(
            f"The gain of {site.norm!r} has shape {tuple(gain.shape)}, but the directions have "
            f"width {stream.shape[0]}; give gains and directions of the same model."
        )
    wide = stream.detach().cpu().double()
    directions = site.from_stream(wide, gain)
    if directions is wide:  # nothing is between
        return stream
    return orthonormal(f"{site.norm!r} (gain folded in)", directions)
