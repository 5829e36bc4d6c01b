"""Tars of `tarfile`, GNU tar and WebDataset are read or refused."""

from __future__ import annotations

import io
import mmap
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from bigan.data import DataError
from bigan.data.format.tar import Buffer, UnsupportedMemberError, walk_tar

LONG = "a-folder-with-a-rather-long-name/" * 9 + "image.npy"
NAMES = ["a.npy", "b/c.npy", "x" * 99, "y" * 100, "z" * 101, "p/" * 60 + "q.jpg", LONG, "ü/ß.png"]
ODD = ["../up.npy", "/etc/passwd", "./here.npy", "with space\n.npy", "caf\udce9.npy"]


def made(members: list[tarfile.TarInfo], kind: int, **options: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, **options) as tar:  # type: ignore[call-overload]
        for member in members:
            content = member.name.encode("utf-8", "surrogateescape")
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def plain(names: list[str], kind: int) -> bytes:
    return made([tarfile.TarInfo(name) for name in names], kind)


def read(data: Buffer) -> list[str]:
    """Names of the members; the content of each is its name."""
    found = []
    for member in walk_tar(data, "x.tar"):
        content = bytes(data[member.offset : member.offset + member.size])
        assert content == member.name.encode("utf-8", "surrogateescape")
        found.append(member.name)
    return found


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_returned_unchanged(kind: int) -> None:
    assert read(plain([*NAMES, *ODD], kind)) == [*NAMES, *ODD]


def test_ustar_prefixes() -> None:
    names = [name for name in NAMES if name != LONG and len(name) <= 100] + ["p/" * 60 + "q.jpg"]
    assert read(plain(names, tarfile.USTAR_FORMAT)) == names


