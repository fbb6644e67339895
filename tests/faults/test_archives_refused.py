"""Archives that would write elsewhere, lead elsewhere or fill the memory: each is refused with an error that names the member,
nothing is written, and the other archives of the folder are read."""
import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile

import pytest

import cape.data.archives as module
from cape.data.archives import list_archive, read_places, walk
from cape.errors import CapeError, DataError

from .harness import Peak, at_most, record

MEGABYTE = 1 << 20


# ---- archives

def tar(name="ok.jpg", data=b"12345", **values):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in values.items(): setattr(info, key, value)
    return info, data

def tar_file(*members, opener=None, layout=tarfile.GNU_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as archive:
        for info, data in members: archive.addfile(info, io.BytesIO(data))
    return opener(out.getvalue()) if opener else out.getvalue()

def zip_file(*members, compression=zipfile.ZIP_DEFLATED):
    "Members are (name, bytes, kind of file or 0)"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data, kind in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.compress_type = compression
            if kind: info.external_attr, info.create_system = (kind | 0o777) << 16, 3
            archive.writestr(info, data)
    return out.getvalue()

def header(size, kind=tarfile.REGTYPE, name="1.jpg"):
    "One tar header that announces `size` bytes"
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)

def sparse(size):
    "The header of a member that is one hole of `size` bytes"
    data = bytearray(header(0, tarfile.GNUTYPE_SPARSE))
    data[482:483], data[483:495] = b"\0", b"\x80" + size.to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)

def overlapping(count=100, size=MEGABYTE):
    "A zip archive of which every member is the same bytes (D. Fifield's idea, in its simplest form)"
    data = bytearray(zip_file(("0.jpg", bytes(size), 0)))
    at = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry, tail = bytes(data[at:end]), bytearray(data[end:])
    entries = [entry.replace(b"0.jpg", f"{n % 10}.jpg".encode()) for n in range(count)]
    struct.pack_into("<HHL", tail, 8, count, count, len(entry) * count)
    return bytes(data[:at]) + b"".join(entries) + bytes(tail)

NAMES = {"up": "../1.jpg", "deep up": "a/b/../../../1.jpg", "absolute": "/tmp/1.jpg", "drive": "C:/1.jpg", "backslashes": "a\\..\\..\\1.jpg",
         "network": "\\\\host\\share\\1.jpg", "up at the end": "a/.."}

