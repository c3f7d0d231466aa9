"""Reading the configuration: what is found, what it means, and how mistakes are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.config import AgentConfig, Config, FactoryConfig, HypervisorConfig, RuntimeConfig, find, keys, load
from vc.config.ignored import IGNORED
from vc.config.load import DEFAULT_PATHS, settle
from vc.errors import InvalidArgument

KATA = Path(__file__).parents[2] / "data" / "config" / "kata-qemu.toml"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with the files that a configuration names."""
    for name in ("qemu-system-x86_64", "vmlinuz.container", "kata-containers.img", "initrd.img", "virtiofsd"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write(home: Path, text: str, name: str = "configuration.toml") -> str:
    path = home / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("@DIR@", str(home)))
    return str(path)


MINIMAL = """
[hypervisor.qemu]
path = "@DIR@/qemu-system-x86_64"
kernel = "@DIR@/vmlinuz.container"
image = "@DIR@/kata-containers.img"
virtio_fs_daemon = "@DIR@/virtiofsd"
"""


def minimal(home: Path, more: str = "") -> Config:
    return load(write(home, MINIMAL + more), {})


def problem(home: Path, text: str) -> str:
    path = write(home, text)
    with pytest.raises(InvalidArgument) as caught:
        load(path, {})
    return str(caught.value).replace(str(home) + "/", "")


def test_katas_own_file_loads_and_warns_only_of_the_tables_of_kata_1_and_of_what_it_promises(
    home: Path,
) -> None:
    config = load(write(home, KATA.read_text()), {})
    assert {warning.split(": ")[1] for warning in config.warnings} == {
        *(
            f"the table [{name}] is of Kata 1.x and has no effect"
            for name in ("proxy.kata", "shim.kata", "netmon")
        ),
        "runtime.static_sandbox_resource_mgmt = false (a boolean) has no effect",
    }
    assert config.hypervisor.kernel == home / "vmlinuz.container"
    assert config.hypervisor.default_vcpus == 1.0
    assert config.hypervisor.virtio_fs_extra_args == ("--thread-pool-size=1", "--announce-submounts")
    assert config.runtime.disable_guest_seccomp is True


def test_the_test_file_has_every_key_that_is_known() -> None:
    tables = tomllib.loads(KATA.read_text())
    sections = (
        ("hypervisor", HypervisorConfig, tables["hypervisor"]["qemu"], {"initrd", "valid_ctlpaths"}),
        ("agent.kata", AgentConfig, tables["agent"]["kata"], set[str]()),
        ("runtime", RuntimeConfig, tables["runtime"], set[str]()),
        ("factory", FactoryConfig, tables["factory"], set[str]()),
    )
    for section, cls, table, absent in sections:
        katas = {key.name for key in keys(cls) if not key.ours} | set(IGNORED[section])
        refused = {"confidential_guest", "sev_snp_guest"} if section == "hypervisor" else set[str]()
        assert set(table) == (katas - absent) | refused


def test_a_minimal_file_gives_the_defaults(home: Path) -> None:
    config = minimal(home)
    assert config.source == home / "configuration.toml"
    assert config.warnings == ()
    assert config.agent == AgentConfig()
    assert config.runtime == RuntimeConfig()
    assert config.runtime.run_dir == Path("/run/vc")
    assert config.factory == FactoryConfig()
    assert config.hypervisor.accelerator == "auto"
    assert config.hypervisor.initrd is None