def test_times_of_gnu_tar_are_not_a_prefix() -> None:
    """GNU tar stores access and change times in the prefix field of ustar."""
    data = bytearray(plain(["a.npy"], tarfile.GNU_FORMAT))
    data[345:357] = b"14731215630\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert read(bytes(data)) == ["a.npy"]


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_gnu_tar(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    short = form in ("ustar", "v7")
    names = sorted(["a.npy", "b/c.npy", "ü.png"] if short else ["a.npy", LONG, "b/ü.png"])
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    command = ["tar", "-cf", tmp_path / "x.tar", f"--format={form}", "--mtime=@1.5", "-C", folder]
    tops = sorted({name.split("/")[0] for name in names})
    subprocess.run([*command, *tops], check=True)
    assert sorted(read((tmp_path / "x.tar").read_bytes())) == names


def test_tars_of_webdataset(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for key in ("a", "b/c", "k" * 120):
            writer.write(
                {"__key__": key, "cls": f"{key}.cls".encode(), "jpg": f"{key}.jpg".encode()}
            )
    names = [f"{key}.{kind}" for key in ("a", "b/c", "k" * 120) for kind in ("cls", "jpg")]
    assert read((tmp_path / "x.tar").read_bytes()) == names


def test_folders_are_skipped() -> None:
    folder, odd, old = (tarfile.TarInfo(name) for name in ("folder", "sized/", "old/"))
    folder.type = odd.type = tarfile.DIRTYPE
    old.type = tarfile.AREGTYPE  # before ustar, a folder was a name with a slash
    members = [folder, odd, old, tarfile.TarInfo("folder/a.npy")]
    data = bytearray(made(members, tarfile.USTAR_FORMAT))
    header = tarfile.TarInfo("sized/")
    header.type, header.size = tarfile.DIRTYPE, 4096  # what it may hold, by POSIX; no data follow
    data[512:1024] = header.tobuf(tarfile.USTAR_FORMAT)
    # `made` writes the name of the third one as its content, which a folder has not.
    del data[1536:2048]
    data[1024:1536] = _headed("old/", tarfile.AREGTYPE)
    assert read(bytes(data)) == ["folder/a.npy"]


def _headed(name: str, kind: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.type = kind
    buffer = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    buffer[156:157] = kind
    buffer[148:156] = b"%06o\0 " % (sum(buffer[:148]) + 256 + sum(buffer[156:512]))
    return bytes(buffer)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"?"]
)
def test_other_members_are_refused(kind: bytes) -> None:
    data = plain(["a.npy"], tarfile.USTAR_FORMAT)
    data = data[:1024] + _headed("odd", kind) + data[1024:]
    with pytest.raises(UnsupportedMemberError, match=r"x\.tar: odd is not a .*--dereference"):
        read(data)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("target", ["a.npy", LONG])
def test_hard_links_have_the_place_of_their_target(kind: int, target: str) -> None:
    links = [tarfile.TarInfo(name) for name in ("b.npy", f"{LONG}.2", "c.npy")]
    for link, linked in zip(links, (target, "b.npy", "missing"), strict=True):
        link.type, link.linkname = tarfile.LNKTYPE, linked
    files = [tarfile.TarInfo("first"), tarfile.TarInfo(target)]
    end = tarfile.TarInfo("end")
    members = list(walk_tar(made([*files, *links[:2], end], kind), "x.tar"))
    assert [m.name for m in members] == ["first", target, "b.npy", f"{LONG}.2", "end"]
    assert len({(m.offset, m.size) for m in members[1:4]}) == 1
    with pytest.raises(UnsupportedMemberError, match=r"c\.npy .* hard link to no earlier member"):
        read(made([*files, links[2]], kind))


def test_sparse_files_of_pax_are_refused() -> None:
    member = tarfile.TarInfo("a.npy")
    member.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(DataError, match=r"a\.npy is not a regular file"):
        read(made([member], tarfile.PAX_FORMAT))


def test_scope_of_pax_records() -> None:
    """ "x" applies to the next member, "g" to all; "size" overrides the header."""
    data = made([tarfile.TarInfo(name) for name in ("a", "é" * 60, "b")], tarfile.PAX_FORMAT)
    assert read(data) == ["a", "é" * 60, "b"]
    everywhere = made([tarfile.TarInfo("c")], tarfile.PAX_FORMAT, pax_headers={"comment": "x"})
    assert b"comment=x" in everywhere
    assert read(everywhere) == ["c"]
    sized = tarfile.TarInfo("d.npy")
    sized.pax_headers = {"size": "5"}
    data = bytearray(made([sized], tarfile.PAX_FORMAT))
    header = data.rindex(b"d.npy", 0, data.rindex(b"d.npy"))
    data[header + 124 : header + 136] = b"%011o\0" % 0
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    assert read(bytes(data)) == ["d.npy"]


@pytest.mark.parametrize(
    "content", [b"x", b"99 path=a\n", b"11 path=ab", b"9 pathab\n", b"0 path=a\n", b"9" * 5000]
)
def test_damaged_pax_headers(content: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.size = len(content)
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    block[156:157] = b"x"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    padding = bytes(-len(content) % 512)
    data = bytes(block) + content + padding + plain(["a.npy"], tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match=r"x\.tar: damaged at byte 512 \(pax header\)"):
        read(data)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_truncation_is_an_error(kind: int) -> None:
    """Including between a long name and its member, where only zeros would follow."""
    data = plain(NAMES, kind)
    ends = [-(-(m.offset + m.size) // 512) * 512 for m in walk_tar(data, "x.tar")]
    for cut in range(0, ends[-1] + 513, 512):
        with pytest.raises(DataError, match=r"x\.tar: "):
            read(data[:cut])
        full = data[:cut] + bytes(1024)
        if cut in (0, *ends):  # a valid shorter archive
            assert read(full) == NAMES[: [0, *ends].index(cut)]
        elif cut < ends[-1]:
            with pytest.raises(DataError, match=r"x\.tar: "):
                list(walk_tar(full, "x.tar"))


def test_a_memory_map_is_not_copied(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for name in ("a.npy", "b.npy"):
            member = tarfile.TarInfo(name)
            member.size = 2**23
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with file.open("ab") as stream:
        stream.truncate(file.stat().st_size + 2**24)  # zeros after the end marker are allowed
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
        tracemalloc.start()
        found = [(member.name, member.size) for member in walk_tar(data, "x.tar")]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found == [("a.npy", 2**23), ("b.npy", 2**23)]
    assert peak < 4 * 2**20
