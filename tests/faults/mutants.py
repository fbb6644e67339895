"Malformed annotation files and images: valid ones, changed as accident or malice would, drawn by hypothesis."
import copy
import gzip
import io
import json
from functools import lru_cache

import numpy as np
from hypothesis import strategies as st
from PIL import Image

# ---- annotation files

SIDE = 24

def valid():
    "Two categories, four images, five annotations: the smallest file in which everything occurs"
    images = [dict(id=n, file_name=f"{'a' if n < 3 else 'b'}/{n}.png", width=SIDE, height=SIDE) for n in range(1, 5)]
    flat = [4., 5., 2, 18., 6., 2, 10., 17., 1, 0, 0, 0]
    annotations = [dict(id=10 + n, image_id=image, category_id=c, bbox=[2, 3, 18, 17.5], area=300, iscrowd=0, num_keypoints=3 if c == 7 else 2,
                        keypoints=flat[:12 if c == 7 else 6]) for n, (image, c) in enumerate([(1, 7), (2, 7), (3, 9), (4, 9), (4, 7)])]
    categories = [dict(id=7, name="kite", supercategory="toy", keypoints=["top", "right", "bottom", "left"], skeleton=[[0, 1], [1, 2], [2, 3]]),
                  dict(id=9, name="rod", supercategory="tool", keypoints=["grip", "tip"], skeleton=[[0, 1]], parts=["end", "end"], folder="b")]
    return dict(info=dict(year=2026), images=images, annotations=annotations, categories=categories)

def nested(depth, end=0):
    for _ in range(depth): end = [end]
    return end

ODD = [0, -1, 1, 2, 3, 4, 7, 255, 2**31, 2**63, 2**64, -2**63, 10**30, 10**400, -10**400, float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 1e39, 1e15,
       5e-324, -0.0, .5, "", " ", "\0", "\ud800", "é\u202e", "1", "7", "NaN", "a" * 300, "../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "a/1.png",
       "a/1.png/", "a", ".", "a\\1.png", "C:\\x", [], {}, [[]], [{}], True, False, None, [1, 2], [0, 0, 1e9, 1e9], [float("nan")] * 4, nested(50), {"id": 7}, ["top"] * 4,
       [[0, 1], [1, 0]], [[0, 9]], [[1, 2], [2, 3], [3, 4]], [["0", "1"]], [2e5] * 12, ["x"] * 12, [None] * 12]
NUMBERS = [v for v in ODD if isinstance(v, (int, float))]
TEXTS = [v for v in ODD if isinstance(v, str)]
values = st.one_of(st.sampled_from(ODD), st.integers(-5, 30), st.floats(), st.text(max_size=6),
                   st.lists(st.one_of(st.integers(-3, 40), st.floats(width=32), st.text(max_size=2), st.none()), max_size=13))
KEYS = ["id", "image_id", "category_id", "file_name", "width", "height", "bbox", "area", "iscrowd", "keypoints", "num_keypoints", "name", "skeleton",
        "supercategory", "parts", "folder", "images", "annotations", "categories", "\0", "x"]

def _place(draw, tree):
    "A container somewhere in the tree, and a key of it"
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = draw(st.sampled_from(keys))
        below = tree[key]
        if not isinstance(below, (dict, list)) or not below or draw(st.integers(0, 11)) == 0: return tree, key
        tree = below

