#!/bin/sh
# QEMU as a program, for tests: what starts it and what asks for its version find what they want.
#
# A VM is its memory with the plugin in it (`stand-in`), at the other end of two pipes that a test
# has made (src/program.rs): three directories above the plugin's socket, in `qemu/`.
case " $* " in
*" -machine none "*)
  version='{"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "scripted"}'
  type='{"name": "pc-q35-10.0", "alias": "q35", "default-ram-id": "pc.ram", "is-default": true}'
  echo '{"QMP": {"version": '"$version"', "capabilities": []}}'
  while read -r line; do
    case $line in
    *query-machines*) echo '{"return": ['"$type"']}' ;;
    *quit*) exit 0 ;;
    *) echo '{"return": {}}' ;;
    esac
  done
  exit 0
  ;;
esac

for word; do
  case $word in
  file=*,socket=*,ramfd=*)
    plugin=${word#file=} plugin=${plugin%%,socket=*}
    socket=${word#*,socket=} socket=${socket%,ramfd=*}
    ram=${word##*=}
    ;;
  memory-backend-file,*size=*)
    bytes=${word#*size=} bytes=${bytes%%B,*}
    ;;
  esac
done
here=${socket%/*/*/*}/qemu
exec <"$here/in" >"$here/out" || exit 1
echo "$$ $ram $((bytes / 4096)) $#"
printf '%s\n' "$@"
if [ -e "$here/refusal" ]; then
  cat "$here/refusal" >&2
  exit 1
fi
# Its disks are open in it.
number=3
for word; do
  case $word in
  *if=none*,file=*)
    file=${word#*,file=} file=${file%%,*}
    [ "$number" != "$ram" ] || number=$((number + 1))
    eval "exec $number<\"\$file\""
    number=$((number + 1))
    ;;
  esac
done
exec "$here/stand-in" "$plugin" "$socket" "$ram" $((bytes / 4096)) 16 "$@"
