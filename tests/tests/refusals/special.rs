//! Cases for which a command line and QMP commands do not do.

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use stillpoint_tests::{Lab, QmpClient, Ran, assert_root, major_version, wait_until};

const UNPRIVILEGED_UID: &str = "65534";
const START: Duration = Duration::from_secs(40);

/// A QEMU whose guest is not started; ended when dropped.
struct External {
    child: Child,
    directory: PathBuf,
}

impl Drop for External {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl External {
    fn start(lab: &Lab, name: &str, words: &str) -> Self {
        let directory = lab.path().join(name);
        let copied =
            Command::new("cp").arg("-r").arg(lab.path().join("templates")).arg(&directory).status();
        assert!(copied.is_ok_and(|status| status.success()), "cannot copy the templates");
        let log = File::create(directory.join("qemu.out")).expect("the lab");
        let mut command = Command::new(&lab.qemu);
        command.args(super::BASE.split_whitespace()).args([
            "-S",
            "-qmp",
            "unix:sp.qmp,server=on,wait=off",
            "-qmp",
            "unix:own.qmp,server=on,wait=off",
        ]);
        command.args(words.split_whitespace());
        command
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log);
        let mut external = Self { child: command.spawn().expect("QEMU can be run"), directory };
        let own = external.directory.join("own.qmp");
        let up = wait_until(START, || {
            // Not by a connection, which may come while two threads of QEMU serve the socket.
            external.child.try_wait().expect("a child").is_some() || own.exists()
        });
        let said = std::fs::read_to_string(external.directory.join("qemu.out")).unwrap_or_default();
        assert!(up && external.child.try_wait().expect("a child").is_none(), "{words}: {said}");
        // It answers when it has opened its files, which is after it has opened its monitors.
        drop(QmpClient::connect(&own));
        external
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("sp.qmp")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn attach(&self, lab: &Lab, name: &str) -> Ran {
        lab.run(&["attach", "--qmp", text(&self.socket()), "--name", name])
    }

    /// The same by a program that runs others.
    fn attach_by(&self, lab: &Lab, name: &str, program: &[&str]) -> Ran {
        let inner = lab.command(&["attach", "--qmp", text(&self.socket()), "--name", name]);
        let mut outer = Command::new(program[0]);
        outer
            .args(&program[1..])
            .arg(inner.get_program())
            .args(inner.get_args())
            .current_dir(lab.path());
        let set =
            |(name, value): (&OsStr, Option<&OsStr>)| Some((name.to_owned(), value?.to_owned()));
        outer.env_remove("STILLPOINT_NAME").envs(inner.get_envs().filter_map(set));
        Ran::of(outer, &program.join(" "))
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

pub(super) fn other_namespace(lab: &Lab, name: &str) -> Option<Ran> {
    assert_root("running a command in another namespace");
    let unshare = ["unshare", "--pid", "--fork", "--kill-child"];
    Some(External::start(lab, name, "").attach_by(lab, name, &unshare))
}

/// It sees its own directory alone.
pub(super) fn other_root(lab: &Lab, name: &str) -> Option<Ran> {
    assert_root("changing the root directory of a QEMU");
    let option = if major_version(&lab.qemu) >= 9 { "-run-with chroot=." } else { "-chroot ." };
    Some(External::start(lab, name, option).attach(lab, name))
}

/// One who may connect to the monitor, and may not look at its process.
pub(super) fn other_user(lab: &Lab, name: &str) -> Option<Ran> {
    assert_root("running a command as another user");
    let external = External::start(lab, name, "");
    let allow = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("the lab")
    };
    allow(lab.path(), 0o711);
    allow(&external.directory, 0o711);
    allow(&external.socket(), 0o777);
    Some(external.attach_by(
        lab,
        name,
        &["setpriv", "--reuid", UNPRIVILEGED_UID, "--regid", UNPRIVILEGED_UID, "--clear-groups"],
    ))
}

pub(super) fn preconfig(lab: &Lab, name: &str) -> Option<Ran> {
    Some(External::start(lab, name, "-preconfig").attach(lab, name))
}

pub(super) fn network_descriptor(lab: &Lab, name: &str) -> Option<Ran> {
    let (inside, _outside) = UnixStream::pair().expect("two sockets");
    fcntl(&inside, FcntlArg::F_SETFD(FdFlag::empty())).expect("a socket");
    let words = format!("-netdev socket,id=n,fd={} -device e1000,netdev=n", inside.as_raw_fd());
    Some(External::start(lab, name, &words).attach(lab, name))
}

pub(super) fn kernel_removed(lab: &Lab, name: &str) -> Option<Ran> {
    let external = External::start(lab, name, "-fw_cfg name=opt/x/c,file=blob.bin");
    std::fs::remove_file(external.file("blob.bin")).expect("the lab");
    Some(external.attach(lab, name))
}

/// A bare name may be a file that comes with QEMU, as the other one is.
pub(super) fn option_rom_removed(lab: &Lab, name: &str) -> Option<Ran> {
    let external = External::start(lab, name, "-option-rom blob.bin -bios bios-256k.bin");
    let is_carried = external.attach(lab, name);
    assert_eq!(is_carried.code, 0, "{is_carried:?}");
    std::fs::remove_file(external.file("blob.bin")).expect("the lab");
    let refused = lab.run(&["checkpoint", name]);
    assert!(!format!("{refused:?}").contains("bios-256k.bin"), "{refused:?}");
    Some(refused)
}

pub(super) fn configuration_removed(lab: &Lab, name: &str) -> Option<Ran> {
    let external = External::start(lab, name, "-readconfig vm.cfg");
    std::fs::remove_file(external.file("vm.cfg")).expect("the lab");
    Some(external.attach(lab, name))
}

const CHAIN: &str =
    "-drive file=cow.qcow2,format=qcow2,if=none,id=c -device virtio-blk-pci,drive=c";

fn attach_and_checkpoint(external: &External, lab: &Lab, name: &str) -> Option<Ran> {
    let attached = external.attach(lab, name);
    if attached.code == 0 { Some(lab.run(&["checkpoint", name])) } else { Some(attached) }
}

pub(super) fn layer_renamed(lab: &Lab, name: &str) -> Option<Ran> {
    let external = External::start(lab, name, CHAIN);
    std::fs::rename(external.file("base.raw"), external.file("moved.raw")).expect("the lab");
    attach_and_checkpoint(&external, lab, name)
}

pub(super) fn layer_replaced(lab: &Lab, name: &str) -> Option<Ran> {
    let external = External::start(lab, name, CHAIN);
    std::fs::rename(external.file("base.raw"), external.file("moved.raw")).expect("the lab");
    std::fs::rename(external.file("other.raw"), external.file("base.raw")).expect("the lab");
    attach_and_checkpoint(&external, lab, name)
}