def test_an_initrd_may_stand_beside_the_image_or_alone(home: Path) -> None:
    both = minimal(home, 'initrd = "@DIR@/initrd.img"')
    assert (both.hypervisor.image, both.hypervisor.initrd) == (
        home / "kata-containers.img",
        home / "initrd.img",
    )
    alone = load(write(home, MINIMAL.replace("image =", "initrd =")), {})
    assert (alone.hypervisor.image, alone.hypervisor.initrd) == (None, home / "kata-containers.img")
    neither = problem(home, MINIMAL.replace("image =", "#"))
    assert "image or initrd must be defined in the configuration file" in neither


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "default_memory = true",
            "hypervisor.qemu.default_memory: got true (a boolean), must be an integer from 1 to",
        ),
        ("default_memory = 2.0", "hypervisor.qemu.default_memory: got 2.0 (a float), must be an integer"),
        (
            "default_memory = 0",
            "hypervisor.qemu.default_memory: got 0 (an integer), must be an integer from 1",
        ),
        ("default_memory = 0x" + "f" * 20_000, "got an integer of more than 64 bits, must be an integer"),
        ("default_vcpus = nan", "hypervisor.qemu.default_vcpus: got nan (a float), must be a number from"),
        ('default_vcpus = "2"', 'hypervisor.qemu.default_vcpus: got "2" (a string), must be a number'),
        ("default_vcpus = 0x" + "f" * 20_000, "got an integer of more than 64 bits, must be a number"),
        ('accelerator = "kvmm"', 'accelerator: got "kvmm" (a string), must be one of "auto", "kvm", "tcg"'),
        (
            'shared_fs = "virtio-9p"',
            'shared_fs: got "virtio-9p" (a string), must be one of "virtio-fs", "none"',
        ),
        ("enable_debug = 1", "enable_debug: got 1 (an integer), must be true or false"),
        ('virtio_fs_extra_args = "-x"', 'virtio_fs_extra_args: got "-x" (a string), must be an array'),
        (
            'virtio_fs_extra_args = ["-x", 1]',
            "virtio_fs_extra_args: item 1: got 1 (an integer), must be a string",
        ),
        ('enable_annotations = ["("]', 'enable_annotations: item 0: got "(" (a string), which is no regular'),
        ('entropy_source = "urandom"', 'entropy_source: got "urandom" (a string), must be an absolute path'),
        ("entropy_source = 2020-01-01", "entropy_source: got a date or time, must be an absolute path"),
        (
            'cpu_features = "a\\nb"',
            'cpu_features: got "a\N{REPLACEMENT CHARACTER}b" (a string), must be a string without',
        ),
        (
            "default_vcpu = 2",
            'hypervisor.qemu.default_vcpu = 2 (an integer) is an unknown key, did you mean "default_vcpus"?',
        ),
        ("zzz = 2", "hypervisor.qemu.zzz = 2 (an integer) is an unknown key"),
        ("confidential_guest = true", "confidential_guest: got true (a boolean), must be false"),
    ],
)
def test_a_wrong_key_is_told_with_file_key_value_and_what_is_allowed(
    home: Path, line: str, text: str
) -> None:
    found = problem(home, MINIMAL + line)
    assert found.startswith("configuration.toml: hypervisor.qemu.")
    assert text in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[hypervisor.clh]", "invalid hypervisor prefix: [hypervisor.clh] is not supported, allowed: qemu"),
        (
            "[hypervisor.kemu]",
            "invalid hypervisor prefix: [hypervisor.kemu] is not a hypervisor, allowed: qemu",
        ),
        ("[runtme]", 'unknown table [runtme], did you mean "runtime"?'),
        ("[hypervisor]\npath = 1", "hypervisor.path belongs into the table [hypervisor.qemu]"),
        ("[agent]\nenable_debug = true", "agent.enable_debug belongs into the table [agent.kata]"),
        ("path = 1", "path is an integer, and keys belong into a table"),
        (
            '[runtime]\nexperimental = ["x"]',
            'runtime.experimental: item 0: got "x" (a string), must be absent',
        ),
        (
            "[runtime]\ndisable_new_netns = true",
            "config disable_new_netns only works with 'none' internetworking_model",
        ),
        ("[runtime]\ncreate_container_timeout = 0", "must be a number from 1 to 86400 (seconds)"),
    ],
)
def test_a_wrong_table_is_told(home: Path, text: str, message: str) -> None:
    # Keys before the first table header come first, so that they belong to no table.
    assert message in problem(home, text + "\n" + MINIMAL)


def test_problems_are_told_together_and_on_one_line(home: Path) -> None:
    found = problem(home, "[hypervisor.qemu]\ndefault_vcpus = 'x'\n[runtime]\nenable_debug = 3\nx = 1")
    assert found.startswith("4 problems in the configuration configuration.toml: ")
    for part in ("default_vcpus: got", "kernel is not set", "enable_debug: got 3", "runtime.x = 1"):
        assert part in found
    assert "\n" not in found


