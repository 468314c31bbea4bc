//! The HDFS of scripts/hdfs-dev, for tests.
//!
//! `shared()` is the developer's cluster, which no test harms. `hazards()` is one of its own for
//! tests that kill its processes; holding it keeps other tests, of other processes too, off it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HAZARDS_PORT: &str = "19920";

#[derive(Debug)]
pub(crate) struct Cluster {
    /// State directory and port, where they are not the default.
    own: Option<(PathBuf, &'static str)>,
    url: String,
    _lock: Option<Flock<File>>,
}

impl Cluster {
    /// The shared cluster, up.
    pub(crate) fn shared() -> Self {
        Self::up(None, None)
    }

    /// The cluster to harm, up and whole, for this caller alone. Waits for its turn: call it where
    /// blocking is fine.
    pub(crate) fn hazards() -> Self {
        let dir = cache_dir().join("stillpoint").join("hdfs-hazards");
        fs::create_dir_all(&dir).expect("state directory of the cluster");
        let file = File::create(dir.join("tests.lock")).expect("lock file");
        let lock = Flock::lock(file, FlockArg::LockExclusive).expect("lock");
        Self::up(Some((dir, HAZARDS_PORT)), Some(lock))
    }

    fn up(own: Option<(PathBuf, &'static str)>, lock: Option<Flock<File>>) -> Self {
        let mut cluster = Cluster { own, url: String::new(), _lock: lock };
        cluster.url = cluster.hdfs_dev(&["up"]);
        cluster
    }

    /// A URL below which no other test works.
    pub(crate) fn fresh_url(&self, what: &str) -> String {
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("a clock after 1970");
        format!("{}tests/{what}-{}-{}", self.url, std::process::id(), time.as_nanos())
    }

    fn hdfs_dev(&self, arguments: &[&str]) -> String {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/hdfs-dev");
        let mut command = Command::new(&script);
        if let Some((dir, port)) = &self.own {
            command.env("STILLPOINT_HDFS_DIR", dir).env("STILLPOINT_HDFS_PORT", port);
        }
        let output = command.args(arguments).output();
        let output =
            output.unwrap_or_else(|error| panic!("{} can't be run: {error}", script.display()));
        assert!(
            output.status.success(),
            "these tests need a real HDFS. Run: scripts/install-deps && scripts/hdfs-dev {}\nIt said: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn signal(&self, role: &str, signal: Signal) {
        let pid = self.hdfs_dev(&["pid", role]).parse().expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("signal");
    }

    /// A process id, to signal from where the cluster can't be borrowed.
    pub(crate) fn pid(&self, role: &str) -> Pid {
        Pid::from_raw(self.hdfs_dev(&["pid", role]).parse().expect("a process id"))
    }

    /// Starts a killed process again and waits until the cluster is whole.
    pub(crate) fn restart(&self, role: &str) {
        self.hdfs_dev(&["start", role]);
        self.hdfs_dev(&["wait"]);
    }

    /// Runs one of Hadoop's own programs, `fs` or `ec`.
    pub(crate) fn tool(&self, arguments: &[&str]) -> String {
        self.hdfs_dev(arguments)
    }

    pub(crate) fn status(&self) -> String {
        self.hdfs_dev(&["status"])
    }
}

impl Drop for Cluster {
    /// Whatever a failed test left stopped or dead is repaired by the next `up`; a stopped process
    /// must continue for it.
    fn drop(&mut self) {
        if self.own.is_none() {
            return;
        }
        for role in ["namenode", "datanode-1", "datanode-2", "datanode-3"] {
            let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scripts/hdfs-dev");
            let mut command = Command::new(script);
            if let Some((dir, port)) = &self.own {
                command.env("STILLPOINT_HDFS_DIR", dir).env("STILLPOINT_HDFS_PORT", port);
            }
            let output = command.args(["pid", role]).output();
            let pid =
                output.ok().and_then(|o| String::from_utf8_lossy(&o.stdout).trim().parse().ok());
            if let Some(pid) = pid {
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            }
        }
    }
}

fn cache_dir() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from)
}
