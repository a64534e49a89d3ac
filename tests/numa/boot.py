"""`make test-numa`: boot a machine with CPU-less memory in QEMU, and run tests on it with the whole product.

    python tests/numa/boot.py [--keep] [GUEST_SCRIPT ...]

The machine: two DRAM nodes with a CPU each, two nodes without CPUs (one there from the start, one plugged in, so that
it can be taken offline), and HMAT attributes (`machine.py`). All CPUs are emulated (TCG): what is measured inside says
nothing of any real machine. Kernel and QEMU come from Debian's packages; where they cannot be had, it says so and ends
with status 0.

Scripts of this folder named guest_*.py run in order; the exit status is 0 if all end with 0.
"""

import argparse
import compileall
import gzip
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from machine import NODES, access

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CACHE = ROOT / "build" / "numa"
# More than it is to take: other work on the same cores must not fail it.
LIMIT_S = int(os.environ.get("NUMA_TEST_SECONDS", "600"))
KERNELS = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64")  # the first has weighted interleaving
MODULES = ("virtio_pci", "virtio_blk")
# Of the environment, what no guest needs: tools, and what only building against torch takes.
LEFT_OUT = re.compile(
    r"^(_?mypy|.*__mypyc|mypyc|pyright|cmake|ninja|pip|setuptools|virtualenv|ruff|hypothesis|openai|nodeenv|pre_commit|"
    r"torch/(include|test|share)|torch/bin/(?!torch_shm_manager)|torch/testing/_internal/generated)(/|-|\.|$)"
)
CHECK = re.compile(r"(ok|FAILED) +([^:]+)")  # as checks.py prints them
MARKER = "guest: every test ended with status "


class CannotBoot(Exception):
    """This machine has not what it takes; the text says what is missing."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Test memory placement in a guest with CPU-less nodes.")
    parser.add_argument("scripts", nargs="*", type=Path, help="default: every guest_*.py of this folder")
    parser.add_argument("--keep", action="store_true", help="do not delete the disk image")
    arguments = parser.parse_args()
    scripts = arguments.scripts or sorted(FOLDER.glob("guest_*.py"))
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        qemu, kernel, busybox = _qemu(), *_kernel_and_busybox()
    except CannotBoot as error:
        print(f"test-numa: skipped: {error}")
        return 0
    # On the checkout's file system: files are linked, not copied, where that works.
    scratch = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        begin = time.monotonic()
        tree = scratch / "root"
        _fill(tree, scripts)
        disk, initrd = scratch / "disk", scratch / "initrd"
        _make_disk(tree, disk)
        initrd.write_bytes(_initrd(busybox, kernel, scripts))
        size = disk.stat().st_size
        print(f"test-numa: disk of {size >> 20} MiB made in {time.monotonic() - begin:.0f} s", flush=True)
        return _boot(qemu, kernel / "vmlinuz", initrd, disk)
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def _qemu() -> str:
    if platform.machine() != "x86_64":
        raise CannotBoot(f"the guest is an x86-64 PC, this is {platform.machine()}")
    needed = {"qemu-system-x86_64": "qemu-system-x86", "mke2fs": "e2fsprogs"}
    missing = [package for program, package in needed.items() if shutil.which(program) is None]
    if missing and shutil.which("apt-get") and os.geteuid() == 0:
        print(f"test-numa: installing {' '.join(missing)}", flush=True)
        install = ("install", "--yes", "--no-install-recommends", *missing)
        try:
            _apt(*install)
        except CannotBoot:  # a fresh machine has no lists of packages
            _apt("update")
            _apt(*install)
    for program, package in needed.items():
        if shutil.which(program) is None:
            raise CannotBoot(f"{program} is missing: apt-get install {package}")
    return "qemu-system-x86_64"


def _kernel_and_busybox() -> tuple[Path, Path]:
    """A folder with `vmlinuz` and `lib/modules`, and a static busybox: Debian's packages, unpacked, not installed."""
    kernel, busybox = CACHE / "kernel", CACHE / "busybox"
    if not (kernel / "vmlinuz").exists():
        package = next((name for package in KERNELS for name in _dependency(package)), None)
        if package is None:
            raise CannotBoot("no package of Debian's cloud kernel is known to apt")
        _unpack(package, kernel)
        next((kernel / "boot").glob("vmlinuz-*")).rename(kernel / "vmlinuz")
    if not busybox.exists():
        _unpack("busybox-static", busybox)
    found = (busybox / "bin/busybox", busybox / "usr/bin/busybox")
    return kernel, next(path for path in found if path.exists())