def test_missing_and_empty_files_are_told_with_key_path_and_remedy(home: Path) -> None:
    (home / "vmlinuz.container").write_bytes(b"")
    (home / "virtiofsd").unlink()
    text = MINIMAL.replace("kata-containers.img", "nothing.img")
    found = problem(home, text)
    assert "hypervisor.qemu.kernel = vmlinuz.container: the file is empty; build or install" in found
    assert "hypervisor.qemu.image = nothing.img: No such file or directory; build or install" in found
    assert (
        "hypervisor.qemu.virtio_fs_daemon = virtiofsd: No such file or directory; install virtiofsd" in found
    )
    assert "qemu.path" not in found
    assert load(write(home, text), {}, check_files=False).hypervisor.image == home / "nothing.img"


def test_virtiofsd_is_not_missed_when_nothing_is_shared(home: Path) -> None:
    (home / "virtiofsd").unlink()
    assert minimal(home, 'shared_fs = "none"').hypervisor.shared_fs == "none"


def test_a_key_that_does_nothing_here_warns_when_it_asks_for_something(home: Path) -> None:
    config = minimal(
        home, "enable_hugepages = true\nenable_iommu = false\nmsize_9p = 0\n[runtime]\nvfio_mode = 'vfio'"
    )
    path = home / "configuration.toml"
    assert config.warnings == (
        f"{path}: hypervisor.qemu.enable_hugepages = true (a boolean) has no effect: it is not implemented",
        f"{path}: hypervisor.qemu.msize_9p = 0 (an integer) has no effect: it is not implemented",
        f'{path}: runtime.vfio_mode = "vfio" (a string) has no effect: it is not implemented',
    )


def test_little_memory_warns(home: Path) -> None:
    assert "default_memory is 128 MiB" in minimal(home, "default_memory = 128").warnings[0]
    runtime = '\n[runtime]\ninternetworking_model = "none"\ndisable_new_netns = true\n'
    assert "disable_new_netns = true has no effect" in minimal(home, runtime).warnings[0]


def test_drop_ins_override_key_by_key_in_the_order_of_their_names(home: Path) -> None:
    write(home, "[hypervisor.qemu]\ndefault_memory = 512\ndefault_vcpus = 0.5", "config.d/20-b")
    write(home, "[hypervisor.qemu]\ndefault_memory = 400\nmachine_type = 'virt'", "config.d/10-a.toml")
    (home / "config.d" / "directory").mkdir()
    config = minimal(home, "default_memory = 300\ncpu_features = 'x'")
    hypervisor = config.hypervisor
    assert (hypervisor.default_memory, hypervisor.default_vcpus) == (512, 0.5)
    assert (hypervisor.machine_type, hypervisor.cpu_features) == ("virt", "x")


def test_a_mistake_in_a_drop_in_names_the_drop_in(home: Path) -> None:
    write(home, "[runtime]\nenable_debug = 3", "config.d/10-a")
    assert problem(home, MINIMAL).startswith("config.d/10-a: runtime.enable_debug: got 3")


def test_a_drop_in_can_mend_a_wrong_value(home: Path) -> None:
    write(home, "[runtime]\nenable_debug = true", "config.d/10-a")
    assert minimal(home, "[runtime]\nenable_debug = 3").runtime.enable_debug is True


def test_symbolic_links_are_resolved_before_drop_ins_are_looked_for(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write(home, "[runtime]\nenable_debug = true", "config.d/10-a")
    write(home, MINIMAL)
    link = tmp_path_factory.mktemp("etc") / "link.toml"
    link.symlink_to(home / "configuration.toml")
    config = load(str(link), {})
    assert (config.source, config.runtime.enable_debug) == (home / "configuration.toml", True)


def test_the_explicit_path_goes_before_the_environment_and_that_before_the_defaults(
    home: Path,
) -> None:
    first, second, third = (write(home, MINIMAL, name) for name in ("a.toml", "b.toml", "c.toml"))
    defaults = (home / "nothing", Path(third))
    assert find(first, {"KATA_CONF_FILE": second}, defaults) == Path(first)
    assert find(None, {"KATA_CONF_FILE": second}, defaults) == Path(second)
    assert find("", {"KATA_CONF_FILE": ""}, defaults) == Path(third)


def test_no_file_at_all_is_told_with_the_places_that_were_tried(home: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=re.escape(f"Cannot find usable config file ({home}/x, {home}/y)")
    ):
        find(None, {}, (home / "x", home / "y"))


def test_the_default_places_are_katas() -> None:
    assert [str(path) for path in DEFAULT_PATHS] == [
        "/etc/kata-containers/configuration.toml",
        "/usr/share/defaults/kata-containers/configuration.toml",
    ]


@pytest.mark.parametrize("path", ["/nowhere/x.toml", "/", "a\0b", "/dev/null", "x" * 5000])
def test_a_named_file_that_cannot_be_read_is_told_with_who_named_it(path: str) -> None:
    with pytest.raises(InvalidArgument, match="ConfigPath or --config"):
        load(path, {})
    with pytest.raises(InvalidArgument, match="the environment variable KATA_CONF_FILE"):
        load(None, {"KATA_CONF_FILE": path})


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000,
        "x = " + "9" * 5000,
        "= 1",
        "a = 1\na = 2",
        "[" * 9,
        "x = 2020-99-99",
        "#" * (1 << 20) + "#",
    ],
)
def test_a_file_that_is_no_toml_is_refused(home: Path, text: str) -> None:
    assert "config file" in problem(home, text)


