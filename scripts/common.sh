# Sourced by scripts/demo, scripts/bench and scripts/test: what they share.
# shellcheck shell=bash
#
# They ask nothing, end only processes that they started (known by id and by their command line), and on failure say
# which step it was and leave their directory.

export LC_ALL=C
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scripts=$root/scripts
program=$(basename "$0")
current_step='starting'
begun=$SECONDS
# Rust by its own installer is not always on the PATH of a non-interactive shell.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

say() { echo "$program: $*" >&2; }
die() { say "$*"; exit 1; }

step() { current_step=$*; say "[$((SECONDS - begun)) s] $*"; }

# A step whose output matters only if it fails.
quietly() { # LOG COMMAND...
  local log=$1
  shift
  "$@" >"$log" 2>&1 </dev/null || { tail -n 30 "$log" >&2; die "'$*' failed; its output: $log"; }
}

# The packages of 'make build', so that the same features are built, and built once.
release_build() { # CARGO-OPTION...
  (cd "$root" && cargo build --release --quiet -p stillpoint -p stillpoint-plugin -p stillpoint-documents "$@") ||
    die "the build failed"
}

# 10.0 beside the system's where there is one (Debian 12), else the system's.
newest_qemu() {
  local beside=${STILLPOINT_QEMU_PREFIX:-/opt/stillpoint/qemu-10.0}/usr/bin/qemu-system-x86_64
  if [ -n "${STILLPOINT_QEMU:-}" ]; then echo "$STILLPOINT_QEMU"
  elif [ -x "$beside" ]; then echo "$beside"
  else command -v qemu-system-x86_64 || die "there is no QEMU: run scripts/install-deps"; fi
}

# ---- processes: a process is ours when its command line names our directory -----------------------------------------

is_ours() { # PID
  [ -n "${1:-}" ] && [ -n "${work:-}" ] && { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null | grep -qF -- "$work"
}

signal() { # SIGNAL PID...
  local name=$1 pid
  shift
  for pid; do
    if is_ours "$pid"; then kill -s "$name" "$pid" 2>/dev/null || true; fi
  done
}

wait_gone() { # SECONDS PID...
  local deadline=$((SECONDS + $1)) pid
  shift
  for pid; do
    while is_ours "$pid"; do
      [ $SECONDS -lt $deadline ] || return 1
      sleep 0.05
    done
  done
}

# SIGTERM, and SIGKILL for those that do not end.
end_processes() { # PID...
  signal TERM "$@"
  wait_gone 5 "$@" && return
  signal KILL "$@"
  wait_gone 5 "$@" || true
}

# Ends the QEMUs and helpers that still run from our directory, registered or not, but no other
# program there.
end_vms() {
  local dir pids=()
  for dir in /proc/[0-9]*; do
    case $(cat "$dir/comm" 2>/dev/null) in qemu-* | stillpoint*) is_ours "${dir#/proc/}" && pids+=("${dir#/proc/}") ;; esac
  done
  [ ${#pids[@]} = 0 ] || end_processes "${pids[@]}"
}

# ---- the witness -------------------------------------------------------------------------------------------------

# The last (or the first) line of progress, and a word of it: 'field step LINE'. The last line may be half written.
progress() { { tr -d '\r' <"$1"; } 2>/dev/null | sed -n 's/^.*\(WITNESS step=.* late=[0-9]*\)$/\1/p'; }
last_progress() { progress "$1" | tail -n 1; }
first_progress() { progress "$1" | head -n 1; }
field() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" <<<"$2"; }

# What a witness says that has found no fault in its RAM, its journals and its base image.
is_well() {
  [ -n "$1" ] && [ "$(field table "$1"),$(field journal "$1"),$(field base "$1"),$(field contradictions "$1")" = ok,ok,ok,0 ]
}

wait_progress() { # SERIAL SECONDS PID LOG
  local deadline=$((SECONDS + $2))
  until [ -n "$(last_progress "$1")" ]; do
    kill -0 "$3" 2>/dev/null || die "QEMU has ended before the guest spoke; it said: $(tail -n 3 "$4")"
    if grep -q 'WITNESS REFUSED' "$1" 2>/dev/null; then die "the guest says: $(grep 'WITNESS REFUSED' "$1")"; fi
    [ $SECONDS -lt $deadline ] || die "the guest said nothing within $2 s; its console: $1"
    sleep 0.1
  done
}

# ---- JSON as stillpoint prints it: one key to a line ------------------------------------------------------------------

number() { # KEY FILE
  local value
  value=$(sed -n "s/^ *\"$1\": \(-\{0,1\}[0-9][0-9.eE+-]*\),\{0,1\}\$/\1/p" "$2" | head -n 1)
  [ -n "$value" ] || die "there is no number '$1' in $2"
  echo "$value"
}