def _change(draw, tree):
    "One mutation in place"
    if not tree: return
    where, key = _place(draw, tree)
    kind = draw(st.integers(0, 12))
    if kind < 3: where[key] = copy.deepcopy(draw(values))
    elif kind < 5 or kind > 9: where[key] = draw(st.sampled_from(TEXTS if isinstance(where[key], str) else NUMBERS))
    elif kind == 5: del where[key]
    elif kind == 6 and isinstance(where, list): where.insert(draw(st.integers(0, len(where))), copy.deepcopy(where[key]))
    elif kind == 6: where[draw(st.sampled_from(KEYS))] = where.pop(key)
    elif kind == 7: where[key] = [where[key]] if draw(st.booleans()) else {"x": where[key]}
    elif kind == 8: where[key] = draw(st.sampled_from([str, repr, lambda v: bool(v) if v is not None else v, lambda v: str(v) + " "]))(where[key])
    else:
        other, place = _place(draw, tree)
        where[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(where[key])

def _harm(draw, data):
    "One change of bytes"
    kind, at = draw(st.integers(0, 6)), draw(st.integers(0, max(0, len(data) - 1)))
    if kind == 0: return data[:at]
    if kind == 1: return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1:]
    if kind == 2: return data[:at] + data[at + draw(st.integers(1, 40)):]
    if kind == 3: return data[:at] + draw(st.sampled_from([b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e999999", b"\xff\xfe", b"\\ud800", b"NaN", b"-Infinity", b"\0"])) + data[at:]
    if kind == 4: return data.decode(errors="replace").encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32", "latin-1"])), "replace")
    if kind == 5: return draw(st.sampled_from([b"", b"null", b"[]", b"{}", b"\x1f\x8b", b"\x1f\x8b\x08\0", b'"x"', b"\0" * 100]))
    return gzip.compress(data, 1, mtime=0)[:draw(st.sampled_from([-1, -9, 30, 100000]))]

@st.composite
def annotation_files(draw):
    "The bytes of an annotation file with one to four faults"
    tree = valid()
    structural = draw(st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3, 4, 0]))
    for _ in range(structural): _change(draw, tree)
    data = json.dumps(tree).encode()
    return data if structural and draw(st.integers(0, 9)) else _harm(draw, data)


# ---- images

@lru_cache
def images():
    "Small pictures in every format and mode that one meets: name -> bytes"
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8).repeat(2, 0).repeat(2, 1)[:SIDE, :SIDE])
    exif = Image.Exif()
    exif[0x0112], exif[0x010f] = 6, "maker"
    out = {}
    def keep(name, picture, kind, **options):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        out[name] = file.getvalue()
    keep("plain.jpg", rgb, "JPEG"), keep("progressive.jpg", rgb, "JPEG", progressive=True), keep("cmyk.jpg", rgb.convert("CMYK"), "JPEG")
    keep("turned.jpg", rgb, "JPEG", exif=exif), keep("grey.jpg", rgb.convert("L"), "JPEG")
    for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"):
        picture = Image.fromarray(rng.integers(0, 65536, (SIDE, SIDE), np.uint16)) if mode == "I;16" else rgb.convert(mode)
        keep(f"{mode.replace(';', '')}.png", picture, "PNG", **(dict(transparency=b"\0\x80") if mode == "P" else {}))
    keep("turned.png", rgb, "PNG", exif=exif)
    keep("animated.gif", rgb.convert("P"), "GIF", save_all=True, append_images=[rgb.rotate(90).convert("P")] * 3)
    keep("animated.png", rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)] * 2)
    keep("x.bmp", rgb, "BMP"), keep("x.ppm", rgb, "PPM"), keep("x.webp", rgb, "WEBP"), keep("animated.webp", rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])
    for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"): keep(f"{kind}.tif", rgb, "TIFF", compression=kind)
    keep("float.tif", Image.fromarray(rng.random((SIDE, SIDE), np.float32) * 300), "TIFF"), keep("cmyk.tif", rgb.convert("CMYK"), "TIFF")
    keep("lab.tif", rgb.convert("RGB").convert("L").convert("RGB"), "TIFF", exif=exif), keep("int.tif", Image.fromarray(rng.integers(0, 1 << 30, (SIDE, SIDE), np.int32)), "TIFF")
    return out

BIG = [(n).to_bytes(width, order) for n in (0, 1, 65535, 70000, 2**31 - 1, 2**32 - 1) for width in (2, 4) for order in ("big", "little") if n < 256**width]

@st.composite
def image_files(draw):
    "A suffix and the bytes of an image with one to three faults"
    name = draw(st.sampled_from(sorted(images())))
    data = images()[name]
    for _ in range(draw(st.integers(1, 3))):
        at, kind = draw(st.integers(0, max(0, len(data) - 1))), draw(st.integers(0, 9))
        near = draw(st.integers(0, min(60, max(0, len(data) - 1))))      # in the head, where sizes are
        if kind == 0: data = data[:at]
        elif kind == 1: data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1:] if data else data
        elif kind == 2: data = data[:near] + draw(st.sampled_from(BIG)) + data[near + 4:]
        elif kind == 3: data = data[:at] + draw(st.sampled_from(BIG)) + data[at + 4:]
        elif kind == 4: data = data[:near] + draw(st.binary(min_size=1, max_size=6)) + data[near + 1:]
        elif kind == 5: data = data[:at] + bytes(draw(st.integers(1, 200))) + data[at:]
        elif kind == 6: data = data[:at] + data[at + draw(st.integers(1, 60)):]
        elif kind == 7: data = _with_exif(draw(st.binary(max_size=60)))
        elif kind == 8: data = draw(st.sampled_from([b"", b"\0", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"RIFF\0\0\0\0WEBP", b"BM", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])) + data[near:]
        else: data = data + draw(st.sampled_from(sorted(images().values())))
    suffix = draw(st.sampled_from([name[name.rindex("."):]] * 3 + [".jpg", ".png", ".gif", ".tif"]))
    return suffix, data

def _with_exif(payload):
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(file, "JPEG", exif=b"Exif\0\0" + payload)
    return file.getvalue()
