# shellcheck shell=bash
# What the scripts in this directory share: sourced by them, never run.
#
# Everything is found from the repository's root, nothing from the caller's Python: the virtual environment is made
# by Debian's own interpreter, whatever `python3` means on the caller's PATH.
#
#   KATA_VENV   the virtual environment        (default: .venv at the root)
#   KATA_OUT    what is built                  (default: build at the root)

set -euo pipefail
export LC_ALL=C
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=${KATA_VENV:-$ROOT/.venv}
OUT=${KATA_OUT:-$ROOT/build}
export KATA_OUT=$OUT
ME=$(basename "$0")

fail() {
    printf '%s: %s\n' "$ME" "$*" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || fail "needs root (it installs packages, mounts and starts containerd): run it as root"
}

# step TITLE COMMAND...: run COMMAND quietly and print one line with its duration; all of its output if it fails.
# A failure ends the script, or with KEEP_GOING=1 is counted in FAILURES.
FAILURES=0
step() {
    local title=$1 began=${EPOCHREALTIME/./} log status=0 elapsed
    shift
    log=$(mktemp)
    # Not `"$@" || status=$?`: behind || bash ignores -e in everything that is called.
    set +e
    (set -e && "$@") 3>&2 >"$log" 2>&1 9>&-
    status=$?
    set -e
    elapsed=$((${EPOCHREALTIME/./} - began))
    printf '%-60s %3d.%d s\n' "$title" $((elapsed / 1000000)) $((elapsed / 100000 % 10))
    if [ "$status" != 0 ]; then
        cat "$log" >&2
        rm -f "$log"
        [ "${KEEP_GOING:-0}" = 1 ] || fail "\"$title\" failed with status $status; its output is above"
        FAILURES=$((FAILURES + 1))
        return 0
    fi
    rm -f "$log"
}

# tell TEXT: a line for the user from within a step, whose own output is only shown if it fails.
tell() {
    printf '%s\n' "$*" >&3
}

# What the host must have: a Debian package and a file that proves it is there.
HOST_PACKAGES="
    busybox-static:/bin/busybox
    ca-certificates:/etc/ssl/certs/ca-certificates.crt
    containerd:containerd
    cpio:cpio
    crun:crun
    erofs-utils:mkfs.erofs
    iproute2:ip
    mount:mount
    python3:/usr/bin/python3
    python3-venv:/usr/lib/python3*/ensurepip/__init__.py
    qemu-system-common:/usr/lib/qemu/virtiofsd
    qemu-system-x86:qemu-system-x86_64
    runc:runc
    util-linux:setpriv
"

is_present() {
    case $1 in
    /*) compgen -G "$1" >/dev/null ;;
    *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

missing_packages() {
    local entry
    for entry in $HOST_PACKAGES; do
        is_present "${entry#*:}" || printf '%s\n' "${entry%%:*}"
    done
}

# Install what is missing and nothing else. Installing containerd would start a system-wide daemon, which nothing
# here needs: for the time of the installation a policy forbids it (deb-systemd-invoke and invoke-rc.d obey it).
# A containerd that is already there is neither touched nor restarted.
install_packages() {
    local missing policy=/usr/sbin/policy-rc.d
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "missing: $(echo $missing); no apt-get here: install them by hand"
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        # shellcheck disable=SC2064
        trap "rm -f '$policy'" EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=300 update
    # shellcheck disable=SC2086
    apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $missing
    missing=$(missing_packages)
    [ -z "$missing" ] || fail "still missing after installing the packages: $(echo $missing)"
}

# make_venv LOCK...: a virtual environment with exactly the locked packages. The stamp holds what was installed.
make_venv() {
    local stamp=$VENV/.installed wanted lock args=()
    wanted=$(cd "$ROOT" && sha256sum "$@" && /usr/bin/python3 -VV && printf '%s\n' "$VENV")
    [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return 0
    for lock in "$@"; do args+=(-r "$ROOT/$lock"); done
    rm -rf "$VENV"
    /usr/bin/python3 -m venv "$VENV"
    "$VENV/bin/python3" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        --only-binary :all: "${args[@]}"
    link_project
    printf '%s\n' "$wanted" >"$stamp"
}

# What an editable installation would leave, without what builds one: the packages stay where they are, and the
# distribution has a name and a version.
link_project() {
    local packages version
    packages=$(echo "$VENV"/lib/python3*/site-packages)
    version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$ROOT/pyproject.toml")
    printf '%s\n' "$ROOT" >"$packages/pykata.pth"
    mkdir -p "$packages/pykata-$version.dist-info"
    printf 'Metadata-Version: 2.1\nName: pykata\nVersion: %s\n' "$version" >"$packages/pykata-$version.dist-info/METADATA"
    printf 'scripts\n' >"$packages/pykata-$version.dist-info/INSTALLER"
}

