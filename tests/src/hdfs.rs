//! A real HDFS for tests, by `scripts/hdfs-dev`: the developer's, which no test harms, or one of
//! its own to be harmed.

use crate::built::project;
use crate::process::Pid;
use crate::slots::shared_directory;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

const OWN_PORT: &str = "20620";
const ROLES: &[&str] = &["namenode", "datanode-1", "datanode-2", "datanode-3"];

pub struct Cluster {
    /// State directory, where it is not the default.
    own: Option<PathBuf>,
    url: String,
    _lock: Option<Flock<File>>,
}

impl Cluster {
    /// The shared cluster, up; it stays up.
    pub fn shared() -> Self {
        Self::up(None, None)
    }

    /// The cluster to harm, up and whole, for this caller alone. Gone with its data when dropped.
    pub fn to_harm() -> Self {
        let directory = shared_directory().join("hdfs");
        let file = File::create(shared_directory().join("hdfs.lock")).expect("a lock file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).expect("a lock");
        Self::up(Some(directory), Some(lock))
    }

    fn up(own: Option<PathBuf>, lock: Option<Flock<File>>) -> Self {
        let mut cluster = Self { own, url: String::new(), _lock: lock };
        cluster.url = cluster.hdfs_dev(&["up"]);
        cluster
    }

    /// A store of its own: no other test uses it.
    pub fn fresh_store(&self, what: &str) -> String {
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("a clock after 1970");
        format!("{}tests/{what}-{}-{}", self.url, std::process::id(), time.as_nanos())
    }

    pub fn pid(&self, role: &str) -> Pid {
        Pid::from_raw(self.hdfs_dev(&["pid", role]).parse().expect("a process id"))
    }

    pub fn kill(&self, role: &str) {
        kill(self.pid(role), Signal::SIGKILL).expect("a process of the cluster");
    }

    /// How many blocks a DataNode has begun to receive, by its log; of a cluster to harm.
    pub fn blocks_begun(&self, role: &str) -> usize {
        let directory = self.own.as_ref().expect("a cluster of its own");
        let log = std::fs::read_to_string(directory.join(format!("log/{role}.log")));
        log.unwrap_or_default().matches("Receiving BP-").count()
    }

    /// Starts a killed process again and waits until the cluster is whole.
    pub fn restart(&self, role: &str) {
        self.hdfs_dev(&["start", role]);
        self.hdfs_dev(&["wait"]);
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(project().join("scripts/hdfs-dev"));
        if let Some(directory) = &self.own {
            command.env("STILLPOINT_HDFS_DIR", directory).env("STILLPOINT_HDFS_PORT", OWN_PORT);
        }
        command.args(arguments);
        command
    }

    fn hdfs_dev(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("scripts/hdfs-dev can be run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "these tests need a real HDFS: scripts/install-deps. scripts/hdfs-dev {arguments:?}: {said}"
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.own.is_none() {
            return;
        }
        for role in ROLES {
            let output = self.command(&["pid", role]).output();
            if let Some(pid) = output
                .ok()
                .and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse().ok())
            {
                // A stopped process would not hear that it shall end.
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            }
        }
        let _ = self.command(&["wipe"]).output();
    }
}
