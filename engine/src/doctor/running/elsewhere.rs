//! What another host must have, or its user must allow, so that the VM can be restored there.

use super::super::Row;
use qemu_cmdline::restorable::{self, Carried, Problem};
use qemu_cmdline::{Use, visit};
use vm::launch::arguments::QemuOption;

const CHECK: &str = "restore elsewhere needs";
const MAP: &str = "make it there, or name another by 'restore --map OLD=NEW'";

pub(super) fn check(options: &[QemuOption]) -> Vec<Row> {
    let mut rows = handed_over(options);
    visit(options, |site| {
        if site.means == Use::Tap {
            rows.push(Row::warn(
                CHECK,
                format!("a tap {}, or the right to make one", site.value),
                MAP,
            ));
        }
    });
    rows.extend(options.iter().filter_map(need));
    rows
}

/// What a restore refuses until its user names it.
fn handed_over(options: &[QemuOption]) -> Vec<Row> {
    // Files are judged by every checkpoint, which knows what it carries.
    let carried = Carried { is_disk: &|_| true, is_boot_file: &|_| true, is_qemus_own: &|_| true };
    let found = restorable::check(options, &carried).into_iter();
    // Logs and sockets are made in the restored VM's directory.
    let is_made =
        |problem| matches!(problem, Problem::Host(Use::Output | Use::Listen | Use::DataDirectory));
    let asked = found.filter(|finding| !is_made(finding.problem));
    asked
        .map(|finding| {
            Row::warn(
                CHECK,
                finding.to_string(),
                format!("restore --allow '{}', or --map", finding.allowance()),
            )
        })
        .collect()
}

fn need(option: &QemuOption) -> Option<Row> {
    match option.name.as_str() {
        "vnc" | "spice" if option.value() != "none" && !option.value().starts_with("unix:") => {
            Some(Row::warn(
                CHECK,
                format!("a free display port (-{} {})", option.name, option.value()),
                MAP,
            ))
        }
        "cpu" if option.keys().get_or_implied("model").is_some_and(|model| model == "host") => {
            let what = "a CPU like this host's (-cpu host)";
            Some(Row::warn(CHECK, what.to_owned(), "restore only on hosts of the same CPU model"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use vm::launch::arguments::parse;

    fn told(line: &str) -> String {
        let rows = check(&parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap());
        rows.iter().map(|row| format!("{}: {}\n", row.check, row.detail)).collect()
    }

    #[test]
    fn what_another_host_must_have_is_listed() {
        let cases = [
            ("-netdev tap,id=n,ifname=tap100i0,script=no,downscript=no", "a tap tap100i0"),
            (r#"-netdev {"type":"tap","id":"n","ifname":"vnet0","script":"no"}"#, "a tap vnet0"),
            ("-netdev tap,id=n,ifname=t,script=/var/lib/x", "script=/var/lib/x is a program"),
            ("-netdev bridge,id=n,br=br7", "br=br7 is a device of the host"),
            (r#"-object {"qom-type":"secret","id":"s","file":"/etc/key"}"#, "file=/etc/key"),
            ("-vnc 127.0.0.1:0", "a free display port"),
            ("-cpu host,migratable=on", "-cpu host"),
            ("-device usb-host,hostbus=1", "usb-host is a device of the host"),
            ("-chardev serial,id=c,path=/dev/ttyS0", "path=/dev/ttyS0 is a device of the host"),
            ("-chardev socket,id=c,path=/run/swtpm", "path=/run/swtpm is another process"),
        ];
        for (line, expected) in cases {
            assert!(told(line).contains(expected), "{line}: {}", told(line));
        }
    }

    #[test]
    fn what_is_everywhere_is_not_listed() {
        let line = "-netdev user,id=n -serial file:serial.log -qmp unix:/run/x.sock,server=on -object rng-random,id=r,filename=/dev/urandom -cpu qemu64 \
                    -chardev pty,id=p -vnc none -drive file=/dev/vg/lv,format=raw -L /usr/share/qemu -kernel /boot/vmlinuz";
        assert_eq!(told(line), "");
    }
}
