"""Everything that `ctr` can do with tasks, containers and `run`, and the test that shows it.

The tables name for each subcommand and each option the test that uses it, or why none can here. No client of
any generation has a subcommand or an option that they do not know, and the tests exist.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.test_e2e_generations import GENERATIONS

TESTS = Path(__file__).resolve().parents[1]
ALIASES = re.compile(r"^   ([a-z-]+)(?:, [a-z, -]+?)?(?:  .*)?$", re.MULTILINE)
OPTION = re.compile(r"^   (?:--)([a-z-]+)", re.MULTILINE)

# What begins with this stands for a reason, not for a test.
NOT = "not: "
CLIENT_ALONE = f"{NOT}the client refuses it for any other runtime than runc's"
FLAGS = "test_the_clients_flags_do_what_they_do_on_runc"
LEFT = "test_a_root_of_another_snapshotter_and_what_is_left_of_the_flags"
DRESSED = "test_the_client_is_told_of_a_container_what_it_was_created_with"
OWN_ROOT = "test_a_root_of_the_client_in_a_network_namespace_of_the_client"
LATER = "test_what_the_flags_that_came_after_1_6_are_in_the_container"
CHECKPOINT = "test_a_checkpoint_has_the_files_of_a_container_that_goes_on"
REFUSED = "test_checkpoints_are_refused_in_words_and_end_nothing"
LOGGED = "test_the_output_of_a_started_task_is_in_its_log"
USER_NAMESPACE = "test_a_user_namespace_is_refused_in_words"

# `ctr run`; those of `ctr container create` are among them.
RUN: Mapping[str, str] = {
    "allow-new-privs": FLAGS,
    "annotation": DRESSED,
    "apparmor-default-profile": f"{NOT}the client reads the profiles of the host's AppArmor first",
    "apparmor-profile": "test_what_names_the_host_is_taken_away",
    "blockio-class": f"{NOT}the client reads the classes of a file of the host's disks first",
    "blockio-config-file": f"{NOT}as blockio-class",
    "cap-add": FLAGS,
    "cap-drop": FLAGS,
    "cgroup": OWN_ROOT,
    "cni": f"{NOT}the client makes a network of the host's configuration, and a VM is given none yet",
    "config": "test_a_container_is_what_a_file_says",
    "cpu-period": "test_metrics_tell_limits_and_use",
    "cpu-quota": "test_a_process_that_wants_more_cpu_time_than_it_may_have_is_throttled",
    "cpu-shares": OWN_ROOT,
    "cpus": FLAGS,
    "cpuset-cpus": LATER,
    "cpuset-mems": LATER,
    "cwd": FLAGS,
    "detach": "test_detached_and_deleted_later",
    "device": FLAGS,
    "env": FLAGS,
    "env-file": "test_what_the_flags_are_in_the_container",
    "fifo-dir": OWN_ROOT,
    "gidmap": USER_NAMESPACE,
    "gpus": f"{NOT}the client runs a program of the maker of the card first",
    "hostname": LATER,
    "label": DRESSED,
    "log-uri": "test_a_log_file_gets_both_outputs_and_is_appended_to",
    "memory-limit": FLAGS,
    "mount": FLAGS,
    "net-host": LEFT,
    "no-pivot": OWN_ROOT,
    "null-io": "test_the_null_io_of_a_detached_container_needs_no_client",
    "pid-file": "test_the_pid_file_holds_what_the_lists_say",
    "platform": LEFT,
    "privileged": "test_what_the_flags_are_in_the_container",
    "privileged-without-host-devices": LATER,
    "rdt-class": "test_what_names_the_host_is_taken_away",
    "read-only": FLAGS,
    "remap-labels": USER_NAMESPACE,
    "rm": "test_both_outputs_and_the_exit_status_arrive",
    "rootfs": OWN_ROOT,
    "rootfs-propagation": LEFT,
    "runc-binary": CLIENT_ALONE,
    "runc-root": LEFT,
    "runc-systemd-cgroup": CLIENT_ALONE,
    "runtime": "test_both_outputs_and_the_exit_status_arrive",
    "runtime-config-path": "test_the_runtime_options_name_the_configuration",
    "sandbox": "test_a_sandbox_of_the_client_is_there_before_and_after_its_containers",
    "seccomp": FLAGS,
    "seccomp-profile": LEFT,
    "snapshotter": LEFT,
    "snapshotter-label": LEFT,
    "sync-fs": LATER,
    "tty": "test_a_terminal_carries_input_output_and_size",
    "uidmap": USER_NAMESPACE,
    "user": LATER,
    "with-ns": OWN_ROOT,
}
COMMANDS: Mapping[str, Mapping[str, str]] = {
    "run": RUN,
    "container create": RUN,
    "container delete": {"keep-snapshot": "test_a_container_is_what_a_file_says"},
    "container info": {"spec": "test_a_container_is_what_a_file_says"},
    "container list": {"quiet": "test_a_container_without_a_task_is_listed_and_deleted"},
    "container label": {"": DRESSED},
    "container checkpoint": {"rw": CHECKPOINT, "image": CHECKPOINT, "task": REFUSED},
    "container restore": {"rw": CHECKPOINT, "live": CHECKPOINT},
    "task attach": {"": "test_stdin_survives_its_clients_and_ends_when_it_is_closed"},
    "task checkpoint": {"exit": REFUSED, "image-path": REFUSED, "work-path": REFUSED},
    "task delete": {
        "force": "test_forced_deletion_ends_what_runs_and_leaves_nothing",
        "exec-id": "test_a_detached_exec_outlives_its_client_and_is_deleted_by_its_id",
    },
    "task exec": {
        "cwd": "test_the_flags_of_an_exec",
        "detach": "test_a_detached_exec_outlives_its_client_and_is_deleted_by_its_id",
        "exec-id": "test_an_exec_id_that_is_in_use_is_refused",
        "fifo-dir": "test_exit_statuses_arrive",
        "log-uri": "test_a_detached_exec_outlives_its_client_and_is_deleted_by_its_id",
        "tty": "test_a_terminal_of_an_exec",
        "user": "test_the_flags_of_an_exec",
    },
    "task kill": {
        "all": "test_a_signal_to_all_processes_ends_execs_and_container",
        "exec-id": "test_a_signal_from_outside_reaches_the_exec_alone",
        "signal": "test_a_signal_has_a_number_and_two_names",
    },
    "task list": {"quiet": "test_the_pid_file_holds_what_the_lists_say"},
    "task metrics": {"format": "test_metrics_are_those_of_the_container"},
    "task pause": {"": "test_a_paused_container_stands_still"},
    "task ps": {"": "test_pids_are_those_of_live_processes_of_the_host"},
    "task resume": {"": "test_a_paused_container_stands_still"},
    "task start": {
        "detach": LOGGED,
        "fifo-dir": "test_a_container_is_what_a_file_says",
        "log-uri": LOGGED,
        "no-pivot": LOGGED,
        "null-io": "test_a_signal_to_all_processes_ends_execs_and_container",
        "pid-file": "test_the_pid_file_holds_what_the_lists_say",
    },
}


@pytest.fixture(params=["here", *GENERATIONS])
def client(request: pytest.FixtureRequest) -> str:
    """The client of this machine, and those of the other generations."""
    if request.param == "here":
        return "ctr"
    path: Path = request.param.programs / "ctr"
    if not path.exists():
        request.param.skip(f"run scripts/fetch_containerd {request.param.suite}")
    return str(path)


def help_of(client: str, command: str) -> str:
    argv = [client, *command.split(), "--help"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def commands_of(client: str) -> Iterator[str]:
    yield "run"
    for group in ("container", "task"):
        listed = help_of(client, f"{group}s").partition("COMMANDS:")[2].partition("OPTIONS:")[0]
        yield from (f"{group} {name}" for name in ALIASES.findall(listed) if name != "help")


def options_of(client: str, command: str) -> set[str]:
    return set(OPTION.findall(help_of(client, command).partition("OPTIONS:")[2])) - {"help"}


def test_each_subcommand_and_each_option_has_its_test(client: str) -> None:
    commands = set(commands_of(client))
    assert len(commands) > 15
    assert commands == COMMANDS.keys()
    unknown = {command: options_of(client, command) - COMMANDS[command].keys() for command in commands}
    assert not any(unknown.values()), unknown


def test_the_tests_that_the_tables_name_exist() -> None:
    named = {told for table in COMMANDS.values() for told in table.values() if not told.startswith(NOT)}
    sources = [path.read_text() for path in TESTS.rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)\(", source)}
    assert named - defined == set()
