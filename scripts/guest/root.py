"""The guest's root file system: files of packages and wheels, the agent, modules, links, compiled Python."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from guest.data import BuildError, Recipe, Selection
from guest.elf import without_library
from guest.kernel import Module, Modules, is_module, module_of, stripped
from guest.tree import MERGED, Tree, normal_path

SITE = "usr/lib/pykata"  # the agent and its wheels; init puts it on sys.path
STANDARD_LIBRARY = "usr/lib/python3.11"
PYTHON = "usr/bin/python3.11"
LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def add_deb(tree: Tree, deb: Path, selection: Selection, drop: Iterable[str]) -> None:
    """Unpack the wanted files of a Debian package."""
    found = False
    with open_deb(deb) as archive:
        for member in archive:
            path = member.name.removeprefix("./").strip("/")
            if not wanted(path, selection, drop):
                continue
            if member.issym():
                tree.symlink(normal_path(path), member.linkname)
            elif member.islnk():
                source = tree[normal_path(member.linkname)]
                tree.file(normal_path(path), source.data, source.mode)
            elif member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                tree.file(normal_path(path), file.read(), 0o755 if member.mode & 0o111 else 0o644)
            else:
                continue  # directories appear by themselves
            found = True
    if not found:
        raise BuildError(f"package {selection.name}: no file matches `keep` and `drop` of guest.toml")


def open_deb(deb: Path) -> tarfile.TarFile:
    """Open the files of a Debian package as a tar archive in memory."""
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"dpkg-deb could not unpack {deb}: {done.stderr.decode().strip()}")
    return tarfile.open(fileobj=io.BytesIO(done.stdout))


def wanted(path: str, selection: Selection, drop: Iterable[str]) -> bool:
    """Decide whether a file of a package belongs into the guest."""
    if not any(fnmatchcase(path, pattern) for pattern in selection.keep):
        return False
    return not any(fnmatchcase(path, pattern) for pattern in (*selection.drop, *drop))


def add_wheel(tree: Tree, wheel: Path, selection: Selection) -> None:
    """Unpack a wheel into the agent's directory."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename, selection, ()):
                data = archive.read(info)
                if info.filename.endswith(".so"):
                    for library in selection.unused_libraries:
                        data = without_library(data, library)
                tree.file(f"{SITE}/{info.filename}", data)


def agent_tree(source: Path, packages: Iterable[str]) -> Tree:
    """Collect the Python files of the agent from a checkout (paths as they are imported)."""
    tree = Tree()
    for package in packages:
        directory = source / package
        for file in sorted(directory.rglob("*.py")):
            tree.file(str(file.relative_to(source)), file.read_bytes())
        for parent in directory.relative_to(source).parents:
            init = source / parent / "__init__.py"
            if str(parent) != "." and init.exists():
                tree.file(str(parent / "__init__.py"), init.read_bytes())
    return tree


def module_names(tree: Tree) -> list[str]:
    """Return the importable names of the agent's own modules (its libraries have parts for the host only)."""
    paths = [path for path, _ in tree.items() if path.startswith("agent/") and path.endswith(".py")]
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    return [name for name in names if not name.endswith("__main__")]


def read_kernel_deb(deb: Path) -> tuple[str, bytes, Modules]:
    """Return version, bzImage and modules of a kernel package."""
    image, version, builtin = b"", "", ""
    modules: list[Module] = []
    with open_deb(deb) as archive:
        for member in archive:
            path = normal_path(member.name)
            if not member.isreg():
                continue
            file = archive.extractfile(member)
            assert file is not None
            if path.startswith("boot/vmlinuz-"):
                image, version = file.read(), path.removeprefix("boot/vmlinuz-")
            elif path.startswith("usr/lib/modules/"):
                relative = path.split("/", 4)[4]
                if relative == "modules.builtin":
                    builtin = file.read().decode()
                elif is_module(relative):
                    modules.append(module_of(relative, file.read()))
    if not image or not modules:
        raise BuildError(f"{deb}: no kernel image or no modules in it")
    return version, image, Modules(modules, builtin)


def root_tree(
    recipe: Recipe, debs: Iterable[tuple[Path, Selection]], wheels: Iterable[tuple[Path, Selection]]
) -> Tree:
    """Put everything together but the modules, the agent and init."""
    tree = Tree()
    for name in MERGED:
        tree.directory(f"usr/{name}")
        tree.symlink(name, f"usr/{name}")
    for name in recipe.directories:
        tree.directory(name, 0o1777 if name == "tmp" else 0o755)
    for path, selection in debs:
        add_deb(tree, path, selection, recipe.drop)
    for path, selection in wheels:
        add_wheel(tree, path, selection)
    for link in recipe.busybox_links:
        tree.symlink(normal_path(link), "/bin/busybox")
    # Programs of the agent expect them; the root is read-only, so what changes must point to where it may.
    tree.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    tree.file("etc/group", b"root:x:0:\n")
    tree.file("etc/hostname", b"localhost\n")
    tree.symlink("etc/mtab", "/proc/self/mounts")
    tree.symlink("etc/resolv.conf", "/run/kata-containers/sandbox/resolv.conf")
    tree.symlink("var/run", "/run")
    return tree


def add_modules(tree: Tree, version: str, modules: Modules, names: Iterable[str]) -> None:
    """Put modules and modprobe's index into the root."""
    directory = f"usr/lib/modules/{version}"
    chosen = modules.closure(names)
    for module in chosen:
        tree.file(f"{directory}/{module.path}", stripped(module.data))
    for name, text in modules.index(chosen).items():
        tree.file(f"{directory}/{name}", text.encode())


def compile_python(root: Path, script: Path) -> None:
    """Replace each .py of a written root by a .pyc, with the guest's own Python (formats differ)."""
    _run_python(root, "compile Python", [str(script), str(root), STANDARD_LIBRARY, SITE])


def try_imports(root: Path, names: Iterable[str]) -> None:
    """Import modules of the agent in the guest's Python: what `drop` has taken too much of is missed here."""
    path = [str(root / SITE), str(root / STANDARD_LIBRARY), str(root / STANDARD_LIBRARY / "lib-dynload")]
    program = f"import sys\nsys.path[:] = {path!r}\nfor name in sys.argv[1:]:\n    __import__(name)\n"
    _run_python(root, "import the agent", ["-c", program, *names])


def _run_python(root: Path, purpose: str, arguments: list[str]) -> None:
    # Through the guest's loader, so that neither a chroot nor the machine's libraries are involved.
    # PYTHONHASHSEED: the order of a set's elements must not depend on the run.
    argv = [
        str(root / LOADER),
        "--library-path",
        str(root / LIBRARIES),
        str(root / PYTHON),
        "-s",
        "-S",
        *arguments,
    ]
    environment = {"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise BuildError(f"the guest's Python could not {purpose}: {(done.stderr or done.stdout).strip()}")