def evil(large=10 * MEGABYTE, long=30 * MEGABYTE):
    "Name of the file -> (its bytes, what the error must say); `large` is the size of bombs, `long` that of names"
    out = {}
    for what, name in NAMES.items():
        says = r"an absolute path|a path with '\.\.'|a backslash"
        out[f"{what}.zip"] = zip_file(("ok.jpg", b"1", 0), (name, b"1", 0)), says
        for suffix, opener in ((".tar", None), (".tar.gz", gzip.compress), (".tgz", gzip.compress), (".tar.bz2", bz2.compress), (".tar.xz", lzma.compress)):
            out[what + suffix] = tar_file(tar(), tar(name), opener=opener), says
        out[f"{what}, pax.tar"] = tar_file(tar(), tar(name, pax_headers={"comment": "x"}), layout=tarfile.PAX_FORMAT), says
    kinds = dict(link=(tarfile.SYMTYPE, stat.S_IFLNK), device=(tarfile.CHRTYPE, stat.S_IFCHR), disk=(tarfile.BLKTYPE, stat.S_IFBLK), pipe=(tarfile.FIFOTYPE, stat.S_IFIFO))
    for what, (in_tar, in_zip) in kinds.items():
        out[f"{what}.zip"] = zip_file(("1.jpg", b"/etc/passwd", in_zip)), "a link or a device"
        out[f"{what}.tar"] = tar_file(tar("1.jpg", b"", type=in_tar, linkname="/etc/passwd")), "a link or a device"
    out["hard link.tar"] = tar_file(tar(), tar("1.jpg", b"", type=tarfile.LNKTYPE, linkname="ok.jpg")), "a link or a device"
    out["link, then a file through it.tar"] = tar_file(tar("d", b"", type=tarfile.SYMTYPE, linkname="/tmp"), tar("d/1.jpg")), "a link or a device"
    bomb = "bytes that unpack to"
    out["bomb.zip"] = zip_file(("1.jpg", bytes(large), 0)), bomb
    out["many little bombs.zip"] = zip_file(*((f"{n}.jpg", bytes(MEGABYTE), 0) for n in range(large // MEGABYTE))), bomb
    out["overlapping.zip"] = overlapping(large // MEGABYTE * 3), f"{bomb}|another member"
    for suffix, opener in ((".tar.gz", gzip.compress), (".tar.bz2", bz2.compress), (".tar.xz", lzma.compress)):
        out[f"bomb{suffix}"] = tar_file(tar("1.jpg", bytes(large)), opener=opener), bomb
    out["announced bomb.tar"] = header(1 << 42) + bytes(1024), bomb
    out["sparse bomb.tar"] = sparse(1 << 36) + bytes(1024), bomb
    for what, kind in (("long name", tarfile.GNUTYPE_LONGNAME), ("long link", tarfile.GNUTYPE_LONGLINK), ("pax header", tarfile.XHDTYPE), ("pax global", tarfile.XGLTYPE)):
        out[f"{what} without an end.tar.gz"] = gzip.compress(header(long, kind) + bytes(long) + header(0), 1), "whole archive.*header of|unpack to"
    out["twice.zip"] = zip_file(("1.jpg", b"1", 0), ("a/2.jpg", b"2", 0), ("1.jpg", b"3", 0)), "another member"
    out["twice.tar"] = tar_file(tar("1.jpg", b"1"), tar("1.jpg", b"2")), "another member"
    out["by case.zip"] = zip_file(("a/B.jpg", b"1", 0), ("A/b.jpg", b"2", 0)), "another member"
    out["by case.tar"] = tar_file(tar("a/B.jpg", b"1"), tar("A/b.jpg", b"2")), "another member"
    for suffix in (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"): out[f"none{suffix}"] = b"not an archive" * 99, "whole archive"
    return out


@pytest.fixture(scope="module")
def archives(): return evil()

def test_each_is_refused_and_nothing_is_written(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FREE", 8 * MEGABYTE)
    print("archives refused, megabytes:", refuse_all(archives, tmp_path))

@pytest.mark.slow
def test_bombs_of_the_size_that_the_library_allows(tmp_path):
    refused, megabytes = refuse_all(evil(70 * MEGABYTE, 300 * MEGABYTE), tmp_path)
    record("archives", refused=refused, of=refused, written_outside=0, peak_megabytes=megabytes)

def refuse_all(archives, tmp_path):
    refused, peak = 0, Peak()
    for name, (data, says) in archives.items():
        path = tmp_path / name
        path.write_bytes(data)
        with at_most(20), pytest.raises(DataError, match=says) as error: list_archive(path)
        assert name in str(error.value) and len(str(error.value)) < 600, name
        refused += 1
        assert [p.name for p in tmp_path.iterdir()] == [name]
        path.unlink()
    assert peak.grown() < 25 * MEGABYTE, f"{peak.grown() / 1e6:.0f} MB"
    return refused, round(peak.grown() / 1e6)

def test_good_ones_beside_them_are_read(archives, tmp_path):
    for name in ("up.zip", "link.tar", "none.tgz"): (tmp_path / name).write_bytes(archives[name][0])
    (tmp_path / "good.zip").write_bytes(zip_file(("a/1.jpg", b"one", 0), ("b/1.jpg", b"two", 0)))
    (tmp_path / "good.tar.xz").write_bytes(tar_file(tar("a/3.jpg", b"three"), opener=lzma.compress))
    refused = []
    places = list(walk([tmp_path], refused))
    assert len(refused) == 3 and sorted((p.member, data) for p, data in read_places(places)) == [("a/1.jpg", b"one"), ("a/3.jpg", b"three"), ("b/1.jpg", b"two")]

def test_an_archive_in_an_archive_is_not_entered(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_file(("inner.zip", zip_file(("../1.jpg", b"1", 0)), 0)))
    [place] = list_archive(tmp_path / "x.zip")
    assert place.member == "inner.zip"

@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz"])
def test_every_cut_of_an_archive_is_read_or_refused(tmp_path, name):
    whole = zip_file(("1.jpg", b"one" * 50, 0), ("2.jpg", b"two" * 50, 0)) if name == "x.zip" else \
        tar_file(tar("1.jpg", b"one" * 50), tar("2.jpg", b"two" * 50), opener={"x.tar.gz": gzip.compress, "x.tar.xz": lzma.compress}.get(name))
    for cut in range(0, len(whole), max(1, len(whole) // 60)):
        (tmp_path / name).write_bytes(whole[:cut])
        try: found = list(read_places(list_archive(tmp_path / name)))
        except CapeError: continue
        assert all(isinstance(data, (bytes, DataError)) for _, data in found)
