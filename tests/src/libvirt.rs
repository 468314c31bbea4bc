//! A real libvirt for one test, by `scripts/libvirt-dev`, and a domain in it whose guest is the
//! witness.

use crate::built::{built, project};
use crate::guest::{Guest, TIMEOUT};
use crate::lab::Lab;
use crate::process::{self, Pid, wait_until};
use crate::recipe::Recipe;
use std::ops::Deref;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const HOOK: &str = "etc/hooks/qemu";

/// Whom the QEMUs of Debian's libvirt run as.
const ACCOUNT: &str = "libvirt-qemu";

/// Down again when dropped, with all of its domains.
pub struct Libvirt<'lab> {
    lab: &'lab Lab,
    directory: PathBuf,
    uri: String,
    /// The owner of what QEMU and the helper use, if that is not root.
    owner: Option<u32>,
}

impl<'lab> Libvirt<'lab> {
    /// QEMU and the helper run as root.
    pub fn up(lab: &'lab Lab) -> Self {
        Self::up_as(lab, "root")
    }

    /// As on a host: QEMU and the helper have an account of their own, without a single privilege,
    /// and the helper is attached by `scripts/libvirt-hook` for each domain that
    /// [`Self::configure`] has configured.
    pub fn up_with_hook(lab: &'lab mut Lab) -> Self {
        lab.set("STILLPOINT_CACHE_DIR", lab.path().join("cache").display().to_string());
        install_hook(lab, &lab.path().join("libvirt").join(HOOK));
        let mut libvirt = Self::up_as(lab, ACCOUNT);
        let accounts = std::fs::read_to_string(libvirt.directory.join("passwd"))
            .expect("scripts/libvirt-dev wrote it");
        let line = accounts
            .lines()
            .find(|line| line.starts_with(&format!("{ACCOUNT}:")))
            .expect("libvirt runs with it");
        libvirt.owner = line.split(':').nth(2).and_then(|number| number.parse().ok());
        libvirt.give(lab.path());
        libvirt
    }

    fn up_as(lab: &'lab Lab, user: &str) -> Self {
        let mut libvirt =
            Self { lab, directory: lab.path().join("libvirt"), uri: String::new(), owner: None };
        libvirt.uri = libvirt.dev_up(&["--user", user]);
        libvirt
    }

