"""Safetensors files, of an adapter or of a model, perhaps in shards -> a reader for each tensor."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from grasp_kernels.files import inside, open_tensors, read, read_json
from grasp_kernels.inert import listed, shown

WEIGHTS = "model.safetensors"  # of a whole model
INDEX = f"{WEIGHTS}.index.json"  # maps each tensor to its shard
_AGAIN = "save it again, or copy it again from an intact source"


@dataclass(frozen=True)
class Stored:
    """Hold the place of a tensor in a file; the tensor is read on request only."""

    file: Path
    key: str
    dtype: str  # as safetensors names it

    def __call__(self) -> Tensor:
        with open_tensors(inside(self.file), _AGAIN) as opened:
            return read(opened, self.key)


def read_tensors(files: list[Path]) -> dict[str, Stored]:
    """Return a reader for every tensor of some files, by its key.

    Raises:
        ValueError: a file is not a whole safetensors file, leads out of its folder, or repeats a
            key.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with open_tensors(inside(file), _AGAIN) as opened:
            for key in opened.keys():  # noqa: SIM118
                if key in found:
                    raise ValueError(
                        f"{str(found[key].file)!r} and {str(file)!r} both hold {shown(key)}; keep "
                        "the files of one checkpoint in the folder."
                    )
                found[key] = Stored(file, key, opened.get_slice(key).get_dtype())
    return found


def read_folder(folder: Path) -> dict[str, Stored]:
    """Return a reader for each tensor of a model's checkpoint, by its key.

    The folder may hold other files too.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, or cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        files = indexed(folder / INDEX, "model")
    if (folder / WEIGHTS).is_file():  # transformers takes this file, whatever else is there
        files = [folder / WEIGHTS]
    return read_tensors(files)


def indexed(path: Path, what: str) -> list[Path]:
    """Return the shards named in the index of an adapter or a model.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the file is not an index, or names files outside of its folder.
    """
    again = f"save the {what} again"
    shards = read_json(inside(path), "index of shards", again).get("weight_map")
    named = shards.values() if isinstance(shards, dict) else ()
    if not named or not all(isinstance(one, str) for one in named):
        wrong = f"is not a valid index of shards (its weight_map is {shown(shards)})"
        raise ValueError(f"{str(path)!r} {wrong}; {again}.")
    names = sorted(set(named))
    if strange := [name for name in names if Path(name).name != name or name == ".."]:
        wrong = f"names the shards {listed(strange)}, which are not files in its folder"
        raise ValueError(f"{str(path)!r} {wrong}; {again}.")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        wrong = f"names shards that are not next to it ({listed(missing)})"
        raise FileNotFoundError(f"{str(path)!r} {wrong}; copy all shards into its folder.")
    files = [path.parent / name for name in names]
    if lost := sorted(set(shards) - set(read_tensors(files))):
        wrong = f"names the tensors {listed(lost)}, which no shard holds"
        raise ValueError(f"{str(path)!r} {wrong}; {again}.")
    return files


def refuse_nonfinite(name: str, weight: Tensor) -> None:
    """Raise for a tensor with a non-finite value."""
    if not weight.is_floating_point():
        return
    wide = weight.float() if weight.element_size() == 1 else weight  # float8 has no isfinite
    if not bool(wide.isfinite().all()):
        raise ValueError(
            f"{shown(name)} has non-finite values; take a checkpoint from before training diverged."
        )