def _dependency(package: str) -> list[str]:
    """The kernel that a package without content stands for."""
    if shutil.which("apt-cache") is None or shutil.which("dpkg-deb") is None:
        raise CannotBoot(
            "apt-cache and dpkg-deb are missing: the guest's kernel comes from Debian's packages"
        )
    done = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False)
    if done.returncode != 0 or "linux-image" not in done.stdout:
        _apt("update")
        done = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False)
    return re.findall(r"Depends: (linux-image-\d\S+)", done.stdout)


def _unpack(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if subprocess.run(["apt-get", "download", package], cwd=scratch, capture_output=True).returncode != 0:
            _apt("update")
            _apt("download", package, folder=Path(scratch))
        archive = next(Path(scratch).glob("*.deb"))
        # Whole or not at all, since what is there is not unpacked again.
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(["dpkg-deb", "--extract", archive, partial], check=True)
        partial.rename(folder)


def _apt(*arguments: str, folder: Path | None = None) -> None:
    done = subprocess.run(["apt-get", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CannotBoot(f"apt-get {' '.join(arguments)}: {last}")


def _fill(tree: Path, scripts: Iterable[Path]) -> None:
    """The guest's files: this Python, its libraries, the environment's packages, the product, the tests."""
    python = Path(os.path.realpath(sys.executable))
    library = Path(
        sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix})
    )
    packages = Path(sysconfig.get_path("purelib"))
    home = tree / "opt/hybridgen"
    _copy(python, tree / python.relative_to("/"))
    _copy_tree(
        library, tree / library.relative_to("/"), re.compile(r"^(test|idlelib|ensurepip|site-packages)(/|$)")
    )
    _copy_tree(packages, home, LEFT_OUT)
    # The editable install is a finder that looks into the checkout, and the extension.
    for name in ("server", "engine", "kernels", "scheduler", "configs"):
        _copy_tree(ROOT / name, home / "hybridgen" / name, re.compile(r"^csrc(/|$)"))
    for file in (ROOT / "src/hybridgen").glob("*.py"):
        _copy(file, home / "hybridgen" / file.name)
    for file in home.glob("_*editable*"):
        file.unlink()
    # Compiling takes the emulated processor seconds, in every process.
    compileall.compile_dir(home / "hybridgen", quiet=1, stripdir=str(tree))
    for script in {*scripts, *FOLDER.glob("*.py")}:
        _copy(script, tree / "tests" / script.name)
    for name in ("proc", "sys", "dev", "tmp", "root", "run", "etc", "sbin"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for path in _shared_libraries([python, *tree.rglob("*.so"), *tree.rglob("*.so.*")], tree):
        _copy(path, tree / path.relative_to("/"))
    for link, target in (("lib64", "usr/lib64"), ("lib", "usr/lib"), ("bin", "usr/bin")):
        if Path("/", link).is_symlink() and not (tree / link).exists():
            (tree / target).mkdir(parents=True, exist_ok=True)
            (tree / link).symlink_to(target)


def _shared_libraries(binaries: Sequence[Path], tree: Path) -> set[Path]:
    """What binaries load from outside the tree, with the loader, as paths that the loader looks at."""
    done = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False)
    found = re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE)
    # Through links to folders, so that what is one file stays one.
    paths = {Path(path).parent.resolve() / Path(path).name for path in found}
    return {path for path in paths if not path.is_relative_to(tree)}


def _copy_tree(source: Path, target: Path, left_out: re.Pattern[str]) -> None:
    for folder, names, files in os.walk(source):
        inside = Path(folder).relative_to(source)
        names[:] = [name for name in names if not left_out.match(str(inside / name))]
        for name in files:
            if not left_out.match(str(inside / name)):
                _copy(Path(folder, name), target / inside / name)


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _make_disk(tree: Path, disk: Path) -> None:
    used = sum(
        path.stat().st_blocks * 512 for path in tree.rglob("*") if path.is_file() and not path.is_symlink()
    )
    kilobytes = used * 11 // 10 // 1024 + (128 << 10)
    arguments = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1"]
    subprocess.run([*arguments, "-d", tree, disk, f"{kilobytes}k"], check=True, capture_output=True)


def _initrd(busybox: Path, kernel: Path, scripts: Iterable[Path]) -> bytes:
    """busybox, the modules that reach the disk, and a script that goes there."""
    modules = _modules(kernel)
    load = "\n".join(f"/bin/busybox insmod /{name}.ko" for name in modules)
    init = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs d /dev; $b mount -t proc p /proc; $b mount -t sysfs s /sys
{load}
for i in 1 2 3 4 5 6 7 8 9 10; do test -b /dev/vda && break; $b sleep 0.3; done
$b mount -t ext4 /dev/vda /root
for name in dev proc sys; do $b mount --move /$name /root/$name; done
$b mount -t tmpfs t /root/tmp
$b mount -t tmpfs t /root/run
$b ip link set lo up
export HOME=/tmp PATH=/usr/bin:/bin PYTHONPATH=/opt/hybridgen:/tests
export PYTHONDONTWRITEBYTECODE=1 COLUMNS=150 OMP_WAIT_POLICY=passive
status=0
for script in {" ".join(f"/root/tests/{script.name}" for script in scripts)}; do
  echo "guest: $($b basename $script), $($b cut -d' ' -f1 /root/proc/uptime) s after the start"
  $b chroot /root {os.path.realpath(sys.executable)} -u /tests/$($b basename $script) || status=1
