# Sourced by deploy/postcopy and deploy/test: makes .venv what the checkout needs.
#
# Everything comes from a lock of versions and hashes, through whatever package index pip is configured with. Debian
# ships Python without pip and without the means to put it into a new environment; then the wheel of pip that Debian
# packages is fetched with apt-get (as any user) and used from where it lies, so that nothing has to be installed.

postcopy_root=$(CDPATH= cd -- "$here/.." && pwd)
postcopy_venv=$postcopy_root/.venv

postcopy_lacks() {
    echo "postcopy: $1" >&2
    return 3
}

# What the installed state depends on; when this changes, it is made anew.
postcopy_state() {
    (cd "$postcopy_root" && cat "deploy/$1" pyproject.toml setup.py */limits.py */*/[!_]*.[ch] */*/*.cdef */*/build.py &&
        "$postcopy_python" -V && pwd) | cksum
}

postcopy_find_tools() {
    postcopy_python=
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            postcopy_python=$candidate
            break
        fi
    done
    [ -n "$postcopy_python" ] || postcopy_lacks "Python 3.11 or newer is missing: apt-get install python3" || return
    echo '#include <stdlib.h>' | "${CC:-cc}" -E - >/dev/null 2>&1 ||
        postcopy_lacks "a C compiler is missing: apt-get install gcc libc6-dev" || return
    postcopy_headers=$("$postcopy_python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$postcopy_headers/Python.h" ] ||
        postcopy_lacks "Python's headers are missing ($postcopy_headers/Python.h): apt-get install python3-dev" || return
}

# What is built lies in the checkout, so another user can use it but not make it; and it is not for others to remove.
postcopy_may_build() {
    { [ ! -e "$postcopy_venv" ] || [ -w "$postcopy_venv" ]; } && [ -w "$postcopy_root" ] ||
        postcopy_lacks "$postcopy_root is not yours to write and not built, or out of date: let its owner run $0 once"
}

# Says how to run pip inside .venv: pip of the environment, of the host, or the wheel that Debian packages.
postcopy_make_venv() {
    rm -rf "$postcopy_venv"
    if "$postcopy_python" -m venv "$postcopy_venv" >/dev/null 2>&1; then
        return
    fi
    rm -rf "$postcopy_venv"
    "$postcopy_python" -m venv --without-pip "$postcopy_venv" ||
        postcopy_lacks "python3 -m venv fails: apt-get install python3-venv" || return
    postcopy_wheel=$(ls /usr/share/python-wheels/pip-*.whl 2>/dev/null | tail -n 1)
    if [ -z "$postcopy_wheel" ]; then
        mkdir -p "$postcopy_venv/pip" && (
            cd "$postcopy_venv/pip" || exit
            apt-get download python3-pip-whl || { apt-get update && apt-get download python3-pip-whl; } || exit
            dpkg -x python3-pip-whl_*.deb .
        ) >/dev/null 2>&1
        postcopy_wheel=$(ls "$postcopy_venv"/pip/usr/share/python-wheels/pip-*.whl 2>/dev/null | tail -n 1)
    fi
    [ -n "$postcopy_wheel" ] ||
        postcopy_lacks "neither pip nor Debian's wheel of it can be had: apt-get install python3-venv" || return
    "$postcopy_venv/bin/python" "$postcopy_wheel/pip" install --quiet --no-index \
        --find-links "$(dirname "$postcopy_wheel")" pip ||
        postcopy_lacks "pip cannot be installed from $postcopy_wheel: apt-get install python3-venv"
}

postcopy_install() {
    postcopy_find_tools || return
    postcopy_stamp=$postcopy_venv/installed-$1
    postcopy_now=$(postcopy_state "$1")
    [ "$(cat "$postcopy_stamp" 2>/dev/null)" = "$postcopy_now" ] && return
    postcopy_may_build || return
    echo "postcopy: building and installing into .venv ..." >&2
    [ -x "$postcopy_venv/bin/python" ] && "$postcopy_venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        postcopy_make_venv || return
    postcopy_pip="$postcopy_venv/bin/python -m pip --disable-pip-version-check --quiet install"
    $postcopy_pip --require-hashes -r "$here/$1" ||
        postcopy_lacks "the locked packages of deploy/$1 could not be installed (see above)" || return
    rm -rf "$postcopy_root/build"
    $postcopy_pip --no-build-isolation --no-deps --editable "$postcopy_root" ||
        postcopy_lacks "the build failed (see above); a C compiler, libc6-dev and python3-dev are needed" || return
    rm -f "$postcopy_venv"/installed-*
    echo "$postcopy_now" >"$postcopy_stamp"
    # The development lock contains all of the other: what serves the tests serves the command.
    if [ "$1" = requirements-dev.txt ]; then
        postcopy_state requirements.txt >"$postcopy_venv/installed-requirements.txt"
    fi
}
