"""Layouts of users' data: each is understood in the same way in folders and archives, or refused.

A case is the files of a source (images by their path, other files with their text) and what must
come out, or the folder and a word of the error.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from data_helpers import one_line
from image_folders import classes_of, every_kind, tarred, write, zipped
from layout_fuzz import main as fuzz

from bigan.data import DataError
from bigan.data.packing.pack import pack
from bigan.data.packing.sources import open_source

PETS = "cat/1.png cat/2.png dog/1.png"


def build(root: Path, files: str, texts: dict[str, str] | None = None) -> Path:
    """Write the images `files`, folders (with a final "/") and text files."""
    root.mkdir(exist_ok=True)
    for name in files.split():
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            write(root, name)
    for name, text in (texts or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def below(*folders: str) -> str:
    """The images of PETS in each of the folders."""
    return " ".join(f"{folder}/{name}" for folder in folders for name in PETS.split())


CLASSES = {
    "class folders": (PETS, "cat dog"),
    "class folders with folders": ("cat/a/1.png cat/b/2.png dog/1.png", "cat dog"),
    "wrapped": (below("photos"), "cat dog"),
    "wrapped three times": (below("a/b/photos"), "cat dog"),
    "wrapped, beside a text": (below("photos"), "cat dog", {"README.md": "x"}),
    "a wrapping folder that is named like a split": (below("train"), "cat dog"),
    "flat": ("1.png 2.png", "all"),
    "flat in a folder": ("photos/1.png photos/2.png", "all"),
    "numbers in numeric order": ("0/1.png 1/1.png 10/1.png 2/1.png", "0 1 2 10"),
    "numbers from 1": ("1/1.png 2/1.png 3/1.png", "1 2 3"),
    "numbers with zeros": ("010/1.png 002/1.png", "002 010"),
    "numbers and names": ("10/1.png 9/1.png a/1.png", "9 10 a"),
    "classes that sound like splits": (
        "test_tube/1.png train_station/1.png dog/1.png",
        "dog test_tube train_station",
    ),
    "trains are vehicles": ("train/1.png bus/1.png car/1.png", "bus car train"),
    "contest and valley": ("contest/1.png valley/1.png", "contest valley"),
    "files of the system": (f"{PETS} __MACOSX/cat/1.png @eaDir/x.png .git/1.png", "cat dog"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_class_folders(tmp_path: Path, case: str) -> None:
    files, classes, *texts = CLASSES[case]
    root = build(tmp_path / "data", files, *texts)
    source = every_kind(root, tmp_path)[0]
    expected = {name for name in files.split() if not name.startswith((".git", "@", "__"))}
    assert source.classes == tuple(classes.split())
    assert len(source) == len(expected)
    assert all(any(name.endswith(key) for name in expected) for key in source.keys)
    if classes != "all":
        assert all(name in key.split("/")[:2] for key, name in classes_of(source).items())
    assert not source.bad


SPLITS = {
    # top-level names, then the split of each
    "train test": "train test",
    "train val test": "train val test",
    "Training Testing": "train test",
    "seg_train seg_test": "train test",
    "train2017 val2017": "train val",
    "TRAIN Validation": "train val",
    "train_images valid_images test_images": "train val test",
    "trainset testset": "train test",
    "train dev": "train val",
    "train eval": "train test",
    "trainimages testimages": "train test",
    "traindir testdir": "train test",
}


@pytest.mark.parametrize("names", SPLITS)
@pytest.mark.parametrize("form", ["classes", "flat", "wrapped", "doubled", "class first"])
def test_split_folders(tmp_path: Path, names: str, form: str) -> None:
    splits = dict(zip(names.split(), SPLITS[names].split(), strict=True))
    files = {
        "classes": below(*splits),
        "flat": " ".join(f"{name}/1.png" for name in splits),
        "wrapped": below(*(f"archive/data/{name}" for name in splits)),
        "doubled": below(*(f"{name}/{name}" for name in splits)),
        "class first": " ".join(f"{c}/{name}/1.png" for c in ("cat", "dog") for name in splits),
    }[form]
    root = build(tmp_path / "data", files)
    source = every_kind(root, tmp_path)[0]
    position = 1 if form == "class first" else 0
    assert {key: splits[key.split("/")[position]] for key in source.keys} == dict(
        zip(source.keys, source.splits, strict=True)
    )
    assert len(source) == len(files.split())
    assert source.classes == (("all",) if form == "flat" else ("cat", "dog"))
    if form != "flat":
        assert all(f"{name}/" in f"{key}/" for key, name in classes_of(source).items())


CSV = "file,label\n1.png,ant\n2.png,bee\n"
LABEL_FILES = {
    "labels.csv": ("1.png 2.png", {"labels.csv": CSV}),
    "dataset.json with class names": (
        "00/1.png 00/2.png",
        {"dataset.json": '{"labels": [["00/1.png", "ant"], ["00/2.png", "bee"]]}'},
    ),
    "metadata.csv": ("1.png 2.png", {"metadata.csv": "file_name,label\n1.png,ant\n2.png,bee\n"}),
    "metadata.csv with a caption": (
        "1.png 2.png",
        {"metadata.csv": "file_name,text,label\n1.png,an ant,ant\n2.png,a bee,bee\n"},
    ),
    "metadata.jsonl": (
        "1.png 2.png",
        {
            "metadata.jsonl": '{"file_name": "1.png", "label": "ant"}\n'
            '{"file_name": "2.png", "label": "bee", "text": "x"}\n'
        },
    ),
    "one level down": ("photos/1.png photos/2.png", {"photos/labels.csv": CSV}),
    "two levels down": ("a/photos/1.png a/photos/2.png", {"a/photos/labels.csv": CSV}),
    "beside the folder of the images": ("images/1.png images/2.png", {"labels.csv": CSV}),
    "with the folder of the images": (
        "images/1.png images/2.png",
        {"labels.csv": CSV.replace("1.png", "images/1.png").replace("2.png", "images/2.png")},
    ),
    "in each folder": (
        "a/1.png b/2.png",
        {"a/labels.csv": "1.png,ant", "b/labels.csv": "2.png,bee"},
    ),
    "another name of the column of splits": (
        "1.png 2.png 3.png 4.png",
        {
            "labels.csv": "file,label,Usage\n1.png,ant,Training\n2.png,bee,Training\n"
            "3.png,ant,PublicTest\n4.png,bee,PrivateTest\n"
        },
    ),
    "a json with a line end in a caption": (
        "1.png 2.png",
        {
            "metadata.jsonl": '{"File_Name": "1.png", "label": "ant", "text": "a\u2028b"}\n'
            '{"File_Name": "2.png", "label": "bee"}\n'
        },
    ),
    "in capital letters": ("1.png 2.png", {"Labels.CSV": CSV}),
    "beside other texts": ("1.png 2.png", {"labels.csv": CSV, "train.csv": "1.png,wasp"}),
}


@pytest.mark.parametrize("case", LABEL_FILES)
def test_label_files(tmp_path: Path, case: str) -> None:
    root = build(tmp_path / "data", *LABEL_FILES[case])
    source = every_kind(root, tmp_path)[0]
    found = {key[-5:]: name for key, name in classes_of(source).items()}
    assert (found["1.png"], found["2.png"]) == ("ant", "bee")
    if len(source) > 2:
        assert source.splits == ("train", "train", "test", "test")
    assert not source.bad


@pytest.mark.parametrize("kind", ["one for all", "one for each", "declared"])
def test_label_files_and_splits(tmp_path: Path, kind: str) -> None:
    texts = {
        "one for all": {"labels.csv": "train/1.png,a\ntrain/2.png,b\ntest/1.png,a\n"},
        "one for each": {
            "train/metadata.csv": "file_name,label\n1.png,a\n2.png,b\n",
            "test/metadata.csv": "file_name,label\n1.png,a\n",
        },
        "declared": {
            "labels.csv": "file,label,split\nx/1.png,a,train\nx/2.png,b,Training\ny/1.png,a,test\n"
        },
    }[kind]
    files = (
        "x/1.png x/2.png y/1.png" if kind == "declared" else "train/1.png train/2.png test/1.png"
    )
    source = every_kind(build(tmp_path / "data", files, texts), tmp_path)[0]
    assert sorted(zip(source.splits, (source.classes[n] for n in source.labels), strict=True)) == [
        ("test", "a"),
        ("train", "a"),
        ("train", "b"),
    ]


def test_a_declared_split_is_used_where_folders_declare_none(tmp_path: Path) -> None:
    lines = [
        f"{c}/{n}.png,{s}" for c in ("valid", "invalid") for n, s in ((1, "train"), (2, "test"))
    ]
    root = build(tmp_path / "data", "valid/1.png valid/2.png invalid/1.png invalid/2.png")
    (root / "labels.csv").write_text("\n".join(["file,split", *lines]))
    source = every_kind(root, tmp_path)[0]
    assert all(key.startswith(f"{name}/") for key, name in classes_of(source).items())
    assert source.classes == ("invalid", "valid")
    assert source.splits == ("train", "test") * 2
    for labels in ("none", "folders"):
        assert open_source(root, resolution=8, labels=labels).splits == source.splits
    (root / "labels.csv").write_text("\n".join(["file,split", *lines[:-1]]))
    assert [key for key, _ in open_source(root, resolution=8).bad] == ["invalid/2.png"]


REFUSED = {
    # images, text files, place, words of the error
    "test beside classes": (f"{PETS} test/1.png", {}, "test", "name of a split"),
    "valid beside invalid": ("valid/1.png invalid/1.png", {}, "valid", "name of a split"),
    "a third folder beside splits": (
        f"{below('train', 'test')} unlabeled/1.png", {}, "test", "unlabeled beside it",
    ),
    "a pair beside a third": (
        "seg_train/1.png seg_test/1.png seg_pred/1.png", {}, "seg_t", "seg_pred beside it",
    ),
    "class folders in one split only": (f"{below('train')} test/1.png", {}, "test", "no class"),
    "a class in test only": ("train/a/1.png test/a/1.png test/b/1.png", {}, "", "class 'b'"),
    "no training split": ("val/1.png test/1.png", {}, "", "no training split"),
    "test alone": (below("test"), {}, "test", "no training split"),
    "two training splits": ("train_a/1.png train_b/1.png test/1.png", {}, "", "both train splits"),
    "domains of CycleGAN": ("trainA/1.png trainB/1.png testA/1.png testB/1.png", {}, "", "both"),
    "a split below some classes": ("cat/train/1.png cat/test/1.png dog/1.png", {}, "cat", "split"),
    "a split below classes below groups": (
        "x/cat/train/1.png x/cat/test/1.png y/dog/train/1.png y/dog/test/1.png", {}, "x/cat/test",
        "split",
    ),
    "a split in a class": ("cat/1.png cat/test/2.png dog/1.png", {}, "cat/test", "split"),
    "a split in a class of a split": (
        "train/cat/1.png train/cat/test/1.png train/dog/1.png", {}, "train/cat/test", "split",
    ),
    "images beside class folders": (f"{PETS} 1.png", {}, "", "holds both images"),
    "an empty class folder": (f"{PETS} cow/", {}, "cow", "contains no images"),
    "no images": ("", {"a/b.txt": "x"}, "", "contains no images"),
    "labels that contradict folders": (
        PETS, {"labels.csv": "cat/1.png,dog\ncat/2.png,cat\ndog/1.png,dog\n"}, "cat/1.png", "'dog'",
    ),
    "splits that contradict folders": (
        "train/1.png test/1.png",
        {"labels.csv": "file,split\ntrain/1.png,train\ntest/1.png,train\n"},
        "test/1.png", "test folder",
    ),
    "two label files": (
        "1.png", {"labels.csv": "1.png,a", "metadata.csv": "file_name,label\n1.png,b"}, "", "both",
    ),
    "labels and no labels": (
        "a/1.png b/1.png",
        {"a/dataset.json": '{"labels": null}', "b/labels.csv": "1.png,x"}, "", "declares no labels",
    ),
    "captions in metadata.csv": (
        "1.png", {"metadata.csv": "file_name,text\n1.png,a cat"}, "metadata.csv", "--labels none",
    ),
    "captions in metadata.jsonl": (
        "1.png", {"metadata.jsonl": '{"file_name": "1.png", "text": "x"}'}, "metadata.jsonl",
        "no column",
    ),
    "masks beside images": (
        "images/1.png images/2.png masks/1.png masks/2.png", {}, "", "--exclude 'masks'",
    ),
    "two kinds of content": ("leftImg8bit/a_l.png gtFine/a_g.png", {}, "", "--exclude"),
    "a level above the classes": (
        "color/apple/1.png color/corn/1.png grey/apple/1.png grey/corn/1.png", {}, "",
        "same folders (apple, corn)",
    ),
    "a label beside its image": ("1.png 2.png", {"1.label": "a"}, "", "1.label"),
    "a json label beside its image": ("a/1.png b/1.png", {"a/1.json": '{"label": 1}'}, "", "a/1.j"),
    "captions that are names of splits": (
        "test/dev/1.png", {"test/dev/metadata.csv": "file_name,text\n1.png,train"}, "metadata.csv",
        "no column",
    ),
    "a vector in labels.csv": ("1.png", {"labels.csv": '1.png,"[0, 1]"'}, "labels.csv", "several"),
    "two names in labels.csv": ("1.png", {"labels.csv": "1.png,a|b"}, "labels.csv", "several"),
    "three columns without a header": (
        "1.png 2.png", {"labels.csv": "file,label\n1.png,a\n2.png,a,b"}, "labels.csv", "line 3",
    ),
    "a quote that does not end": (
        "1.png 2.png", {"labels.csv": 'file,label\n1.png,"a\n2.png,b'}, "labels.csv", "quote",
    ),
    "flags of a split": (
        "1.png 2.png", {"labels.csv": "file,label,is_test\n1.png,a,0\n2.png,a,1"}, "labels.csv",
        "is_test",
    ),
    "one image with two labels in an object": (
        "1.png", {"dataset.json": '{"labels": {"1.png": 0, "1.png": 1}}'}, "dataset.json",
        "two values",
    ),
    "a labelled class in test only": (
        "train/1.png test/2.png", {"labels.csv": "train/1.png,a\ntest/2.png,b"}, "", "class 'b'",
    ),
    "captions in labels.csv": (
        "1.png", {"labels.csv": "file,caption\n1.png,a cat"}, "labels.csv", "--labels none",
    ),
    "attributes": (
        "1.png", {"dataset.json": '{"labels": {"1.png": [0, 1, 1]}}'}, "dataset.json", "one class",
    ),
    "fractions": (
        "1.png", {"dataset.json": '{"labels": {"1.png": 0.5}}'}, "dataset.json", "one class",
    ),
    "an extracted WebDataset": ("a/1.png", {"a/1.cls": "0"}, "", "tar --sort=name"),
    "an unknown split": (
        "1.png", {"labels.csv": "file,label,split\n1.png,a,fold1"}, "1.png", "'fold1'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unclear_layouts(tmp_path: Path, case: str) -> None:
    files, texts, place, word = REFUSED[case]
    root = build(tmp_path / "data", files, texts)
    for spec in (root, zipped(root, tmp_path / "x.zip", "wrap/")):
        with pytest.raises(DataError) as error:
            open_source(spec, resolution=8)
        one_line(error, place, word)
    notes = "".join(getattr(error.value, "__notes__", []))
    if "holds both labels" not in str(error.value) and not texts:
        assert "wrap/" in notes
        assert "SPLIT/CLASS/IMAGES" in notes


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"labels.csv": "1.png,a\n"}, "is not in labels.csv"),
        ({"labels.csv": "1.png,a\n2.png,a\n2.png,b\n"}, "has several labels"),
        ({"labels.csv": "1.png,a\n2.png,\n"}, "has no label"),
    ],
)
def test_images_without_one_label_are_unusable(
    tmp_path: Path, texts: dict[str, str], reason: str
) -> None:
    source = every_kind(build(tmp_path / "data", "1.png 2.png", texts), tmp_path)[0]
    assert [(key, why[: len(reason)]) for key, why in source.bad] == [("2.png", reason)]


def test_labels_none_and_folders(tmp_path: Path) -> None:
    texts = {"labels.csv": "a/1.png,x\nb/2.png,y\n"}
    root = build(tmp_path / "data", "a/1.png b/2.png", texts)
    found = {
        labels: open_source(root, resolution=8, labels=labels)
        for labels in ("auto", "folders", "none")
    }
    assert {labels: source.classes for labels, source in found.items()} == {
        "auto": ("x", "y"),
        "folders": ("a", "b"),
        "none": ("all",),
    }
    assert found["none"].keys == found["auto"].keys
    mixed = build(tmp_path / "mixed", "1.png a/2.png 00000/3.png")
    assert every_kind(mixed, tmp_path, labels="none")[0].labels == (0, 0, 0)
    split = build(tmp_path / "split", "train/00000/3.png train/2.png test/1.png")
    assert open_source(split, resolution=8, labels="none").splits.count("test") == 1


def test_excluded_files_and_folders(tmp_path: Path) -> None:
    root = build(tmp_path / "data", f"{below('train', 'test')} pred/1.png train/cat/1_mask.png")
    source = every_kind(root, tmp_path, exclude=("pred", "*_mask.png"))[0]
    assert source.classes == ("cat", "dog")
    assert len(source) == 6
    one = open_source(root, resolution=8, exclude=("pred", "*/dog", "*_mask.png"))
    assert one.classes == ("cat",)


@pytest.mark.parametrize("pattern", ["maks", "maks/", "*.gif"])
def test_a_pattern_without_a_match_is_refused(tmp_path: Path, pattern: str) -> None:
    root = build(tmp_path / "data", f"{PETS} masks/1.png")
    with pytest.raises(DataError) as error:
        open_source(root, resolution=8, exclude=(pattern,))
    one_line(error, pattern.rstrip("/"), "matches no")
    assert open_source(root, resolution=8, exclude=("masks/",)).classes == ("cat", "dog")


def test_names_in_several_forms(tmp_path: Path) -> None:
    """Composed and decomposed names are one class; macOS writes zips without the flag for UTF-8."""
    composed, decomposed = "caf\xe9", "cafe\u0301"
    root = build(tmp_path / "data", f"train/{composed}/1.png test/{decomposed}/2.png")
    assert every_kind(root, tmp_path)[0].classes == (composed,)
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for path in root.rglob("*.png"):
            archive.write(path, path.relative_to(root))
    data = bytearray((tmp_path / "mac.zip").read_bytes())
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # clear the flag of every member
        position = data.find(magic)
        while position >= 0:
            data[position + offset + 1] &= ~8
            position = data.find(magic, position + 4)
    (tmp_path / "mac.zip").write_bytes(data)
    assert open_source(tmp_path / "mac.zip", resolution=8).classes == (composed,)


def test_class_folders_in_several_tars(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for name, files in [("0", "cat/1.png dog/2.png"), ("1", "dog/3.png")]:
        tarred(build(tmp_path / name, files), tmp_path / "tars" / f"{name}.tar")
    source = open_source(tmp_path / "tars", resolution=8)
    assert classes_of(source) == {"0/cat/1": "cat", "0/dog/2": "dog", "1/dog/3": "dog"}


@pytest.mark.parametrize("part", range(8))
def test_random_trees_are_alike_in_folder_zip_and_tar(part: int) -> None:
    """2,000 seeded trees: equal results, or one line; layout_fuzz.py runs more of them."""
    counts = fuzz(250, first=250 * part)
    assert min(counts.values()) > 50


def test_manifests_of_a_folder_and_its_archives_are_equal(tmp_path: Path) -> None:
    root = build(tmp_path / "data", below("train", "test"))
    specs = [root, zipped(root, tmp_path / "data.zip"), tarred(root, tmp_path / "data.tar", "x/")]
    specs.append(tarred(root, tmp_path / "data.tar.gz"))
    for n, spec in enumerate(specs):
        pack(spec, tmp_path / f"out{n}", resolution=8)
    manifests = {(tmp_path / f"out{n}" / "manifest.json").read_bytes() for n in range(len(specs))}
    assert len(manifests) == 1


def test_a_compressed_tar_is_packed_and_leaves_no_copy(tmp_path: Path) -> None:
    root = build(tmp_path / "data", below("train", "test"))
    file = tarred(root, tmp_path / "data.tar.gz")
    packed = pack(file, tmp_path / "packed", resolution=8)
    assert packed.manifests[0].classes == ("cat", "dog")
    assert not list((tmp_path / "packed").rglob("*spool*"))
    assert pack(file, tmp_path / "packed", resolution=8).complete  # the same source again
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        pack(file, tmp_path / "other", resolution=8)
    assert not (tmp_path / "other").exists()


def test_one_archive_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    zipped(build(tmp_path / "data", PETS), tmp_path / "download" / "images.zip")
    (tmp_path / "download" / "README.txt").write_text("x")
    assert open_source(tmp_path / "download", resolution=8).classes == ("cat", "dog")
    (tmp_path / "download" / "labels.csv").write_text("1.png,a")
    with pytest.raises(DataError) as error:
        open_source(tmp_path / "download", resolution=8)
    one_line(error, "labels.csv beside images.zip", "extract")
    zipped(tmp_path / "data", tmp_path / "download" / "test.zip")
    with pytest.raises(DataError, match="several archives"):
        open_source(tmp_path / "download", resolution=8)


def test_a_header_with_an_unknown_label_column(tmp_path: Path) -> None:
    """Kaggle's labels of the images in train/, beside a test/ without labels."""
    texts = {"labels.csv": "id,breed\n1,pug\n2,lab\n"}
    root = build(tmp_path / "data", "train/1.jpg train/2.jpg test/3.jpg", texts)
    with pytest.raises(DataError) as error:
        open_source(root, resolution=8)
    one_line(error, "labels.csv: names no image", "'1'", "'test/3.jpg'", "--exclude")
    source = every_kind(root, tmp_path, exclude=("test",))[0]
    assert sorted(source.classes[label] for label in source.labels) == ["lab", "pug"]