    pub fn lab(&self) -> &'lab Lab {
        self.lab
    }

    fn dev_up(&self, words: &[&str]) -> String {
        let output = self.dev(&[&["up"], words].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "these tests need root and a libvirt: scripts/install-deps. It said: {said}"
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Lets QEMU's account have it.
    fn give(&self, path: &Path) {
        if self.owner.is_some() {
            chown(path, self.owner, None).expect("the test's directory");
        }
    }

    /// The configuration of a domain for the hook; `text` is besides what every domain needs.
    pub fn configure(&self, name: &str, text: &str) {
        let monitor = monitor(&self.lab.path().join(name));
        let common = format!(
            "STILLPOINT_USER={ACCOUNT}\nSTILLPOINT_QMP={}\nSTILLPOINT_STORE={}\n",
            monitor.display(),
            self.lab.store()
        );
        std::fs::write(configuration(self.lab).join(format!("{name}.conf")), common + text)
            .expect("the test's directory");
    }

    /// What the hook has said of a domain; nothing, if it was not concerned.
    pub fn hook_log(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(configuration(self.lab).join(format!("{name}.log"))).ok()
    }

    /// Stillpoint's plugin for QEMU, where that QEMU can read it.
    pub fn plugin(&self) -> PathBuf {
        configuration(self.lab).join("libstillpoint_plugin.so")
    }

    fn dev(&self, words: &[&str]) -> Output {
        let mut command = Command::new(project().join("scripts/libvirt-dev"));
        command.arg(words[0]).arg("--dir").arg(&self.directory).args(&words[1..]);
        command.output().expect("scripts/libvirt-dev can be run")
    }

    /// virsh, connected to this libvirt; what it said. Panics if it fails.
    pub fn virsh(&self, words: &[&str]) -> String {
        let output = Command::new("virsh")
            .args(["-q", "-c", &self.uri])
            .args(words)
            .output()
            .expect("virsh can be run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "virsh {words:?}: {said}{}", self.log());
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Starts a domain. `more` are further arguments for QEMU.
    pub fn start(&self, name: &str, shape: Shape, more: &[String]) -> Domain<'_> {
        let directory = self.lab.path().join(name);
        std::fs::create_dir_all(&directory).expect("the test's directory");
        // For the guest's files alone: the domain's XML says the rest.
        Recipe::witness("q35-virtio.cfg").furnish(&self.lab.qemu, &directory);
        if self.owner.is_some() {
            self.give(&directory);
            for file in ["vmlinuz", "initrd.img", "base.qcow2"] {
                copy_in_place(&directory.join(file));
            }
        }
        let xml = directory.join("domain.xml");
        std::fs::write(&xml, domain_xml(&self.lab.qemu, name, &directory, shape, more))
            .expect("the test's directory");
        self.virsh(&["define", xml.to_str().expect("UTF-8")]);
        self.virsh(&["start", name]);
        let pid = std::fs::read_to_string(self.directory.join(format!("run/qemu/{name}.pid")))
            .expect("libvirt wrote it");
        let logs = vec![
            self.directory.join(format!("log/qemu/{name}.log")),
            self.lab.runtime().join(name).join("helper.log"),
        ];
        let mut guest = Guest::new(name, directory, &self.lab.qemu, logs);
        guest.qemu = Pid::from_raw(pid.trim().parse().expect("a process id"));
        Domain { guest, libvirt: self }
    }

    /// Its daemon is killed and another started, as by an upgrade; domains run on.
    pub fn restart(&self) {
        let text = std::fs::read_to_string(self.directory.join("libvirtd.pid"))
            .expect("libvirtd wrote it");
        let pid = Pid::from_raw(text.trim().parse().expect("a process id"));
        assert!(process::is_ours(pid, Path::new("libvirtd")), "{pid} is another's");
        process::kill_hard(pid);
        self.dev_up(&["--user", if self.owner.is_some() { ACCOUNT } else { "root" }]);
    }

    fn log(&self) -> String {
        let text =
            std::fs::read_to_string(self.directory.join("log/libvirtd.log")).unwrap_or_default();
        text.lines().rev().take(5).collect::<Vec<_>>().join("\n")
    }
}

/// Where the hook, its log and its programs are.
fn configuration(lab: &Lab) -> PathBuf {
    lab.path().join("conf")
}

/// What stands in `/etc/libvirt/hooks/qemu` here: the real one, told where this lab has its things.
/// The account of QEMU may not be able to reach what was built, so copies of that stand beside the
/// configuration.
fn install_hook(lab: &Lab, path: &Path) {
    let conf = configuration(lab);
    std::fs::create_dir_all(&conf).expect("the test's directory");
    for file in ["stillpoint", "libstillpoint_plugin.so"] {
        std::fs::copy(built().with_file_name(file), conf.join(file)).expect("it was built");
    }
    let command = lab.command(&[]);
    let variables =
        command.get_envs().filter_map(|(name, value)| Some((name.to_str()?, value?.to_str()?)));
    let variables: String =
        variables.map(|(name, value)| format!("export {name}='{value}'\n")).collect();
    let (hook, conf) = (project().join("scripts/libvirt-hook"), conf.display());
    let text = format!(
        "#!/bin/sh\n{variables}export PATH='{conf}':\"$PATH\" STILLPOINT_CONFIG_DIR='{conf}' STILLPOINT_LOG_DIR='{conf}'\n\
         exec '{}' \"$@\"\n",
        hook.display()
    );
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("the test's directory");
    std::fs::write(path, text).expect("the test's directory");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("the test's directory");
}

/// A file of one's own instead of a link into the cache.
fn copy_in_place(path: &Path) {
    let original = path.canonicalize().expect("the guest's files");
    std::fs::remove_file(path).expect("the test's directory");
    std::fs::copy(original, path).expect("the test's directory");
}

impl Drop for Libvirt<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- libvirt has said:\n{}\n---", self.log());
        }
        let output = self.dev(&["down"]);
        assert!(
            output.status.success() || std::thread::panicking(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// What the owner of a domain may have chosen.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// `<memoryBacking>` with a shared memfd.
    pub shared_memory: bool,
}

/// A running domain.
pub struct Domain<'a> {
    guest: Guest,
    libvirt: &'a Libvirt<'a>,
}

impl Deref for Domain<'_> {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl Domain<'_> {
    /// The second monitor, which `<qemu:commandline>` gives it.
    pub fn monitor(&self) -> PathBuf {
        monitor(&self.directory)
    }

    pub fn state(&self) -> String {
        self.libvirt.virsh(&["domstate", &self.name])
    }

    /// The helper's process, if it runs.
    pub fn helper(&self) -> Option<Pid> {
        let runtime = self.libvirt.lab.runtime();
        let text = std::fs::read_to_string(runtime.join(&self.name).join("helper.pid")).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        (process::is_running(pid) && process::is_ours(pid, &runtime)).then_some(pid)
    }

    /// Through libvirt, as its owner would; QEMU is gone afterwards.
    pub fn destroy(&self) {
        self.libvirt.virsh(&["destroy", &self.name]);
        let gone = wait_until(TIMEOUT, || !self.qemu_runs());
        assert!(gone, "{} does not end", self.name);
    }
}

pub(crate) fn monitor(directory: &Path) -> PathBuf {
    directory.join("stillpoint.qmp")
}

/// As people have them (docs/libvirt.md), but for the accelerator and the kernel from a file.
fn domain_xml(qemu: &Path, name: &str, directory: &Path, shape: Shape, more: &[String]) -> String {
    let memory = if shape.shared_memory {
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
    } else {
        ""
    };
    let extra = format!("unix:{},server=on,wait=off", directory.join("extra.sock").display());
    let monitor = format!("unix:{},server=on,wait=off", monitor(directory).display());
    let words = ["-qmp", &monitor, "-qmp", &extra].map(str::to_owned);
    let arguments: String =
        words.iter().chain(more).map(|word| format!("<qemu:arg value='{word}'/>\n    ")).collect();
    let (directory, qemu) = (directory.display(), qemu.display());
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  {memory}
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{directory}/vmlinuz</kernel>
    <initrd>{directory}/initrd.img</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 witness.base=/dev/vda witness.journal=/dev/vda,/dev/vdb witness.table_mib=12 \
witness.check=6144</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>{qemu}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{directory}/overlay.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='{directory}/data.raw'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='file'><source path='{directory}/serial.log'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
  <qemu:commandline>
    {arguments}</qemu:commandline>
</domain>
"
    )
}