def loads_or_refuses(home: Path, data: bytes) -> None:
    (home / "configuration.toml").write_bytes(data)
    try:
        config = load(str(home / "configuration.toml"), {})
    except InvalidArgument as exc:
        assert "\n" not in str(exc)
    else:
        assert isinstance(config, Config)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("config")
    for name in ("qemu-system-x86_64", "vmlinuz.container", "kata-containers.img", "virtiofsd"):
        (home / name).write_bytes(b"x")
    return home


@given(data=st.binary(max_size=100))
def test_any_bytes_load_or_are_refused(shared_home: Path, data: bytes) -> None:
    loads_or_refuses(shared_home, data)


VALUES = st.sampled_from(
    [
        "true",
        "0",
        "-1",
        "1e999",
        "nan",
        '""',
        '"/"',
        '"a\\u0000"',
        "[]",
        "[[1]]",
        "{}",
        "{a=1}",
        "1979-05-27",
        '["("]',
        '"\\u001b"',
        '["/**"]',
    ]
) | st.sampled_from(["0x" + "f" * 40, '"' + "é" * 300 + '"', "9223372036854775807"])
NAMES = [
    key.name for cls in (HypervisorConfig, AgentConfig, RuntimeConfig, FactoryConfig) for key in keys(cls)
]
TABLES = st.sampled_from(
    ["hypervisor.qemu", "agent.kata", "runtime", "factory", "netmon", "x", "hypervisor.clh"]
)


@given(
    tables=st.dictionaries(
        TABLES, st.dictionaries(st.sampled_from([*NAMES, *IGNORED["hypervisor"], "odd"]), VALUES, max_size=6)
    )
)
def test_any_keys_with_any_values_load_or_are_refused(
    shared_home: Path, tables: dict[str, dict[str, str]]
) -> None:
    tables.setdefault("hypervisor.qemu", {}).setdefault("kernel", f'"{shared_home}/vmlinuz.container"')
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{name} = {value}" for name, value in values.items())]
    loads_or_refuses(shared_home, "\n".join(lines).encode())


@pytest.mark.parametrize(
    ("vcpus", "maximum", "settled"),
    [
        (1.0, 0, (1.0, 4)),
        (0.0, 0, (1.0, 4)),
        (-1.0, 0, (4.0, 4)),
        (-1.0, 2, (2.0, 2)),
        (1.5, 2, (1.5, 2)),
        (2.5, 2, (2.0, 2)),
        (3.0, 100, (3.0, 4)),
    ],
)
def test_vcpus_are_settled_against_the_hosts(vcpus: float, maximum: int, settled: tuple[float, int]) -> None:
    config = Config(Path("/c"), HypervisorConfig(default_vcpus=vcpus, default_maxvcpus=maximum))
    hypervisor = settle(config, 4).hypervisor
    assert (hypervisor.default_vcpus, hypervisor.default_maxvcpus) == settled
    assert replace(hypervisor, default_vcpus=vcpus, default_maxvcpus=maximum) == config.hypervisor


def test_importing_the_configuration_stays_cheap() -> None:
    """The shim pays for it at each pod start: no trio, no protobuf, nothing that only an error needs."""
    program = "import sys, vc.config; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    heavy = {"trio", "asyncio", "google", "difflib", "json", "socket", "subprocess", "logging"}
    assert not heavy & set(run.stdout.split())
