//! Processes of a test: found, watched and ended by number, never by name.

pub use nix::unistd::Pid;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Polls until `done`, at most `patience`; false when it never was.
pub fn wait_until(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + patience;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process whose threads have all ended does not run, though nobody has waited for it. The first thread alone says
/// nothing: while another one is still dying, files and locks of the process are held.
pub fn is_running(pid: Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.into_iter().any(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        state.is_some_and(|state| state != 'Z' && state != 'X')
    })
}

/// Whether the process has `path` on its command line: a number alone may by now be somebody else's.
pub fn is_ours(pid: Pid, path: &Path) -> bool {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).contains(&path.display().to_string())
}

/// The process that listens at a socket.
pub fn listener(socket: &Path) -> Option<Pid> {
    let stream = UnixStream::connect(socket).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    Some(Pid::from_raw(peer.pid()))
}

/// Ends it as a crash would, and waits until it is gone.
pub fn kill_hard(pid: Pid) {
    // It may be gone already.
    let _ = kill(pid, Signal::SIGKILL);
    let gone = wait_until(Duration::from_secs(20), || !is_running(pid));
    assert!(gone || std::thread::panicking(), "process {pid} does not end");
}

/// Stops the process for as long as the value lives.
pub fn stop_and_continue(pid: Pid) -> impl Drop {
    struct Stopped(Pid);
    impl Drop for Stopped {
        fn drop(&mut self) {
            let _ = kill(self.0, Signal::SIGCONT);
        }
    }
    kill(pid, Signal::SIGSTOP).expect("a process of the test");
    Stopped(pid)
}
