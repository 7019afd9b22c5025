"""Files that appear whole or not at all, over nothing that was there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from grasp_kernels.files import (
    check_own_folder,
    left_behind,
    new_file,
    new_folder,
    read_json,
    room_for,
    whole_file,
    whole_folder,
)


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path) -> None:
    for made in (whole_file, whole_folder):
        with pytest.raises(KeyError), made(tmp_path / "x") as partial:
            (partial / "y" if partial.is_dir() else partial).write_text("half")
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """Also one with the same process id, as in a container."""
    for name in ("out", "a.json"):
        (tmp_path / f".{name}.{os.getpid()}.partial").mkdir()
    with whole_folder(tmp_path / "out") as folder, whole_file(folder / "a.json") as file:
        file.write_text("1")
    with whole_file(tmp_path / "a.json") as file:
        assert left_behind(tmp_path / "a.json") == [file.parent]
        assert left_behind(tmp_path / "a") == left_behind(tmp_path / "json") == []
        file.write_text("2")
    assert (tmp_path / "out" / "a.json").read_text() == "1"
    assert (tmp_path / "a.json").read_text() == "2"


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Not even one in place of the target, which is replaced."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a.txt").symlink_to(victim)
    with whole_file(tmp_path / "a.txt") as file:
        assert not os.path.lexists(file) and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        file.write_text("new")
    assert victim.read_text() == "mine" and (tmp_path / "a.txt").read_text() == "new"


def test_all_files_have_the_rights_of_new_ones(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    rights = (tmp_path / "plain").stat().st_mode
    with whole_folder(tmp_path / "adapter") as folder:
        (folder / "weights").touch(mode=0o600)  # as safetensors has it
    with whole_file(tmp_path / "weights") as file:
        file.touch(mode=0o600)
    for path in ("adapter/weights", "weights"):
        assert (tmp_path / path).stat().st_mode == rights
    assert (tmp_path / "adapter").stat().st_mode & 0o777 != 0o700


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", ".x"), ValueError("I/O: No space left")],
)
def test_a_full_disk_is_named_with_the_file(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"no room left on the disk for '[^']*/a\.json': free"),
        whole_folder(tmp_path / "a.json") as folder,
        whole_file(folder / "b.json"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), room_for("x"):
        raise KeyError


def test_a_path_that_cannot_be_written_is_named_and_not_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"'.*file/x' cannot be written"),
        whole_folder(tmp_path / "file" / "x"),
    ):
        pass
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(OSError, match=r"'.*empty' cannot be written"),
        whole_file(tmp_path / "empty") as file,
    ):
        file.write_text("")
    with whole_file(tmp_path / ("a" * 255)) as file:
        file.write_text("the longest name there is")


def test_new_paths(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for check in (new_file, new_folder):
        for name in ("there", "link"):
            with pytest.raises(FileExistsError, match=f"{name} already exists"):
                check(tmp_path / name)
        with pytest.raises(ValueError, match="empty"):
            check("")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*make it first"):
        new_file(tmp_path / "nowhere" / "x")
    with pytest.raises(NotADirectoryError, match="there' is a file"):
        new_folder(tmp_path / "there" / "x")
    assert new_folder(tmp_path / "nowhere" / "x") == tmp_path / "nowhere" / "x"
    assert new_file(tmp_path / "x") == tmp_path / "x"


def test_a_folder_is_ones_own_if_new_or_empty_or_noted(tmp_path: Path) -> None:
    (tmp_path / "note.json.txt").write_text("")
    with pytest.raises(ValueError, match=r"contains note\.json\.txt but no note\.json"):
        check_own_folder(tmp_path, "note.json")
    check_own_folder(tmp_path, "note.json", beside=["note.json.txt"])
    check_own_folder(tmp_path / "new" / "folder", "note.json")
    (tmp_path / "note.json").write_text("{}")
    check_own_folder(tmp_path, "note.json")
    with pytest.raises(NotADirectoryError, match="cannot be made"):
        check_own_folder(tmp_path / "note.json" / "x", "note.json")


@pytest.mark.parametrize("text", ["{oops", "[]", "3", "\udcff", "[" * 200_000])
def test_json_that_is_no_object_is_named_with_its_remedy(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"a\.json' .*: restore it\.$"):
        read_json(path, "note", "restore it")
