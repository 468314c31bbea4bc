//! QEMU: there, new enough, taking the plugin, and with which accelerator.

use super::Row;
use std::path::{Path, PathBuf};
use vm::error::VmError;
use vm::launch::qemu_binary::{self, QemuFacts};
use vm::launch::{accelerator, find_program, plugin_path};

const INSTALL: &str =
    "install QEMU (Debian: apt-get install qemu-system-x86), or name another by --qemu";

pub(super) fn check(name: &str) -> Vec<Row> {
    let (qemu, plugin) = (find_program(name), plugin_path());
    let mut rows = vec![
        found("QEMU", &qemu, INSTALL),
        found(
            "QEMU plugin",
            &plugin,
            "cargo build --release, or set STILLPOINT_PLUGIN to the file",
        ),
    ];
    if let (Ok(qemu), Ok(plugin)) = (&qemu, &plugin) {
        rows.push(accepts(qemu, plugin));
    }
    if let Ok(qemu) = &qemu {
        rows.push(accelerated(qemu));
    }
    rows
}

fn found(check: &'static str, place: &Result<PathBuf, VmError>, remedy: &str) -> Row {
    match place {
        Ok(path) => Row::ok(check, path.display().to_string()),
        Err(error) => Row::no(check, error.explain(), remedy),
    }
}

fn accepts(qemu: &Path, plugin: &Path) -> Row {
    const CHECK: &str = "QEMU takes the plugin";
    match qemu_binary::probe(qemu, plugin) {
        Ok(QemuFacts { version, machine_types }) => {
            Row::ok(CHECK, format!("version {version}, {} machine types", machine_types.len()))
        }
        Err(error) => Row::no(
            CHECK,
            one_line(&error.explain()),
            "use a QEMU 7.2 or later for x86_64 that is built with plugins (Debian's are)",
        ),
    }
}

/// KVM is faster, not necessary.
fn accelerated(qemu: &Path) -> Row {
    const CHECK: &str = "KVM";
    match accelerator::kvm_works(qemu) {
        Ok(()) => Row::ok(CHECK, "it runs a guest in long mode"),
        Err(why) => Row::warn(
            CHECK,
            format!("{why}; guests run under TCG, which is slower"),
            "give this user access to /dev/kvm; inside a VM, enable nested virtualization",
        ),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod test {
    use super::super::State;
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn script(directory: &Path, body: &str) -> PathBuf {
        let path = directory.join("qemu");
        let mut file = std::fs::File::create(&path).unwrap();
        write!(file, "#!/bin/sh\n{body}\n").unwrap();
        file.set_permissions(PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn qemu_without_plugins_is_distinguished_from_no_qemu() {
        let directory = tempfile::tempdir().unwrap();
        let plugin = directory.path().join("plugin.so");
        std::fs::write(&plugin, "").unwrap();
        let old = script(directory.path(), "echo 'qemu: -plugin: invalid option' >&2; exit 1");
        let row = accepts(&old, &plugin);
        assert_eq!(row.state, State::No);
        assert!(
            row.detail.contains("does not take Stillpoint's plugin")
                && row.detail.contains("invalid option"),
            "{row:?}"
        );

        let broken = script(directory.path(), "echo 'cannot open shared object' >&2; exit 127");
        let row = accepts(&broken, &plugin);
        assert!(
            row.state == State::No && row.detail.contains("cannot open shared object"),
            "{row:?}"
        );

        let rows = check("no-such-qemu-anywhere");
        assert!(
            rows[0].state == State::No && rows[0].detail.contains("no-such-qemu-anywhere"),
            "{rows:?}"
        );
        assert!(rows[0].remedy.is_some() && rows.iter().all(|row| row.check != "KVM"), "{rows:?}");
    }
}
