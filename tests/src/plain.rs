//! External VMs: attached by their monitor, and adopted into a managed QEMU while they run.

use crate::lab::Ran;
use crate::process::{self, Pid};
use crate::vm::TestVm;

impl TestVm<'_> {
    /// The first helper of a plain VM.
    pub fn attach_plain(&self, words: &[&str]) {
        self.attach_plain_with(words, &[]);
    }

    pub fn attach_plain_with(&self, words: &[&str], environment: &[(&str, &str)]) {
        let ran = self.try_attach_plain(words, environment);
        assert_eq!(ran.code, 0, "attach of {}: {}{}", self.name, ran.err, self.said());
    }

    pub fn try_attach_plain(&self, words: &[&str], environment: &[(&str, &str)]) -> Ran {
        let socket = self.directory.join("qmp.sock");
        let socket = socket.to_str().expect("UTF-8");
        let first = ["attach", "--qmp", socket, "--store", self.lab.store(), "--name", &self.name];
        self.lab.run_with(&[&first, words].concat(), environment)
    }

    pub fn try_adopt(&self) -> Ran {
        self.lab.run(&["adopt", &self.name, "--json"])
    }

    /// An adoption that must succeed: from now on the VM's QEMU is another process, which has the
    /// plugin.
    pub fn adopt(&mut self) {
        let source = self.guest.qemu;
        let ran = self.try_adopt();
        assert_eq!(ran.code, 0, "adoption of {}: {}\n{}", self.name, ran.err, self.said());
        self.report = ran.json();
        self.follow();
        assert_ne!(self.guest.qemu, source, "the same process continues");
    }

    /// Takes the QEMU that answers at the plugin's socket for the VM's, if there is one.
    pub fn follow(&mut self) {
        if let Some(pid) = process::listener(&self.runtime_file("plugin.sock")) {
            self.guest.qemu = pid;
        }
    }

    /// QEMUs of this test, whatever started them.
    pub fn qemus(&self) -> Vec<Pid> {
        process::qemus_below(self.lab.path())
    }

    /// The most that the helper has ever held.
    pub fn helper_peak_bytes(&self) -> u64 {
        let pid = self.helper().expect("the helper runs");
        process::peak_bytes(pid).unwrap_or_else(|| panic!("helper {pid} ended"))
    }
}