# The developers' environment satisfies the users' too: the smaller one is only made where there is none.
make_runtime_venv() {
    if [ -e "$VENV/.installed" ] && grep -q requirements-dev.txt "$VENV/.installed"; then
        make_venv requirements.txt requirements-dev.txt
    else
        make_venv requirements.txt
    fi
}

make_dev_venv() {
    make_venv requirements.txt requirements-dev.txt
}

# One build at a time in one tree: whoever comes second waits, and then finds everything done.
lock_tree() {
    mkdir -p "$OUT"
    exec 9>"$OUT/.lock"
    flock 9
}

unlock_tree() {
    exec 9>&-
}

# make_commands [DIR [CODE [PYTHON]]]: the commands, as small files in DIR (default: bin of the build) that run the
# packages in CODE with PYTHON. They leave the `site` module out (-S) and put the two directories on sys.path
# themselves: a shim is started for each container, and that is a fifth of the time its interpreter needs to start.
# /bin/sh stands between because a #! line can hold neither blanks nor a long path.
make_commands() {
    local dir=${1:-$OUT/bin} code=${2:-$ROOT} python=${3:-$VENV/bin/python3} packages
    packages=$(echo "$(dirname "$(dirname "$python")")"/lib/python3*/site-packages)
    mkdir -p "$dir"
    make_command "$dir/containerd-shim-kata-v2" "$python" "$code" "$packages" shim.__main__
    make_command "$dir/kata-runtime" "$python" "$code" "$packages" cli.__main__
}

make_command() {
    local file=$1 python=$2 code=$3 packages=$4 module=$5
    cat >"$file.new" <<END
#!/bin/sh
''':'
exec '$python' -I -S -W ignore "\$0" "\$@"
'''
import sys
sys.path[1:1] = [$(printf "'%s', '%s'" "$code" "$packages")]
from $module import main
sys.exit(main())
END
    chmod 755 "$file.new"
    cmp -s "$file.new" "$file" && rm "$file.new" || mv "$file.new" "$file"
}

# The containerds of other Debian suites. One that cannot be had is reported here, and its tests say so too.
fetch_generations() {
    local suite
    for suite in trixie sid; do
        KEEP_GOING=1 step "containerd of Debian $suite" \
            "$ROOT/scripts/fetch_containerd" "$suite" --out "$OUT/containerd"
    done
}

# What the guest is made from: its recipe, and the parts of this tree that it carries.
guest_inputs() {
    (cd "$ROOT" && find scripts/build_guest scripts/guest agent ttrpc yamux protos/kata protos/ttrpc \
        -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum)
    printf '%s\n' "$OUT"
}

# Build the guest if one of its inputs has changed since, or if it is not there.
build_guest() {
    local stamp=$OUT/guest.inputs wanted
    wanted=$(guest_inputs)
    if [ -e "$OUT/configuration.toml" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    rm -f "$stamp"
    # The packages of the guest come through apt, which has no lists on a machine that needed no package above.
    if command -v apt-cache >/dev/null && ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
        apt-get -q -o DPkg::Lock::Timeout=300 update
    fi
    # The environment's interpreter: it has pip, for the guest's wheels.
    "$VENV/bin/python3" "$ROOT/scripts/build_guest" --out "$OUT"
    printf '%s\n' "$wanted" >"$stamp"
}