done
echo "{MARKER}$status"
$b poweroff -f
"""
    files = [("bin/busybox", busybox.read_bytes(), 0o755), ("init", init.encode(), 0o755)]
    files += [(f"{name}.ko", content, 0o644) for name, content in modules.items()]
    return gzip.compress(_cpio(files, folders=("bin", "dev", "proc", "sys", "root")), 1)


def _modules(kernel: Path) -> dict[str, bytes]:
    """MODULES and what they need, in the order of loading; those that are built in have no file."""
    files = {
        re.sub(r"\.ko(\.xz)?$", "", path.name).replace("-", "_"): path
        for path in (kernel / "lib/modules").rglob("*.ko*")
    }
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:
            return
        path = files[name]
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in filter(None, (match[1].decode() if match else "").split(",")):
            load(needed.replace("-", "_"))
        loaded[name] = content

    for name in MODULES:
        load(name)
    return loaded


def _cpio(files: Iterable[tuple[str, bytes, int]], folders: Iterable[str]) -> bytes:
    """An archive in the format that the kernel unpacks ("newc")."""
    archive = bytearray()

    def add(name: str, content: bytes, mode: int) -> None:
        fields = (len(archive) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        archive.extend(b"\0" * (-len(archive) % 4))
        archive.extend(content + b"\0" * (-len(content) % 4))

    for folder in folders:
        add(folder, b"", 0o040755)
    for name, content, mode in files:
        add(name, content, 0o100000 | mode)
    add("TRAILER!!!", b"", 0)
    return bytes(archive)


def _boot(qemu: str, kernel: Path, initrd: Path, disk: Path) -> int:
    command = [
        *(qemu, "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35,hmat=on"),
        *_machine_arguments(),
        *("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe"),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable"),
    ]
    begin = time.monotonic()
    # timeout(1) ends it, so that reading the console line by line needs no clock.
    process = subprocess.Popen(
        ["timeout", str(LIMIT_S), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    status = ""
    checks: list[str] = []
    try:
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            print(line, flush=True)
            if match := CHECK.match(line):
                checks.append(f"  {match[1]:<6}  {match[2]}")
            if line.startswith(MARKER):
                status = line.removeprefix(MARKER)
    finally:
        process.terminate()
        process.wait()
    took = f"{time.monotonic() - begin:.0f} s"
    if not status:
        reason = f"not done within {LIMIT_S} s" if process.returncode == 124 else "ended before its tests did"
        print(f"test-numa: FAILED: the guest was {reason} ({took})")
        return 1
    print("\n".join(["test-numa: what was checked:", *checks]))
    print(f"test-numa: {'passed' if status == '0' else 'FAILED'}, {len(checks)} checks in {took}")
    return int(status != "0")


def _machine_arguments() -> list[str]:
    from_start = [node for node in NODES if not node.plugged]
    num_cpus = sum(node.has_cpu for node in NODES)
    arguments = ["-smp", f"{num_cpus},sockets={num_cpus}"]
    arguments += ["-m", f"{sum(node.mebibytes for node in from_start)}M,slots=4,maxmem=32G"]
    cpu = 0
    for node in NODES:
        memory, numa = f"memory{node.id}", f"node,nodeid={node.id}"
        arguments += ["-object", f"memory-backend-ram,id={memory},size={node.mebibytes}M"]
        if not node.plugged:
            numa += f",memdev={memory}"
        if node.has_cpu:
            numa, cpu = f"{numa},cpus={cpu}", cpu + 1
        else:
            numa += f",initiator={node.near}"
        arguments += ["-numa", numa]
        if node.plugged:
            arguments += ["-device", f"pc-dimm,id=dimm{node.id},memdev={memory},node={node.id}"]
    for one in NODES:
        for other in NODES:
            if one.id < other.id:
                arguments += ["-numa", f"dist,src={one.id},dst={other.id},val={access(one, other).distance}"]
    for initiator in (node for node in NODES if node.has_cpu):
        for target in NODES:
            value, place = (
                access(initiator, target),
                f"initiator={initiator.id},target={target.id},hierarchy=memory",
            )
            arguments += ["-numa", f"hmat-lb,{place},data-type=access-latency,latency={value.latency_ns}"]
            arguments += [
                "-numa",
                f"hmat-lb,{place},data-type=access-bandwidth,bandwidth={value.bandwidth_mb}M",
            ]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
